"""Measure tiles, warps and stages of the Triton kernels on this GPU; write what is fastest.

    python -m bench.tune --out tuning.json          # then: export LINEAR_VIT_TUNING=tuning.json
    python -m bench.tune --dry-run --arch sm_90a    # no GPU: compile the candidates instead
    python -m bench.tune --dry-run --list           # nor that: only name them

One kernel at a time, in the table's order: its options as they stand, and each of them changed by
one step. A candidate counts if the operation still meets the accuracy rule; the fastest by device
time stays, and is the starting point for the next step, until none is faster.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from linear_vit.bench.instruments import clock
from linear_vit.bench.problems import DTYPES, Expected, Problem, check, make_problem, operations
from linear_vit.bench.static.machine_code import LIMITS
from linear_vit.kernels.triton import tuning

# A candidate has to win by this much: less is noise.
_GAIN = 0.02
_BUDGET_S = 0.2

_DIMENSIONS = ("head_dims", "channels")

Options = dict[str, int]


_FOUND = {name: w for found in operations().values() for name, w in found.workloads.items()}
WORKLOADS = {name: _FOUND[name] for name in tuning.TABLE}  # in its order


def dtype_of(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel's rules are asked for."""
    return WORKLOADS[kernel].dtype or dtype


def neighbours(options: Options) -> list[Options]:
    """The options, and each of them changed by one step: sizes by a factor of two."""
    found = [options]
    for name, value in options.items():
        if name == "RESIDENT":
            continue
        if name == "num_stages":
            # Of a kernel that has one, none of the loops is of a kind that is pipelined.
            steps = [s for s in (value - 1, value + 1) if 2 <= s <= 5 and value > 1]
        elif name == "num_warps":
            steps = [s for s in (value // 2, value * 2) if 2 <= s <= 16]
        else:
            steps = [s for s in (value // 2, value * 2) if 16 <= s <= 256]
        found += [{**options, name: step} for step in steps]
    return found


@contextlib.contextmanager
def trying(kernel: str, options: Options) -> Iterator[None]:
    """The table with these options for a kernel, whatever the device, dimension and dtype."""
    with mock.patch.dict(tuning.TABLE, {kernel: (tuning.Rule(options),)}):
        tuning._options.cache_clear()
        try:
            yield
        finally:
            tuning._options.cache_clear()


def tune(kernel: str, dim: int, dtype: torch.dtype, device: torch.device) -> Options | None:
    """The fastest options found for a kernel; None where they are those of the table.

    Args:
        dim: the head dim, or the channels.
    """
    workload = WORKLOADS[kernel]
    problem = make_problem(workload.operation, workload.shape(dim), dtype, device)
    expected = problem.expected()
    before = best = tuning.options(kernel, dim, dtype_of(kernel, dtype), device)
    times: dict[tuple[tuple[str, int], ...], float] = {}

    def seconds(options: Options) -> float:
        key = tuple(sorted(options.items()))
        if key not in times:
            times[key] = _time(kernel, options, problem, workload.mode, expected, device)
            print(f"  {_words(options)}: {1e6 * times[key]:.1f} µs", flush=True)
        return times[key]

    while True:
        fastest = min(neighbours(best), key=seconds)
        if not seconds(fastest) < seconds(best) * (1 - _GAIN):
            return None if best == before else best
        best = fastest


def _time(
    kernel: str,
    options: Options,
    problem: Problem,
    mode: str,
    expected: Expected,
    device: torch.device,
) -> float:
    """Median seconds of a pass; infinite where the candidate does not launch or is inaccurate."""
    from triton.runtime.errors import OutOfResources

    with trying(kernel, options):
        try:
            verdicts = check(problem, "triton", mode, expected)
        except OutOfResources:
            return float("inf")
        if not all(verdict.passed for verdict in verdicts.values()):
            return float("inf")
        call = problem.call("triton", mode)
        return clock.measure(call, device, budget_s=_BUDGET_S).median


def compiles_well(
    kernel: str, options: Options, architecture: str, dim: int, dtype: torch.dtype
) -> str:
    """Compile a candidate with no GPU, and say what became of it, in a few words."""
    from linear_vit.bench.static import launches
    from linear_vit.bench.static import table as static
    from linear_vit.bench.static.triton import compile_room

    room = kernel.partition(".")[0]
    workload = WORKLOADS[kernel]
    shape = workload.smaller(dim)
    problem = make_problem(workload.operation, shape, dtype, torch.device("cpu"))
    exercise = launches.Exercise(problem, launches.ALIGNED)
    head_dim = dim if launches.has_head_dims(room) else None
    static._cache().mkdir(parents=True, exist_ok=True)
    with (
        trying(kernel, options),
        mock.patch.object(launches, "exercises", return_value=[exercise]),
    ):
        rows = compile_room(room, architecture, dtype, head_dim, static._cache())
    own = [static._finish(row) for row in rows if row["kernel"] in workload.functions]
    if not own:
        return "not launched at this size"
    registers = max(row["registers"] for row in own)
    shared = max(row["dynamic_shared"] for row in own) / 1024
    occupancy = min(row["occupancy"] for row in own)
    wrong = dict.fromkeys(fault for row in own for fault in row["faults"])
    usage = f"{registers} registers, {shared:.0f} KiB, {100 * occupancy:.0f} %"
    return "; ".join([usage, *wrong])


def _words(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Find the fastest launch options on this GPU."
    )
    parser.add_argument("--kernels", metavar="A,B", help="of the table; all by default")
    parser.add_argument("--head-dims", default="64", metavar="A,B", help="default: 64")
    parser.add_argument("--channels", default="384", metavar="A,B", help="ripple's; default: 384")
    parser.add_argument("--dtypes", default="bfloat16", metavar="A,B", help="default: bfloat16")
    parser.add_argument("--out", type=Path, default=Path("tuning.json"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="compile candidates, time nothing")
    parser.add_argument("--arch", default="sm_90a", help="for --dry-run (default: sm_90a)")
    parser.add_argument("--list", action="store_true", help="for --dry-run: don't compile either")
    given = parser.parse_args(argv)
    names = given.kernels.split(",") if given.kernels else list(WORKLOADS)
    for name in names:
        if name not in WORKLOADS:
            parser.error(f"no workload for {name!r}; there are {', '.join(WORKLOADS)}")
    for dtype in given.dtypes.split(","):
        if dtype not in DTYPES:
            parser.error(f"no dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if given.arch not in LIMITS:
        parser.error(f"no {given.arch!r}; there are {', '.join(LIMITS)}")
    try:
        dims = {of: [int(d) for d in getattr(given, of).split(",")] for of in _DIMENSIONS}
    except ValueError:
        parser.error("head dims and channels are numbers with commas between them")
    cases = [
        (name, dim, dtype)
        for name in names
        for dim in dims["channels" if name.startswith("ripple.") else "head_dims"]
        for dtype in given.dtypes.split(",")
    ]
    if given.dry_run:
        for name, dim, dtype in cases:
            print(f"{name} {dim} {dtype} {given.arch}")
            with tuning.assume(given.arch, LIMITS[given.arch].multiprocessors):
                asked = dtype_of(name, DTYPES[dtype])
                start = tuning.options(name, dim, asked, torch.device("cpu"))
            for options in neighbours(start):
                verdict = (
                    ""
                    if given.list
                    else compiles_well(name, options, given.arch, dim, DTYPES[dtype])
                )
                print(f"  {_words(options)}  {verdict}".rstrip(), flush=True)
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: --dry-run lists and compiles the candidates", file=sys.stderr)
        return 2

    device = torch.device("cuda", torch.cuda.current_device())
    rules = []
    for name, dim, dtype in cases:
        print(f"{name} {dim} {dtype}", flush=True)
        found = tune(name, dim, DTYPES[dtype], device)
        if found is not None:
            rules.append(
                {
                    "kernel": name,
                    "architecture": tuning.architecture(device),
                    "dim": dim,
                    "dtype": str(dtype_of(name, DTYPES[dtype])).removeprefix("torch."),
                    "options": found,
                }
            )
        given.out.write_text(json.dumps({"schema": 1, "rules": rules}, indent=1) + "\n")
    print(f"{len(rules)} rules in {given.out}: export {tuning.OVERRIDES}={given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
