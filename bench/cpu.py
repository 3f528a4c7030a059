"""The CPU kernels against their targets, and how far each is from what limits it.

    python -m bench.cpu                          # the tables below, in some minutes
    python -m bench.cpu --only attention --dtypes float32 --tokens 64,1024 --json cpu.json
    python -m bench.cpu --only none --json cpu.json --markdown cpu.md
    python -m bench.cpu --keep-memory            # without the system's part in large tensors

All backends of a row take turns in one process (medians). Linear attention: 6 heads of 64,
batch · N = 65,536 tokens, against ``compiled``, PyTorch's softmax attention and the machine's own
matmul; ripple: 384 channels, against the depthwise ``conv2d`` path; the exponent of time against N:
one sequence of 6 heads. GFLOP/s are of the dense work, 8·N·D² a head forward and three times that
with backward, of which the kernels do half.

``--json`` adds to what the file holds, so that a long measurement can be taken in pieces: a row
measured again replaces the one before. ``--markdown`` writes all rows of that file, beside the
targets, as tables.

The roofline holds what limits the kernels, measured here: FMAs on registers, FMAs that each load a
vector from the L1 cache, instructions of any kind, the memory's copy rate, and how fast fresh pages
can be written at all. ``--keep-memory`` measures without fresh pages, for all backends alike.
"""

import argparse
import ctypes
import functools
import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from linear_vit import kernels
from linear_vit.bench.instruments.clock import Timing, measure_interleaved
from linear_vit.bench.instruments.machine import describe
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    RippleShape,
    least_work,
    make_problem,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)
from linear_vit.reports.statistics.fits import fit_scaling

