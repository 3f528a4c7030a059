"""Measure tiles, warps and stages of the Triton kernels on this GPU; write what is fastest.

    python -m bench tune --out tuning.json          # then: export LINEAR_VIT_TUNING=tuning.json
    python -m bench tune --dry-run --arch sm_90a    # no GPU: compile the candidates instead
    python -m bench tune --dry-run --list           # nor that: only name them

One kernel at a time, in the table's order: its options as they stand, and each of them changed by
one step. A candidate counts if the operation still meets the accuracy rule; the fastest by device
time stays, and is the starting point for the next step, until none is faster.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from linear_vit.bench.instruments import clock
from linear_vit.bench.problems import DTYPES, Expected, Problem, check, make_problem, operations
from linear_vit.bench.static.machine_code import LIMITS
from linear_vit.kernels.triton import tuning
from linear_vit.options import OptionError, add, known, numbers, option, words
from linear_vit.screen import counted, say

# A candidate has to win by this much: less is noise.
_GAIN = 0.02
_BUDGET_S = 0.2

# What a kernel's rules are asked for, and what is tuned by default.
_DIMENSIONS = {"head-dims": (64,), "channels": (384,)}

Options = dict[str, int]
_Case = tuple[str, int, str]  # kernel, head dim or channels, dtype

_FOUND = {name: w for found in operations().values() for name, w in found.workloads.items()}
WORKLOADS = {name: _FOUND[name] for name in tuning.TABLE}  # in its order


def dtype_of(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel's rules are asked for."""
    return WORKLOADS[kernel].dtype or dtype


def dimension_of(kernel: str) -> str:
    """What a kernel's rules call the dimension: "head-dims", or "channels" where it has none."""
    return "channels" if WORKLOADS[kernel].shape(16).dim is None else "head-dims"


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
            say(f"  {_words(options)}: {1e6 * times[key]:.1f} µs")
        return times[key]

    while seconds(best) < float("inf"):
        fastest = min(neighbours(best), key=seconds)
        if not seconds(fastest) < seconds(best) * (1 - _GAIN):
            return None if best == before else best
        best = fastest
    return None


def _time(
    kernel: str,
    options: Options,
    problem: Problem,
    mode: str,
    expected: Expected,
    device: torch.device,
) -> float:
    """Median seconds of a pass; infinite where the candidate does not launch or is inaccurate, or
    where it was disturbed twice."""
    from triton.runtime.errors import OutOfResources

    with tuning.using({kernel: (tuning.Rule(options),)}):
        try:
            verdicts = check(problem, "triton", mode, expected)
        except OutOfResources:
            return float("inf")
        if not all(verdict.passed for verdict in verdicts.values()):
            return float("inf")
        call = problem.call("triton", mode)
        for _ in range(2):
            timing = clock.measure(call, device, budget_s=_BUDGET_S)
            if timing.disturbed is None:
                return timing.median
        say(f"  {_words(options)}: {timing.disturbed}")
        return float("inf")


def compiles_well(
    kernel: str, options: Options, architecture: str, dim: int, dtype: torch.dtype
) -> str:
    """Compile a candidate with no GPU, and say what became of it, in a few words."""
    from linear_vit.bench.static import launches
    from linear_vit.bench.static.faults import finished
    from linear_vit.bench.static.triton import compile_exercises
    from linear_vit.bench.static.units import cache_folder

    workload, folder = WORKLOADS[kernel], kernel.partition(".")[0]
    shape = workload.smaller(dim)
    problem = make_problem(workload.operation, shape, dtype, torch.device("cpu"))
    exercise = launches.Exercise(problem, launches.ALIGNED)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tuning.using({kernel: (tuning.Rule(options),)}):
        rows = compile_exercises([exercise], architecture, shape.dim, cache_folder())
    own = [finished({"room": folder, **row}) for row in rows if row["kernel"] in workload.functions]
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


# ---- python -m bench tune ------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tune", description="Find the fastest launch options on this GPU."
    )
    text = "of the table; all by default"
    parser.add_argument("--kernels", type=words, metavar="A,B", help=text)
    add(parser, dtypes="default: bfloat16")
    for name, usual in _DIMENSIONS.items():
        text = f"default: {usual[0]}"
        option(parser, f"--{name}", type=numbers, metavar="A,B", help=text)
    add(parser, out="default: tuning.json")
    text = "compile candidates, time nothing"
    option(parser, "--dry-run", action="store_true", help=text)
    add(parser, arch="for --dry-run (default: sm_90a)")
    parser.add_argument("--list", action="store_true", help="for --dry-run: don't compile either")
    given = parser.parse_args(argv)
    try:
        kernels = known("kernels", given.kernels, WORKLOADS)
        dtypes = known("dtypes", given.dtypes or ("bfloat16",), DTYPES)
        architectures = known("arch", given.arch or ("sm_90a",), LIMITS)
    except OptionError as error:
        parser.error(str(error))
    dims = {"head-dims": given.head_dims, "channels": given.channels}
    cases = [
        (kernel, dim, dtype)
        for kernel in kernels
        for dim in dims[dimension_of(kernel)] or _DIMENSIONS[dimension_of(kernel)]
        for dtype in dtypes
    ]
    if given.dry_run:
        for architecture in architectures:
            _dry_run(cases, architecture, compile_them=not given.list)
        return 0
    if not torch.cuda.is_available():
        say("no GPU here: --dry-run lists and compiles the candidates", sys.stderr)
        return 2
    _tune_all(cases, given.out or Path("tuning.json"))
    return 0


def _dry_run(cases: Sequence[_Case], architecture: str, *, compile_them: bool) -> None:
    for kernel, dim, dtype in cases:
        say(f"{kernel} {dim} {dtype} {architecture}")
        with tuning.assume(architecture, LIMITS[architecture].multiprocessors):
            asked = dtype_of(kernel, DTYPES[dtype])
            start = tuning.options(kernel, dim, asked, torch.device("cpu"))
        for candidate in neighbours(start):
            verdict = ""
            if compile_them:
                verdict = compiles_well(kernel, candidate, architecture, dim, DTYPES[dtype])
            say(f"  {_words(candidate)}  {verdict}".rstrip())


def _tune_all(cases: Sequence[_Case], out: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    rules = []
    for kernel, dim, dtype in cases:
        say(f"{kernel} {dim} {dtype}")
        found = tune(kernel, dim, DTYPES[dtype], device)
        if found is not None:
            rules.append(
                {
                    "kernel": kernel,
                    "architecture": tuning.architecture(device),
                    "dim": dim,
                    "dtype": str(dtype_of(kernel, DTYPES[dtype])).removeprefix("torch."),
                    "options": found,
                }
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"schema": 1, "rules": rules}, indent=1) + "\n")
    say(f"{counted(len(rules), 'rule')} in {out}: export {tuning.OVERRIDES}={out}")


if __name__ == "__main__":  # the old spelling
    from linear_vit.bench.__main__ import main as command

    sys.exit(command(["tune", *sys.argv[1:]]))
