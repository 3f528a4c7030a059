"""The C++ kernels: the page of their targets, what limits them, and the tables behind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linear_vit.reports import targets
from linear_vit.reports.claims import PER_FMA, PYTORCH, WRITES_OUTPUT, family_of
from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.statistics.fits import fit_scaling
from linear_vit.reports.tables.table import (
    NOTHING,
    Cell,
    Row,
    Table,
    columns,
    from_lines,
    join,
    number,
    to_markdown,
    word,
)
from linear_vit.reports.units import duration, exact, rate

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
_PROBES = {"fma": "FMA rate", "load": "L1 loads", "instructions": "instructions"}
_OWN = "cpu"


@dataclass(frozen=True)
class Product:
    """One product of the forward pass, and how long each limit alone would let it take."""

    case: dict[Any, Any]
    flop_done: float  # half of the dense work: the rows that a sign picks
    bounds: dict[str, float]

    @property
    def binding(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)

    def share(self, name: str) -> float:
        return float(self.bounds[name] / self.case["median_s"])


def products(run: Runs) -> list[Product]:
    """Of the cases whose limits the run has measured."""
    found = []
    kept = {head["file"]: bool(head["facts"].get("memory")) for head in run.heads}
    for case in run.kernels.to_dict("records"):
        per_fma, limits = PER_FMA.get(case["operation"]), run.limits(case["file"])
        probes, copy = limits.get("probes") or {}, limits.get("copy_bytes_per_s")
        own = case["backend"] == _OWN and case["pass"] == "forward" and case["dtype"] == "float32"
        if not (own and per_fma and copy and all(probes.get(name) for name in per_fma)):
            continue
        info = case["info"]
        done, shape = info["least_flop"] / 2, info["shape"]
        bounds = {_PROBES[name]: done * n / probes[name] for name, n in per_fma.items()}
        bounds["memory"] = info["least_bytes"] / copy
        fresh = limits.get("fresh_large_bytes_per_s")
        writes = case["operation"] in WRITES_OUTPUT and not kept[case["file"]]
        written = 4 * shape["B"] * shape["H"] * shape["N"] * shape["D"] if writes else 0
        bounds["fresh pages"] = written / fresh if fresh else 0.0
        found.append(Product(case, done, bounds))
    return found


def products_table(run: Runs, found: Sequence[Product]) -> Table:
    """What is done a second, and the share of the time that each limit alone would take."""
    lines = []
    for product in found:
        case = product.case
        done = product.flop_done / case["median_s"] / 1e9
        bounds = "\n".join(f"{k}: {duration(v)}" for k, v in product.bounds.items() if v)
        line = {
            "operation": word(run.words.operation(case["operation"])),
            "N": number(f"{case['N']:,}", case["N"]),
            "time": number(duration(case["median_s"]), case["median_s"]),
            "GFLOP/s done": number(rate(done), done, exact(done, "GFLOP/s")),
            "limited by": word(product.binding, f"each limit alone allows\n{bounds}"),
        }
        for name in product.bounds:
            share = product.share(name)
            line[name] = number(f"{share:.0%}", share, exact(100 * share, "%"))
        lines.append(line)
    first = found[0].case
    title = f"Limits of the C++ products; {first['machine']}"
    note = _limits(run.limits(first["file"]))
    return from_lines(title, lines, ("operation", "limited by"), note)


def _limits(limits: dict[str, Any]) -> str:
    probes = limits["probes"]
    return (
        f"All threads together: {probes['fma'] / 1e9:.0f} GFLOP/s of FMAs on registers, "
        f"{probes['load'] / 1e9:.0f} with a load from the L1 cache each, and as many instructions "
        f"that do nothing as would be {probes['instructions'] / 1e9:.0f} GFLOP/s of FMAs; "
        f"{limits['copy_bytes_per_s'] / 1e9:.1f} GB/s copied; fresh memory written at "
        f"{limits['fresh_bytes_per_s'] / 1e9:.1f} GB/s in small pages, "
        f"{limits['fresh_large_bytes_per_s'] / 1e9:.1f} GB/s in pages of 2 MB. Shares of the time "
        "that each limit alone would take; they overlap in part only."
    )


def against_others(run: Runs) -> list[Table]:
    """The own kernels on batches beside every backend that took turns with them."""
    frame = run.kernels
    frame = frame[frame["total_tokens"] > 0] if not frame.empty else frame
    tables = []
    for (operation, mode, dtype), part in frame.groupby(["operation", "pass", "dtype"], sort=False):
        own = part[part["backend"] == _OWN].sort_values("N")
        others = [str(name) for name in part["backend"].unique() if name != _OWN]
        if own.empty or not others:
            continue
        at = {(case["N"], case["backend"]): case for case in part.to_dict("records")}
        incumbent = _incumbent(run, str(operation), str(mode), str(dtype))
        lines = [
            _against(run, case, {name: at.get((case["N"], name)) for name in others}, incumbent)
            for case in own.to_dict("records")
        ]
        title = f"{run.words.operation(str(operation)).capitalize()}, {mode}, {dtype}"
        tables.append(from_lines(title, lines, ()))
    return tables


def _incumbent(run: Runs, operation: str, mode: str, dtype: str) -> dict[int, dict[Any, Any]]:
    """By length: PyTorch's cases of the operation whose work this one does in another way."""
    family = family_of(operation)
    if not family.incumbent or operation != family.operations[0]:
        return {}
    frame = run.kernels
    frame = frame[(frame["operation"] == family.operations[1]) & (frame["backend"] == PYTORCH)]
    frame = frame[(frame["pass"] == mode) & (frame["dtype"] == dtype) & (frame["total_tokens"] > 0)]
    return {int(case["N"]): case for case in frame.to_dict("records")}