CPU = torch.device("cpu")
TOTAL_TOKENS, HEADS, HEAD_DIM = 65_536, 6, 64
TOKENS = (64, 256, 1024, 4096, 16_384, 65_536)  # of the targets
FASTER_THAN_SOFTMAX_FROM = 128
LENGTHS = tuple(1024 << i for i in range(11))
LONGEST_SOFTMAX = 1024  # a quadratic operation: seconds a call beyond
GRIDS, CHANNELS = (8, 16, 32, 64), 384
# What linear_attention's extension can measure of the processor, in the order of its numbers, and
# what a forward product takes of each per FMA, as cpu_simd.cpp's header counts it for AVX-512.
PROBES = {"fma": "FMA rate", "load": "L1 loads", "instructions": "instructions"}
PER_FMA = {
    "linear_attention_state": {"fma": 1, "load": 6 / 8, "instructions": 18 / 8},
    "linear_attention_apply": {"fma": 1, "load": 4 / 4, "instructions": 8 / 4},
}
TABLES = ("attention", "ripple", "scaling", "roofline")
KIND = "cpu kernels"  # what reports take the file for
KEPT = "kept"  # memory that is freed, by the process
Row = dict[str, Any]
WHAT_LIMITS = """\
What keeps the kernels from the matmul's rate. They do half of the dense work, but a row that a
sign picks serves one token, or two features: 8 instructions for 4 FMAs where a query reads the
state, 18 for 8 where keys make it. A core that can start four instructions in a cycle, of which
two may be FMAs, so has none to spare for what comes on top, and the shares below add up: lists of
tokens by sign end in a mispredicted branch every 16 tokens, and tensors larger than the caches
are waited for. A matmul needs little more than one instruction an FMA, and works from the caches.
And an output of 100 MB is memory fresh from the system at every call, unless the process keeps
what is freed (`--keep-memory`): the column "fresh pages" is the time to have that cleared,
whoever computes."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=(*TABLES, "none"), help="one table, or none")
    parser.add_argument("--tokens", default=_every(TOKENS), help="N, e.g. 64,1024")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of linear attention")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per timed call")
    parser.add_argument("--against", default="compiled", help="backend to compare with")
    parser.add_argument("--threads", type=int, help="PyTorch threads (default: its own choice)")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="freed memory stays with the process (glibc): no fresh pages for anyone's tensors",
    )
    parser.add_argument("--json", type=Path, help="add every median to this file")
    parser.add_argument("--markdown", type=Path, help="write all rows, the file's too, as tables")
    options = parser.parse_args(arguments)
    reason = kernels.backends("linear_attention", CPU)["cpu"]
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    machine = describe(CPU) | {"kernels": kernels.implementation("linear_attention", "cpu")}
    try:
        if options.keep_memory:
            keep_freed_memory()
            machine["memory"] = KEPT
        rows = earlier_rows(options.json, machine)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    tokens = [int(n) for n in options.tokens.split(",")]
    budget = options.budget
    tables: dict[str, Callable[[], list[Row]]] = {}
    for dtype in options.dtypes.split(","):
        for mode in (FORWARD, FORWARD_BACKWARD):
            tables[f"attention, {dtype}, {mode}"] = functools.partial(
                attention_rows, tokens, getattr(torch, dtype), mode, options.against, budget
            )
    tables["ripple"] = functools.partial(ripple_rows, budget)
    tables["scaling"] = functools.partial(scaling_rows, budget)
    tables["roofline"] = functools.partial(roofline_rows, budget, kept=options.keep_memory)
    print(heading(machine))
    for name, measure in tables.items():
        if options.only not in (None, name.partition(",")[0]):
            continue
        new = measure()
        rows = merged(rows, new)
        print("\n" + "\n".join(as_tables(new)), flush=True)
        if options.json is not None:  # after each table: a killed run has lost only its last one
            save(options.json, {"kind": KIND, "machine": machine, "rows": rows})
    if options.markdown is not None:
        text = [f"# The CPU kernels, measured\n\n{heading(machine)}\n", *targets_met(rows), ""]
        text += [WHAT_LIMITS, ""]
        options.markdown.write_text("\n".join([*text, *as_tables(rows)]).rstrip() + "\n")
    return 0


def _every(tokens: Sequence[int]) -> str:
    return ",".join(map(str, sorted({*tokens, FASTER_THAN_SOFTMAX_FROM})))


def heading(machine: Mapping[str, Any]) -> str:
    kept = " Freed memory stays with the process (`--keep-memory`)." if "memory" in machine else ""
    return (
        f"{machine['cpu']}, PyTorch {machine['torch']}, {machine['kernels']}. "
        f"Medians of interleaved runs in one process; ratios turn by turn.{kept}"
    )


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, as the allocators that are recommended for PyTorch do.

    Otherwise glibc gives every block of more than 32 MB back to the system, which clears its pages
    anew for the next one: a share of the time that has nothing to do with the kernels, and is
    the larger the more intermediate tensors an implementation makes.

    Raises:
        ValueError: malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    never_map, never_trim = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if mallopt is None or not (mallopt(*never_map) and mallopt(*never_trim)):
        raise ValueError("--keep-memory sets glibc's malloc, which this process does not use")


# ---- rows kept in a file -------------------------------------------------------------------------


def earlier_rows(path: Path | None, machine: Mapping[str, Any]) -> list[Row]:
    """The file's rows, if there is one; ValueError if they are of another machine."""
    if path is None or not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        rows, before = saved["rows"], saved["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of bench.cpu: choose another name") from error
    for fact in ("cpu", "threads", "torch", "kernels", "memory"):
        if before.get(fact) != machine.get(fact):
            raise ValueError(
                f"{path} was measured with {fact} {before.get(fact)!r}, this is "
                f"{machine.get(fact)!r}: choose another file"
            )
    return list(rows)


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows; of those with the same name the new one, in the old one's place."""
    by_name = {row["name"]: row for row in rows} | {row["name"]: row for row in new}
    return list(by_name.values())


