"""Whole models of a saved run: what each attention makes of a model, from where, and why."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import Crossover, overtaken
from linear_vit.reports.tables import table
from linear_vit.reports.tables.steps import DEFAULT
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, number, word
from linear_vit.reports.units import exact, mebibytes

ORIGINAL = "original"
ACCURACY = (
    "Weights are random here: these are times and memory. A model whose attention was swapped has "
    "lost its accuracy, which has to be trained back."
)
_WHY = (
    "Attention: its share of the time, measured in place with hooks (reshapes and their own cost "
    "included), and in brackets what its kernels take alone, on inputs of these shapes. Expected: "
    "the original's time less its kernels' and plus these, which leaves out what they do to each "
    "other's caches. Memory: at the worst moment of a call, weights apart."
)
Case = Mapping[Any, Any]  # a row of Runs.models


@dataclass(frozen=True)
class Swapped:
    """The cases of a model, pass, batch, dtype, file and machine: by attention and backend, and
    by resolution."""

    model: str
    mode: str
    batch: int
    dtype: str
    machine: str
    at: dict[str, dict[int, Case]]

    @property
    def where(self) -> str:
        return f"{self.model}, {self.mode}, batch {self.batch}, {self.dtype}; {self.machine}"

    @property
    def resolutions(self) -> list[int]:
        return sorted({resolution for cases in self.at.values() for resolution in cases})

    @property
    def swaps(self) -> list[str]:
        """What is set beside the original."""
        return [name for name in self.at if name != ORIGINAL]

    def quiet(self, name: str, resolution: int) -> Case | None:
        """A case that others may be compared with: one that nothing disturbed."""
        return table.quiet(self.at.get(name, {}), resolution)

    def over(self, name: str, resolution: int) -> tuple[float, float] | None:
        """log of the original's time over this one's, turn by turn, and its standard error."""
        own, base = self.quiet(name, resolution), self.quiet(ORIGINAL, resolution)
        return turns.speedup(own, base) if own and base else None

    def pays(self, name: str) -> Crossover | None:
        """The resolution from which on it is faster than the original; None of unknown errors."""
        found = {r: over for r in self.resolutions if (over := self.over(name, r))}
        return overtaken(found, of="side")

    def expected(self, name: str, resolution: int) -> float | None:
        """The speed-up that the kernels' own times make of the original's."""
        own, base = self.quiet(name, resolution), self.quiet(ORIGINAL, resolution)
        if own is None or base is None:
            return None
        alone = _alone(own), _alone(base)
        if alone[0] is None or alone[1] is None:
            return None
        rest = float(base["median_s"]) - alone[1]
        return float(base["median_s"]) / (rest + alone[0]) if rest > 0 else None


def groups(runs: Runs) -> list[Swapped]:
    """The whole models of these runs; inference before a training step."""
    found: dict[tuple[Any, ...], Swapped] = {}
    for row in runs.models.to_dict("records"):
        name = row["attention"]
        if name != ORIGINAL and row["backend"] != DEFAULT:
            name = f"{name} ({row['backend']})"
        of = (row["whole_model"], row["pass"], int(row["batch"]), row["dtype"], row["machine"])
        swapped = found.setdefault((*of, row["file"]), Swapped(*of, {}))
        swapped.at.setdefault(name, {})[int(row["resolution"])] = row
    return list(found.values())


def paying(found: list[Swapped]) -> Table | None:
    """From which resolution on each attention is faster than the original; None without any."""
    lines: list[Line] = []
    for swapped in found:
        for name in swapped.swaps:
            answer = swapped.pays(name)
            if answer is not None:
                line = {"Model": word(swapped.model), "Pass": word(swapped.mode)}
                line |= {"Attention": word(name)}
                line |= {"Faster from (95 % interval)": Cell(answer.text, answer.estimate)}
                lines.append(line | {"Where": word(f"{swapped.dtype}, {swapped.machine}")})
    if not lines:
        return None
    title = "From which side of an image, in pixels, each attention pays"
    return Table(title, lines, ACCURACY, words=("Faster from (95 % interval)",))


def as_table(swapped: Swapped) -> Table:
    """A row per resolution and attention: time, memory, and what explains them."""
    lines = [
        _line(swapped, resolution, name)
        for resolution in swapped.resolutions
        for name in swapped.at
        if resolution in swapped.at[name]
    ]
    every = [case for cases in swapped.at.values() for case in cases.values()]
    note = " ".join(filter(None, [_WHY, table.of_disturbed(every)]))
    return Table(f"Whole model; {swapped.where}", table.without_empty(lines), note)


def _line(swapped: Swapped, resolution: int, name: str) -> Line:
    case = swapped.at[name][resolution]
    peak = known(case["peak_memory_bytes"])
    rate = f"{exact(1e3 * case['median_s'], 'ms')}, {exact(case['images_per_s'])} images/s"
    return {
        "Side": table.count(resolution),
        "Tokens": number(known(case["N"]), "{:,.0f}", ""),
        "Attention": word(name),
        "Time": table.time_of(case, rate),
        "Over the original": _over(swapped, name, resolution),
        "Expected": number(
            swapped.expected(name, resolution) if name != ORIGINAL else None, "{:.2f}×"
        ),
        "Share of attention": _share(case),
        "Memory": number(None if peak is None else peak / 2**20, mebibytes),
        "Parameters": number(known(case["parameters"]), "{:,.0f}", ""),
    }


def _over(swapped: Swapped, name: str, resolution: int) -> Cell:
    over = swapped.over(name, resolution) if name != ORIGINAL else None
    if over is None:
        return Cell(NOTHING)
    ratio, low, high = turns.interval(*over)
    tip = f"{exact(ratio)}×, {low:.3f} to {high:.3f} by turns"
    return number(ratio, "{:.2f}×", tip, "best" if low > 1 else "")


def _share(case: Case) -> Cell:
    measured, alone = known(case["attention_s"]), _alone(case)
    if measured is None:
        return Cell(NOTHING)
    share, tip = measured / case["median_s"], f"{exact(1e3 * measured, 'ms')} in place"
    if alone is None:
        why = case["info"].get("attention_alone_disturbed")
        return number(share, "{:.0%}", f"{tip}; its kernels alone: {why or 'not known'}")
    tip += f", {exact(1e3 * alone, 'ms')} of kernels alone"
    return replace(
        number(share, "{:.0%}", tip), text=f"{share:.0%} ({alone / case['median_s']:.0%})"
    )


def _alone(case: Case) -> float | None:
    """Seconds of a model's attention kernels alone, where nothing disturbed them."""
    disturbed = case["info"].get("attention_alone_disturbed")
    return None if disturbed else known(case["attention_alone_s"])


def known(value: Any) -> float | None:
    """A figure of a row; None where a run did not have it."""
    return None if value is None or math.isnan(value) else float(value)


def rows(found: list[Swapped]) -> Iterator[dict[str, Any]]:
    """A row per case, as it is written to CSV."""
    columns = ("backend", "resolution", "N", "median_s", "images_per_s", "peak_memory_bytes")
    more = ("attention_s", "attention_alone_s", "parameters")
    for swapped in found:
        of = {"model": swapped.model, "pass": swapped.mode, "batch": swapped.batch}
        for name, cases in swapped.at.items():
            for resolution, case in cases.items():
                over = swapped.over(name, resolution) if name != ORIGINAL else None
                speedup = turns.interval(*over) if over else (None, None, None)
                yield {
                    **of,
                    "attention": case["attention"],
                    **{column: case[column] for column in (*columns, *more)},
                    **dict(zip(("speedup", "low", "high"), speedup, strict=True)),
                    "expected_speedup": swapped.expected(name, resolution),
                    "dtype": swapped.dtype,
                    "machine": swapped.machine,
                }


def to_csv(found: list[Swapped]) -> str:
    """One line per case."""
    return str(pd.DataFrame(list(rows(found))).to_csv(index=False))
