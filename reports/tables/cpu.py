"""The C++ kernels: the page of their targets, what limits them, and the tables behind."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linear_vit.reports import targets
from linear_vit.reports.claims import PYTORCH, family_of
from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.statistics.fits import fit_scaling
from linear_vit.reports.tables import table
from linear_vit.reports.tables.table import Cell, Line, Table, count, number, word
from linear_vit.reports.targets import Case
from linear_vit.reports.units import duration, exact, rate
from linear_vit.screen import counted

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
_FRESH = (
    "What keeps the matrix unit from the copy's rate: an output larger than 32 MB is memory fresh "
    "from the system at every call, unless the process keeps what is freed (`--keep-memory`). It "
    "was cleared here at {small:.1f} GB/s in small pages and {large:.1f} GB/s in pages of 2 MB, "
    "whoever computes, where a copy moves {copy:.1f} GB/s."
)
# A case's limits by the names that runs have; what they are called here, in the order of the table.
_LIMITS = {
    "fma": "FMA rate",
    "load": "L1 loads",
    "instructions": "instructions",
    "copy": "memory",
    "fresh": "fresh pages",
}
_OWN = "cpu"


@dataclass(frozen=True)
class Product:
    """One product of the forward pass, and how long each limit alone would let it take."""

    case: Case
    flop_done: float  # half of the dense work: the rows that a sign picks
    bounds: dict[str, float]

    @property
    def binding(self) -> str:
        return max(self.bounds, key=self.bounds.__getitem__)

    def share(self, name: str) -> float:
        return float(self.bounds[name] / self.case["median_s"])


def products(run: Runs) -> list[Product]:
    """Of the cases whose own limits the run says, those of the processor among them."""
    kept = {head["file"] for head in run.heads if head["facts"].get("memory")}
    found = []
    for case in run.kernels.to_dict("records"):
        bounds = _bounds(case["info"], fresh=case["file"] not in kept)
        work = (case["info"].get(name) for name in ("least_flop", "least_bytes"))
        if targets.is_on_matrix_unit(case):
            continue  # no FMAs of vectors there: its limits are the matmul and the copy
        if bounds and all(work) and run.limits(case["file"]).get("probes"):
            found.append(Product(case, case["info"]["least_flop"] / 2, bounds))
    return found


def _bounds(info: dict[str, Any], *, fresh: bool) -> dict[str, float]:
    """By limit the least seconds; runs of older versions have them under the names of a table.

    ``fresh``: whether an output's memory is fresh from the system.
    """
    seconds = info.get("limits_s") or {}
    if "fma" not in seconds:
        return info.get("bounds_s") or {}
    found = {title: float(seconds.get(name, 0.0)) for name, title in _LIMITS.items()}
    return found if fresh else found | {_LIMITS["fresh"]: 0.0}


def products_table(run: Runs, found: Sequence[Product]) -> Table:
    """What is done a second, and the share of the time that each limit alone would take."""
    first = found[0].case
    title = f"Limits of the C++ products; {first['machine']}"
    lines = [_product_line(run, product) for product in found]
    return Table(title, lines, _limits(run.limits(first["file"])))


def _product_line(run: Runs, product: Product) -> Line:
    case = product.case
    done = product.flop_done / case["median_s"] / 1e9
    bounds = "\n".join(f"{k}: {duration(v)}" for k, v in product.bounds.items() if v)
    shares = {name: product.share(name) for name in product.bounds}
    return {
        "operation": word(run.words.operation(case["operation"])),
        "N": count(case["N"]),
        "time": table.time_of(case),
        "GFLOP/s done": number(done, rate, exact(done, "GFLOP/s")),
        "limited by": word(product.binding, f"each limit alone allows\n{bounds}"),
        **{k: number(share, "{:.0%}", exact(100 * share, "%")) for k, share in shares.items()},
    }


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
    cases = [case for case in run.kernels.to_dict("records") if case["total_tokens"]]
    at = {_key(case, case["operation"], case["backend"]): case for case in cases}
    curves: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        alike = tuple(case[name] for name in ("operation", "pass", "dtype", "setting"))
        curves.setdefault(alike, []).append(case)
    tables = []
    for (operation, *names, setting), part in curves.items():
        others = dict.fromkeys(c["backend"] for c in part if c["backend"] != _OWN)
        own = sorted((c for c in part if c["backend"] == _OWN), key=lambda c: c["N"])
        if own and others:
            lines = [_against(run, case, list(others), at) for case in own]
            title = ", ".join([run.words.operation(operation).capitalize(), *names])
            if len({key[-1] for key in curves if key[0] == operation}) > 1:
                title += f", {setting}"
            tables.append(Table(title, table.without_empty(lines), table.of_disturbed(own)))
    return tables


def _key(case: Case, operation: str, backend: str) -> tuple[Any, ...]:
    """Of the case of another operation or backend that this one is set against."""
    return operation, backend, case["pass"], case["dtype"], targets.place(case)


def _against(run: Runs, own: Case, others: Sequence[str], at: Mapping[Any, Case]) -> Line:
    line = {
        "N": count(own["N"]),
        f"{_OWN}, time": table.time_of(own),
        f"{_OWN}, GFLOP/s": number(own["tflop_per_s"] * 1e3, rate),
        f"{_OWN}, GB/s": number(own["gb_per_s"], rate),
    }
    for name in others:
        other = at.get(_key(own, own["operation"], name))
        line[f"{name}, GFLOP/s"] = number(other["tflop_per_s"] * 1e3 if other else None, rate)
        line[f"over {name}"] = _over(own, other)
    line[f"over {targets.matmul_of(own)} matmul"] = number(targets.over_matmul(run, own), "{:.2f}×")
    family = family_of(own["operation"])
    if family.incumbent and own["operation"] == family.operations[0]:
        other = at.get(_key(own, family.operations[1], PYTORCH))
        line[f"over {family.incumbent}"] = _over(own, other, "{:.1f}×")
    return line


def _over(own: Case, other: Case | None, form: str = "{:.2f}×") -> Cell:
    quiet = other and not table.disturbance(own) and not table.disturbance(other)
    return number(targets.over(own, other) if other and quiet else None, form)


def time_against_n(run: Runs) -> Table | None:
    """One sequence, its time and the fit."""
    cases = targets.one_sequence(run)
    if not cases:
        return None
    lines = [
        {
            "N": count(case["N"]),
            "time": table.time_of(case),
            "ns per token and head": number(
                1e9 * case["median_s"] / case["N"] / targets.shape(case)["H"], "{:.0f}"
            ),
        }
        for case in cases
    ]
    quiet = [case for case in cases if not table.disturbance(case)]
    fit = fit_scaling([c["N"] for c in quiet], [c["median_s"] for c in quiet])
    note = " ".join(filter(None, [f"Fitted: {fit}.", table.of_disturbed(cases)]))
    return Table("Time against N, one sequence, forward, float32", lines, note)


def document(run: Runs, found: Sequence[targets.Verdict]) -> Iterator[table.Part]:
    """The targets of a CPU, and what is behind each figure, as parts of a Markdown document."""
    yield "# The CPU kernels, measured"
    yield _heading(run)
    yield targets.as_table(found)
    done = products(run)
    unit = [case for case in run.kernels.to_dict("records") if targets.is_on_matrix_unit(case)]
    if done:
        yield WHAT_LIMITS
    if unit and (limits := run.limits(unit[0]["file"])).get("probes"):
        yield _FRESH.format(
            small=limits["fresh_bytes_per_s"] / 1e9,
            large=limits["fresh_large_bytes_per_s"] / 1e9,
            copy=limits["copy_bytes_per_s"] / 1e9,
        )
    behind = [
        *against_others(run),
        time_against_n(run),
        products_table(run, done) if done else None,
    ]
    for one in filter(None, behind):
        yield from table.section(one)


def _heading(run: Runs) -> str:
    head = run.heads[-1]
    facts, file = head["facts"], Path(head["file"]).name
    own = run.kernels[run.kernels["backend"] == _OWN]["implementation"].dropna()
    kernels = facts.get("kernels") or next(iter(own), "C++ kernels")
    kept = " Freed memory stays with the process (`--keep-memory`)." if facts.get("memory") else ""
    return (
        f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, PyTorch {facts['torch']}, "
        f"{kernels}. Medians of interleaved runs in one process; ratios turn by turn. "
        f"From `{file}`.{kept}"
    )