def save(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


# ---- measuring -----------------------------------------------------------------------------------


def by_turns(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    return measure_interleaved(calls, CPU, budget_s=budget)


def medians(timings: Mapping[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in timings.items()}


def attention_rows(
    tokens: Sequence[int], dtype: torch.dtype, mode: str, against: str, budget: float
) -> list[Row]:
    return [attention_row(n, dtype, mode, against, budget) for n in tokens]


def attention_row(n: int, dtype: torch.dtype, mode: str, against: str, budget: float) -> Row:
    """Seconds of the kernels, of ``against``, of a matmul and of softmax attention, at one N."""
    shape = AttentionShape(max(1, TOTAL_TOKENS // n), HEADS, HEADS, n, n, HEAD_DIM)
    problem = make_problem("linear_attention", shape, dtype, CPU)
    calls: dict[str, Callable[[], object]] = {
        backend: problem.call(backend, mode) for backend in ("cpu", against)
    }
    matrix = torch.randn(2048, 2048)
    calls["matmul"] = lambda: matrix @ matrix
    if n <= LONGEST_SOFTMAX:
        softmax = make_problem("softmax_attention", shape, dtype, CPU)
        calls["softmax"] = softmax.call("torch", mode)
    timings = by_turns(calls, budget)
    own = timings["cpu"]
    flop = least_work(operation_of("linear_attention"), mode, shape, dtype.itemsize).flop
    name = str(dtype).removeprefix("torch.")
    return {
        "name": f"attention, {name}, {mode}, N = {n}",
        "table": f"Linear attention, {mode}, {name}",
        "tokens": n,
        "against": against,
        "seconds": medians(timings),
        "flop": flop,
        "ratio": timings[against].over(own),
        "over_matmul": flop / (2 * 2048**3) * timings["matmul"].over(own),
        "over_softmax": timings["softmax"].over(own) if "softmax" in timings else None,
    }


def ripple_rows(budget: float) -> list[Row]:
    rows: list[Row] = []
    for operation in ("ripple_pool", "ripple_expand"):
        for side in GRIDS:
            shape = RippleShape(max(1, 8192 // side**2), side, side, CHANNELS)
            problem = make_problem(operation, shape, torch.float32, CPU)
            calls = {b: problem.call(b, FORWARD_BACKWARD) for b in ("cpu", "torch")}
            timings = by_turns(calls, budget)
            rows.append(
                {
                    "name": f"{operation}, {side}x{side}",
                    "table": f"Ripple, {CHANNELS} channels, {FORWARD_BACKWARD}, float32",
                    "operation": operation,
                    "grid": side,
                    "batch": shape.B,
                    "bytes": least_work(operation_of(operation), FORWARD_BACKWARD, shape, 4).bytes,
                    "seconds": medians(timings),
                    "ratio": timings["torch"].over(timings["cpu"]),
                }
            )
    return rows


def scaling_rows(budget: float) -> list[Row]:
    """Forward of one sequence; all lengths, which are beginnings of the longest, take turns."""
    longest = (1, HEADS, LENGTHS[-1], HEAD_DIM)
    q, k, v = (torch.randn(longest) for _ in range(3))
    calls = {
        str(n): functools.partial(
            kernels.linear_attention, q[:, :, :n], k[:, :, :n], v[:, :, :n], backend="cpu"
        )
        for n in LENGTHS
    }
    table = "Time against N, one sequence, forward, float32"
    return [
        {"name": f"scaling, N = {n}", "table": table, "tokens": int(n), "seconds": {"cpu": seconds}}
        for n, seconds in medians(by_turns(calls, budget)).items()
    ]


def roofline_rows(budget: float, *, kept: bool) -> list[Row]:
    """Each product of the forward, and how long each limit alone would let it take, by turns.

    Where freed memory is ``kept``, outputs are not of fresh pages.
    """
    probe = torch.ops.linear_vit.cpu_linear_attention_probe
    repeats = 200_000
    big = torch.empty(1 << 26)
    other = torch.empty_like(big)
    fresh = 100_000_000 // mmap.PAGESIZE * mmap.PAGESIZE
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(probe, kind, repeats) for kind, name in enumerate(PROBES)
    }
    calls |= {
        "copy": lambda: other.copy_(big),
        "fresh": lambda: write_fresh(fresh, large_pages=False),
        "fresh_large": lambda: write_fresh(fresh, large_pages=True),
    }
    cases = [
        (operation, AttentionShape(TOTAL_TOKENS // n, HEADS, HEADS, n, n, HEAD_DIM))
        for operation in PER_FMA
        for n in (1024, 65_536)
    ]
    for operation, shape in cases:
        problem = make_problem(operation, shape, torch.float32, CPU)
        calls[f"{operation}, N = {shape.N}"] = problem.call("cpu", FORWARD)
    seconds = medians(by_turns(calls, budget))
    amounts = {name: probe(kind, repeats) for kind, name in enumerate(PROBES)}
    amounts |= {"copy": 2 * big.nbytes, "fresh": fresh, "fresh_large": fresh}
    rates = {name: amount / seconds[name] for name, amount in amounts.items()}
    table = "Roofline"
    rows: list[Row] = [{"name": "limits", "table": table, "limits": rates}]
    for operation, shape in cases:
        work = least_work(operation_of(operation), FORWARD, shape, 4)
        done = work.flop / 2  # the rows that a sign picks
        makes_output = operation.endswith("apply") and not kept
        written = 4 * HEADS * TOTAL_TOKENS * HEAD_DIM if makes_output else 0
        bounds = {PROBES[name]: done * n / rates[name] for name, n in PER_FMA[operation].items()}
        bounds |= {"memory": work.bytes / rates["copy"]}
        bounds |= {"fresh pages": written / rates["fresh_large"]}
        name = f"{operation}, N = {shape.N}"
        rows.append(
            {"name": f"roofline, {name}", "table": table, "tokens": shape.N}
            | {"operation": operation, "seconds": {"cpu": seconds[name]}}
            | {"flop_done": done, "bounds": bounds}
        )
    return rows


def write_fresh(size: int, *, large_pages: bool) -> None:
    """Get memory from the system, as an allocator does for a large tensor, and write it once."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.float32).fill_(0.0)


# ---- tables --------------------------------------------------------------------------------------


def as_tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: every table of the rows, in the order they came."""
    lines: list[str] = []
    for title in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == title]
        lines += [f"## {title}", ""]
        if title.startswith("Linear attention"):
            lines += _attention_table(sorted(mine, key=lambda row: row["tokens"]))
        elif title.startswith("Ripple"):
            lines += _ripple_table(mine)
        elif title.startswith("Time"):
            lines += _scaling_table(sorted(mine, key=lambda row: row["tokens"]))
        else:
            lines += _roofline_table(mine)
        lines.append("")
    return lines


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---:"] * len(header), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _attention_table(rows: Sequence[Row]) -> list[str]:
    against = rows[0]["against"]
    header = ["N", "cpu, GFLOP/s", f"{against}, GFLOP/s", f"over {against}"]
    header += ["float32 matmul, GFLOP/s", "over matmul", "over SDPA"]
    cells = []
    for row in rows:
        seconds, flop = row["seconds"], row["flop"]
        softmax = row["over_softmax"]
        cells.append(
            [
                f"{row['tokens']:,}",
                f"{flop / seconds['cpu'] / 1e9:.0f}",
                f"{flop / seconds[against] / 1e9:.0f}",
                f"{row['ratio']:.2f}×",
                f"{2 * 2048**3 / seconds['matmul'] / 1e9:.0f}",
                f"{row['over_matmul']:.2f}×",
                f"{softmax:.1f}×" if softmax is not None else "–",
            ]
        )
    return _table(header, cells)


def _ripple_table(rows: Sequence[Row]) -> list[str]:
    header = ["operation", "grid", "batch", "ms", "GB/s of the least traffic", "over torch"]
    cells = [
        [
            row["operation"],
            f"{row['grid']}×{row['grid']}",
            str(row["batch"]),
            f"{1e3 * row['seconds']['cpu']:.2f}",
            f"{row['bytes'] / row['seconds']['cpu'] / 1e9:.1f}",
            f"{row['ratio']:.2f}×",
        ]
        for row in rows
    ]
    return _table(header, cells)


def _scaling_table(rows: Sequence[Row]) -> list[str]:
    cells = [
        [
            f"{row['tokens']:,}",
            f"{1e3 * row['seconds']['cpu']:.2f}",
            f"{1e9 * row['seconds']['cpu'] / row['tokens'] / HEADS:.0f}",
        ]
        for row in rows
    ]
    lines = _table(["N", "ms", "ns per token and head"], cells)
    return [*lines, "", f"Fitted: {_fit(rows)}."]


def _fit(rows: Sequence[Row]) -> Any:
    return fit_scaling([row["tokens"] for row in rows], [row["seconds"]["cpu"] for row in rows])


def _roofline_table(rows: Sequence[Row]) -> list[str]:
    rates = next(row["limits"] for row in rows if "limits" in row)
    lines = [
        f"All threads together: {rates['fma'] / 1e9:.0f} GFLOP/s of FMAs on registers, "
        f"{rates['load'] / 1e9:.0f} with a load from the L1 cache each, and as many instructions "
        f"that do nothing as would be {rates['instructions'] / 1e9:.0f} GFLOP/s of FMAs; "
        f"{rates['copy'] / 1e9:.1f} GB/s copied; fresh memory written at "
        f"{rates['fresh'] / 1e9:.1f} GB/s in small pages, {rates['fresh_large'] / 1e9:.1f} GB/s "
        "in pages of 2 MB. Below: the share of the time "
        "that each limit alone would take; they overlap in part only.",
        "",
    ]
    measured = [row for row in rows if "bounds" in row]
    names = list(measured[0]["bounds"]) if measured else []
    cells = [
        [row["operation"], f"{row['tokens']:,}"]
        + [f"{row['flop_done'] / row['seconds']['cpu'] / 1e9:.0f}"]
        + [f"{row['bounds'][name] / row['seconds']['cpu']:.0%}" for name in names]
        for row in measured
    ]
    return lines + _table(["operation", "N", "GFLOP/s done", *names], cells)


# ---- targets -------------------------------------------------------------------------------------


def targets_met(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: each target, what was measured, and whether that meets it."""
    lines = ["| | target | measured | met |", "|---|---|---|---|"]

    def line(what: str, target: str, measured: str, met: bool) -> None:
        lines.append(f"| {what} | {target} | {measured} | {'yes' if met else '**no**'} |")

    def ratios(what: str, found: list[float], mean: float, worst: float) -> None:
        if found:
            measured = f"mean {geometric_mean(found):.2f}×, worst {min(found):.2f}×"
            met = geometric_mean(found) >= mean and min(found) >= worst
            line(what, f"mean ≥ {mean:g}×, worst ≥ {worst:g}×", measured, met)

    for mode, dtype, mean, worst in (
        (FORWARD, "float32", 5, 3),
        (FORWARD, "bfloat16", 6, 4),
        (FORWARD_BACKWARD, "float32", 5, 3),
        (FORWARD_BACKWARD, "bfloat16", 4, 2.5),
    ):
        mine = [row for row in rows if row["table"] == f"Linear attention, {mode}, {dtype}"]
        of_targets = [row for row in mine if row["tokens"] in TOKENS]
        found = [row["ratio"] for row in of_targets if row["against"] == "compiled"]
        ratios(f"{mode}, {dtype}, over compiled", found, mean, worst)
        if (mode, dtype) == (FORWARD, "float32"):
            long = [row["over_matmul"] for row in of_targets if row["tokens"] >= 1024]
            ratios("forward, float32, N ≥ 1,024, over the float32 matmul's rate", long, 1.5, 1.2)
            softmax = {row["tokens"]: row["over_softmax"] for row in mine if row["over_softmax"]}
            if softmax:
                slow = [n for n, ratio in softmax.items() if ratio <= 1]
                measured = ", ".join(f"{ratio:.1f}× at {n:,}" for n, ratio in softmax.items())
                met = max(slow, default=0) < FASTER_THAN_SOFTMAX_FROM
                target = f"faster from N = {FASTER_THAN_SOFTMAX_FROM}"
                line("forward, float32, over SDPA", target, measured, met)
    ripple = [row["ratio"] for row in rows if row["table"].startswith("Ripple")]
    ratios("ripple, forward+backward, over torch", ripple, 3, 1.5)
    scaling = [row for row in rows if row["table"].startswith("Time")]
    if scaling:
        fit = _fit(scaling)
        met = fit.reason is None and abs(fit.exponent - 1) <= 0.05
        line("exponent of time against N", "1.00 ± 0.05", str(fit), met)
    return lines


if __name__ == "__main__":
    sys.exit(main())