def _against(
    run: Runs,
    own: dict[Any, Any],
    others: dict[str, dict[Any, Any] | None],
    incumbent: dict[int, dict[Any, Any]],
) -> dict[str, Cell]:
    line = {
        "N": number(f"{own['N']:,}", own["N"]),
        f"{_OWN}, time": number(duration(own["median_s"]), own["median_s"]),
        f"{_OWN}, GFLOP/s": _rate(own["tflop_per_s"] * 1e3),
        f"{_OWN}, GB/s": _rate(own["gb_per_s"]),
    }
    for name, other in others.items():
        ratio = targets.over(own, other) if other else None
        line[f"{name}, GFLOP/s"] = _rate(other["tflop_per_s"] * 1e3 if other else None)
        line[f"over {name}"] = Cell(NOTHING) if ratio is None else number(f"{ratio:.2f}×", ratio)
    matmul = own["ratios"].get("matmul")
    line["over float32 matmul"] = (
        Cell(NOTHING) if matmul is None else number(f"{matmul:.2f}×", matmul)
    )
    other = incumbent.get(own["N"])
    ratio = targets.over(own, other) if other else None
    line[f"over {family_of(own['operation']).incumbent}"] = (
        Cell(NOTHING) if ratio is None else number(f"{ratio:.1f}×", ratio)
    )
    return line


def _rate(value: float | None) -> Cell:
    if value is None or value != value:  # NaN: the file does not say the work
        return Cell(NOTHING)
    return number(rate(value), value)


def time_against_n(run: Runs) -> Table | None:
    """One sequence, its time and the fit."""
    cases = targets.one_sequence(run)
    if not cases:
        return None
    rows = []
    for case in cases:
        heads = case["info"]["shape"]["H"]
        each = 1e9 * case["median_s"] / case["N"] / heads
        cells = [number(f"{case['N']:,}", case["N"])]
        cells += [number(duration(case["median_s"]), case["median_s"]), number(f"{each:.0f}", each)]
        rows.append(Row(cells))
    fit = fit_scaling([c["N"] for c in cases], [c["median_s"] for c in cases])
    title = "Time against N, one sequence, forward, float32"
    titles = ["N", "time", "ns per token and head"]
    return Table(title, columns(titles), rows, f"Fitted: {fit}.")


def document(run: Runs, found: Sequence[targets.Verdict]) -> str:
    """The targets of a CPU, and what is behind each figure, as Markdown."""
    lines = ["# The CPU kernels, measured", _heading(run), to_markdown(targets.as_table(found))]
    lines.append(WHAT_LIMITS)
    for table in _tables(run):
        lines += [f"## {table.title}", to_markdown(table), *([table.note] if table.note else [])]
    return join(lines)


def _tables(run: Runs) -> Iterator[Table]:
    yield from against_others(run)
    if (scaling := time_against_n(run)) is not None:
        yield scaling
    if found := products(run):
        yield products_table(run, found)


def _heading(run: Runs) -> str:
    head = run.heads[-1]
    facts, file = head["facts"], Path(head["file"]).name
    own = run.kernels[run.kernels["backend"] == _OWN]["implementation"].dropna()
    kernels = facts.get("kernels") or next(iter(own), "C++ kernels")
    kept = " Freed memory stays with the process (`--keep-memory`)." if facts.get("memory") else ""
    return (
        f"{facts['cpu']}, {facts['threads']} threads, PyTorch {facts['torch']}, {kernels}. Medians "
        f"of interleaved runs in one process; ratios turn by turn. From `{file}`.{kept}"
    )
