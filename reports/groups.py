"""The cases that share a picture, what can be drawn of them, and where one curve passes another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from linear_vit.reports import units
from linear_vit.reports.claims import FAMILIES, PYTORCH, Family, family_of
from linear_vit.reports.saved.runs import Runs, Words
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import Crossover, Fit, crossover, fit_scaling
from linear_vit.screen import counted

PASSES = ("forward", "backward", "forward+backward")
# (operation, pass, backend) of one group.
FitTable = dict[tuple[str, str, str], Fit]


@dataclass(frozen=True)
class Group:
    """The cases that share a picture: one machine, one family of operations, one dtype.

    ``sweep`` and ``total_tokens`` as in :class:`reports.saved.runs.Runs`. Where the latter is not 0
    every call has the same number of tokens, so time against N is no complexity, and nothing is
    fitted. ``setting`` is empty where all cases of the machine and family have the same.
    """

    machine: str
    sweep: str
    total_tokens: int
    setting: str
    family: Family
    dtype: str
    frame: pd.DataFrame
    fits: FitTable
    words: Words

    @property
    def steady(self) -> pd.DataFrame:
        """The cases that nothing disturbed: those that anything is concluded from."""
        return self.frame[self.frame["disturbed"].isna()]

    @property
    def operations(self) -> tuple[str, ...]:
        there = set(self.frame["operation"])
        return tuple(op for op in self.family.operations if op in there)

    @property
    def passes(self) -> list[str]:
        found = list(self.frame["pass"].unique())
        return sorted(found, key=lambda p: PASSES.index(p) if p in PASSES else len(PASSES))

    @property
    def where(self) -> str:
        total = f"{counted(self.total_tokens, 'token')} a call, " if self.total_tokens else ""
        sweep = f"{self.sweep} sweep, " if self.sweep else ""
        setting = f"{self.setting}, " if self.setting else ""
        return f"{self.dtype}, {total}{setting}{sweep}{self.machine}"

    @property
    def names(self) -> str:
        """Its operations in words."""
        return " and ".join(self.words.operation(name) for name in self.operations)


@dataclass(frozen=True)
class Picture:
    """What a figure shows: its numbers, its words, and how the y axis is marked.

    ``title``, ``caption`` and ``unit`` may name the group's operations: ``{names}``, and where one
    is set against the other ``{first}``, ``{second}`` and ``{incumbent}``.
    """

    name: str
    title: str
    caption: str
    unit: str
    format_y: Callable[[float], str]

    def words(self, group: Group) -> tuple[str, str, str]:
        """Title, caption and the name of the y axis."""
        names = {"names": group.names, "incumbent": group.family.incumbent, "base": PYTORCH}
        operations = map(group.words.operation, group.family.operations)
        names |= dict(zip(("first", "second"), operations, strict=False))
        title, caption, unit = (
            text.format(**names) for text in (self.title, self.caption, self.unit)
        )
        return units.capital(title), caption, unit

    @property
    def is_ratio(self) -> bool:
        return self.format_y is units.factor


TIME = Picture(
    "time",
    "{names}: time per call",
    "Lower is better. A straight line is a power of N; the legend gives its exponent with a 95 % "
    "interval where the data supports one. Bars are the quartiles of the rounds.",
    "time per call",
    units.seconds,
)
MEMORY = Picture(
    "memory",
    "{names}: peak memory beyond inputs and outputs",
    "Lower is better. What an implementation needs for itself; a point is missing where it needs "
    "nothing that PyTorch's allocator sees.",
    "peak memory beyond inputs and outputs",
    units.mebibytes,
)
# Of the first operation of a family over the second, as PyTorch does that.
OVER_INCUMBENT = Picture(
    "speedup-over-{short}",
    "Speed-up of {first} over {second} ({base}: {incumbent})",
    "Above the line at 1× {first} is the faster one; a curve passes it at the crossover length.",
    "speed-up over {base}'s {second}",
    units.factor,
)
OVER_TORCH = Picture(
    f"speedup-over-{PYTORCH}",
    "{names}: speed-up over the {base} backend",
    "Above the line at 1× a backend is faster than what a good PyTorch user writes today.",
    "speed-up over the {base} backend",
    units.factor,
)


def groups(runs: Runs) -> list[Group]:
    """Split the kernels' cases by machine, family and dtype, with a fit for every curve.

    Families stand in their order; of each the newest measured first.
    """
    frame = runs.kernels
    if frame.empty:
        return []
    family = frame["operation"].map(lambda operation: family_of(operation).name)
    alike = ["machine", "sweep", "total_tokens", family, "dtype"]
    found = []
    for (machine, sweep, total, _, dtype), part in frame.groupby(alike, sort=False):
        several = part["setting"].nunique() > 1
        for setting, cases in part.groupby("setting", sort=False):
            where = (str(machine), str(sweep), int(str(total)), str(setting) if several else "")
            of = family_of(str(cases["operation"].iloc[0]))
            fits = _fits(cases[cases["disturbed"].isna()]) if not total else {}
            found.append(Group(*where, of, str(dtype), cases, fits, runs.words))
    order = [family.name for family in FAMILIES]

    def place(group: Group) -> tuple[int, bool]:
        """Families in their order; what stands apart comes after the rest of its family."""
        name = group.family.name
        return order.index(name) if name in order else len(order), bool(group.sweep)

    found.sort(key=lambda group: str(group.frame["datetime"].max()), reverse=True)
    return sorted(found, key=place)


def _fits(frame: pd.DataFrame) -> FitTable:
    return {
        (str(op), str(mode), str(backend)): fit_scaling(curve["N"], curve["median_s"])
        for (op, mode, backend), curve in frame.groupby(["operation", "pass", "backend"])
    }


def pictures(group: Group) -> list[tuple[Picture, pd.DataFrame]]:
    """The pictures of a group that have something to show, with the numbers drawn."""
    ratios = [OVER_INCUMBENT, OVER_TORCH] if group.family.incumbent else [OVER_TORCH]
    wanted = ratios if group.total_tokens else [TIME, MEMORY, *ratios]
    data = [(picture, picture_data(group, picture)) for picture in wanted]
    return [(picture, frame) for picture, frame in data if not frame.empty]


def picture_data(group: Group, picture: Picture) -> pd.DataFrame:
    """The rows of a group with the drawn quantity as ``value`` (seconds, MiB, or a ratio)."""
    frame = group.frame.copy()
    if picture is TIME:
        frame["value"] = frame["median_s"]
    elif picture is MEMORY:
        frame["value"] = pd.to_numeric(frame["peak_memory_bytes"]) / 2**20
        frame = frame[frame["value"] > 0]
    else:
        base = frame[frame["backend"] == PYTORCH]
        if picture is OVER_INCUMBENT:
            first, second = group.family.operations
            base = base[base["operation"] == second]
            frame = frame[frame["operation"] == first]
            key = ["pass", "N"]
        else:
            frame = frame[frame["backend"] != PYTORCH]
            key = ["operation", "pass", "N"]
        frame = turns.against(frame, base, key)
        frame["value"] = frame["speedup"]
    return frame.reset_index(drop=True)


def file_name(group: Group, picture: Picture) -> str:
    """What a picture of a group is called, without the machine."""
    name = picture.name.format(short=group.family.operations[-1].partition("_")[0])
    total = f"-{group.total_tokens}-tokens" if group.total_tokens else ""
    more = "".join(f"-{text}" for text in (group.setting, group.sweep) if text)
    return f"{group.family.name}-{name}-{group.dtype}{total}{more}"


def crossovers(found: Sequence[Group]) -> Iterator[tuple[Group, str, str, Crossover]]:
    """From which N each backend of a family's first operation beats PyTorch's second one."""
    for group in found:
        if not group.family.incumbent:
            continue
        first, second = group.family.operations
        frame = group.steady
        for mode in group.passes:
            here = frame[frame["pass"] == mode]
            incumbent = here[(here["operation"] == second) & (here["backend"] == PYTORCH)]
            challenger = here[here["operation"] == first]
            # A peer's crossover would be of another function.
            challenger = challenger[challenger["other_function"].isna()]
            for backend, curve in challenger.groupby("backend", sort=False):
                both = incumbent.merge(curve, on="N", suffixes=("_second", "_first"))
                error = _ratio_error(both, group, mode, str(backend))
                if len(both) < 2 or not np.isfinite(error).all():  # of rounds that are not known
                    continue
                answer = crossover(
                    both["N"], both["median_s_second"], both["median_s_first"], error
                )
                yield group, mode, str(backend), answer


def _ratio_error(both: pd.DataFrame, group: Group, mode: str, backend: str) -> np.ndarray:
    """Standard error of the ratio of two medians, per length.

    The larger of two estimates: that of the medians within their own rounds, and the scatter of the
    two curves about their fits, which holds the drift from case to case that the rounds of one case
    don't see.
    """
    variance = np.zeros(len(both))
    scatter = 0.0
    for side, operation, name in zip(
        ("first", "second"), group.family.operations, (backend, PYTORCH), strict=True
    ):
        variance += both[f"error_{side}"].to_numpy(float) ** 2
        fit: Fit | None = group.fits.get((operation, mode, name))
        if fit is not None and fit.reason is None:
            scatter += fit.residual**2 * fit.lengths / (fit.lengths - 3)
    return np.sqrt(np.maximum(variance, scatter))
