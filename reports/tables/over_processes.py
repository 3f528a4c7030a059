"""A sequence over several processes: measured beside the model, and the model for many GPUs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.statistics import exchange, turns
from linear_vit.reports.statistics.exchange import Gpus, Kernels
from linear_vit.reports.statistics.fits import Crossover, overtaken
from linear_vit.reports.tables import table
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, number, word
from linear_vit.reports.units import duration, exact, mebibytes
from linear_vit.screen import counted

LINEAR, SOFTMAX = "linear", "softmax"
FORWARD = "forward"
Case = Mapping[Any, Any]  # a row of Runs.over
Series = tuple[str, int]  # which attention, over how many processes
DEVICES = (2, 8, 64, 512, 1024)
_PATCH = 16
_MEASURED = (
    "Each process has one thread. Linear attention exchanges a state, softmax attention gathers k "
    "and v. Model: the time of one process at its share of the tokens, plus an all-reduce of the "
    "bytes sent at the latency and rate that an all-reduce had by itself in these processes. A "
    "process alone runs the fused operation, several its two halves, which the model leaves out."
)
_ASSUMED = (
    "Nothing here was measured. Assumed: one image, 6 heads of 64, bfloat16; kernels at the rate "
    "of a copy, 0.9 × 4.8 TB/s (H200), launches left out; nodes of 8 GPUs; an all-reduce of S and "
    "z (float32) takes the latency by which NCCL chooses its algorithms (tree, LL128: 14 µs, and "
    "twice 1.25 µs a GPU of a node and 8.5 µs a level of the tree of nodes) and its bytes twice at "
    "450 GB/s in a node, 50 GB/s between nodes. Kernels slower than a copy make it pay earlier. "
    "k and v: what each GPU would send to gather them instead. Half efficiency: where the exchange "
    "takes as long as the kernels. Sides are of square images in patches of 16 pixels."
)


@dataclass(frozen=True)
class Over:
    """Cases of a pass, dtype, file and machine, which took turns at each length."""

    mode: str
    dtype: str
    machine: str
    at: dict[Series, dict[int, Case]]

    @property
    def where(self) -> str:
        return f"{self.mode.replace('+', ' + ')}, {self.dtype}; {self.machine}"

    @property
    def lengths(self) -> list[int]:
        return sorted({tokens for cases in self.at.values() for tokens in cases})

    def quiet(self, series: Series, tokens: int) -> Case | None:
        return table.quiet(self.at.get(series, {}), tokens)

    @property
    def kernels(self) -> Kernels | None:
        """Of linear attention on one process; None of fewer than two lengths."""
        found = {n: c["median_s"] for n in self.lengths if (c := self.quiet((LINEAR, 1), n))}
        return exchange.fitted(list(found), list(found.values())) if len(found) > 1 else None

    def modelled(self, processes: int, tokens: int) -> float | None:
        """Seconds of linear attention, from one process and from the all-reduce by itself."""
        alone, kernels = self.quiet((LINEAR, 1), tokens), self.kernels
        case = self.quiet((LINEAR, processes), tokens)
        if alone is None or kernels is None or case is None:
            return None
        share = kernels(tokens / processes) / kernels(tokens)
        return float(alone["median_s"]) * share + _exchange(case)

    def pays(self) -> Crossover | None:
        """The length from which on a second process is faster; None of unknown errors."""
        found = {}
        for n in self.lengths:
            one, two = self.quiet((LINEAR, 1), n), self.quiet((LINEAR, 2), n)
            if one is not None and two is not None:
                found[n] = turns.speedup(two, one)
        return overtaken(found)

    def pays_by_model(self) -> float | None:
        cases = self.at.get((LINEAR, 2), {}).values()
        if self.kernels is None or not cases:
            return None
        seconds = float(np.median([_exchange(case) for case in cases]))
        return exchange.pays_from(self.kernels, seconds, 2)


def _exchange(case: Case) -> float:
    latency, rate = case["all_reduce_latency_s"], case["all_reduce_bytes_per_s"]
    return float(case["exchanges"] * latency + case["sent_bytes"] / rate)


def groups(runs: Runs) -> list[Over]:
    found: dict[tuple[Any, ...], Over] = {}
    for row in runs.over.to_dict("records"):
        of = (row["pass"], row["dtype"], row["machine"])
        over = found.setdefault((*of, row["file"]), Over(*of, {}))
        series = (row["backend"], int(row["processes"]))
        over.at.setdefault(series, {})[int(row["N"])] = row
    return list(found.values())


def name_of(series: Series) -> str:
    attention, count = series
    return f"{attention}, {counted(count, 'process')}"


def as_table(over: Over) -> Table:
    """A line a length: times, the model beside them, and the bytes that a process sends."""
    lines = []
    for n in over.lengths:
        line: Line = {"N": table.count(n)}
        for series, cases in over.at.items():
            line[name_of(series)] = table.time_of(cases[n]) if n in cases else Cell(NOTHING)
        modelled, two = over.modelled(2, n), over.quiet((LINEAR, 2), n)
        line["model, 2"] = number(modelled, duration)
        ratio = two["median_s"] / modelled if two is not None and modelled else None
        line["measured over model"] = number(ratio, "{:.2f}")
        for attention in (LINEAR, SOFTMAX):
            case = over.at.get((attention, 2), {}).get(n)
            sent = None if case is None else case["sent_bytes"] / 2**20
            line[f"{attention} sends"] = number(sent, mebibytes)
        lines.append(line)
    every = [case for cases in over.at.values() for case in cases.values()]
    note = " ".join(filter(None, [_MEASURED, table.of_disturbed(every)]))
    return Table(f"Attention over processes; {over.where}", table.without_empty(lines), note)


def paying(found: list[Over]) -> Table | None:
    """From which length on a second process pays: as measured, and by the model."""
    lines: list[Line] = []
    for over in found:
        if (answer := over.pays()) is not None:
            lines.append(
                {
                    "Pass": word(over.mode),
                    "Measured (95 % interval)": Cell(answer.text, answer.estimate),
                    "Model": number(over.pays_by_model(), "{:,.0f}"),
                    "Where": word(f"{over.dtype}, {over.machine}"),
                }
            )
    title = "From which N on a second process makes linear attention faster"
    return Table(title, lines, words=("Measured (95 % interval)",)) if lines else None


def on_gpus(gpus: Gpus | None = None) -> Table:
    """The model for many GPUs."""
    lines = list(_on_gpus(gpus or Gpus()))
    return Table("Linear attention over GPUs, by the model", lines, _ASSUMED)


def _on_gpus(gpus: Gpus) -> Iterator[Line]:
    for mode, backward in ((FORWARD, False), ("forward + backward", True)):
        kernels = gpus.kernels(backward=backward)
        for devices in DEVICES:
            seconds = gpus.exchange(devices, backward=backward)
            pays = exchange.pays_from(kernels, seconds, devices)
            instead = gpus.keys_and_values(pays, devices, backward=backward) / 2**20
            yield {
                "Pass": word(mode),
                "GPUs": table.count(devices),
                "Exchange": number(seconds, duration),
                "Faster than one from N": _tokens(pays),
                "k and v of that N": number(instead, mebibytes),
                "Half efficiency from N": _tokens(seconds * devices / kernels.c),
            }


def _tokens(count: float) -> Cell:
    """A number of tokens, with the side of the square image that has them."""
    unit, size = ("M", 1e6) if count >= 1e6 else ("k", 1e3)
    side = _PATCH * count**0.5
    return Cell(f"{count / size:.3g} {unit} ({side:,.0f} px)", count, exact(count, "tokens"))
