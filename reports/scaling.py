"""``python -m reports scaling``: complexity plots, exponents and crossovers from saved runs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from linear_vit.reports import plots
from linear_vit.reports.plots import (
    FAMILIES,
    MEMORY,
    OVER_SOFTMAX,
    OVER_TORCH,
    TIME,
    FitTable,
    Picture,
)
from linear_vit.reports.saved.runs import NoRuns, Runs
from linear_vit.reports.statistics.fits import Crossover, Fit, crossover, fit_scaling

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Group:
    """The cases that share a picture: one machine, one family of operations, one dtype.

    ``total_tokens`` as in :class:`reports.runs.Runs`. Where it is not 0 every call has the same
    number of tokens, so time against N is no complexity, and nothing is fitted.
    """

    machine: str
    total_tokens: int
    family: str
    dtype: str
    frame: pd.DataFrame
    fits: FitTable

    @property
    def operations(self) -> tuple[str, ...]:
        members = FAMILIES.get(self.family, (self.family,))
        return tuple(op for op in members if (self.frame["operation"] == op).any())

    @property
    def passes(self) -> list[str]:
        found = list(self.frame["pass"].unique())
        return sorted(found, key=lambda p: PASSES.index(p) if p in PASSES else len(PASSES))

    @property
    def where(self) -> str:
        total = f"{self.total_tokens:,} tokens a call, " if self.total_tokens else ""
        return f"{self.dtype}, {total}{self.machine}"


def groups(runs: Runs, operations: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Group]:
    """Split the kernels' cases by machine, family and dtype, with a fit for every curve.

    Raises:
        NoRuns: nothing is left of the operations and dtypes asked for; the message lists those
        there are.
    """
    frame = runs.kernels
    for column, asked in (("operation", operations), ("dtype", dtypes)):
        there = sorted(frame[column].unique()) if not frame.empty else []
        missing = [name for name in asked if name not in there]
        if missing:
            raise NoRuns(
                f"no saved case has {column} {missing[0]!r}; there are {', '.join(there) or 'none'}"
            )
        if asked:
            frame = frame[frame[column].isin(asked)]
    if frame.empty:
        return []
    family = {op: name for name, members in FAMILIES.items() for op in members}
    keys = frame["operation"].map(lambda op: family.get(op, op))
    found = []
    for (machine, total, name, dtype), part in frame.groupby(
        [frame["machine"], frame["total_tokens"], keys, frame["dtype"]], sort=False
    ):
        curves = part.groupby(["operation", "pass", "backend"]) if total == 0 else ()
        fits = {
            (str(op), str(mode), str(backend)): fit_scaling(curve["N"], curve["median_s"])
            for (op, mode, backend), curve in curves
        }
        found.append(Group(str(machine), int(str(total)), str(name), str(dtype), part, fits))
    order = list(FAMILIES)
    found.sort(key=lambda g: order.index(g.family) if g.family in order else len(order))
    return found


def pictures(group: Group) -> list[tuple[Picture, pd.DataFrame]]:
    """The pictures of a group that have something to show, with the numbers drawn."""
    wanted = [TIME, MEMORY, OVER_TORCH]
    if group.family == "attention":
        wanted.insert(2, OVER_SOFTMAX)
    if group.total_tokens:
        wanted = [picture for picture in wanted if picture in (OVER_SOFTMAX, OVER_TORCH)]
    data = [(picture, plots.picture_data(group.frame, picture)) for picture in wanted]
    return [(picture, frame) for picture, frame in data if not frame.empty]


def draw(group: Group, picture: Picture, frame: pd.DataFrame, passes: list[str]) -> Figure:
    present = [mode for mode in passes if mode in set(frame["pass"])]
    return plots.draw(frame, picture, group.operations, present, group.where, group.fits)


def fit_table(found: Sequence[Group]) -> pd.DataFrame:
    """A row per curve: the exponent with its interval, or why there is none."""
    rows = [
        {
            "machine": group.machine,
            "operation": operation,
            "pass": mode,
            "dtype": group.dtype,
            "backend": backend,
            "exponent": None if fit.reason else fit.exponent,
            "low": None if fit.reason else fit.low,
            "high": None if fit.reason else fit.high,
            "floor_s": None if fit.reason else fit.floor,
            "residual": fit.residual,
            "local_slope": fit.local_slope,
            "lengths": fit.lengths,
            "reason": fit.reason or "",
        }
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    return pd.DataFrame(rows)


def crossover_table(found: Sequence[Group]) -> pd.DataFrame:
    """From which N each backend's linear attention beats torch's softmax attention (SDPA)."""
    rows = []
    for group, mode, backend, answer in crossovers(found):
        rows.append(
            {
                "machine": group.machine,
                "pass": mode,
                "dtype": group.dtype,
                "total_tokens": group.total_tokens,
                "backend": backend,
                "estimate": answer.estimate,
                "low": answer.low,
                "high": answer.high,
                "text": answer.text,
            }
        )
    return pd.DataFrame(rows)


def crossovers(found: Sequence[Group]) -> Iterator[tuple[Group, str, str, Crossover]]:
    for group in found:
        if group.family != "attention":
            continue
        frame = group.frame
        for mode in group.passes:
            here = frame[frame["pass"] == mode]
            softmax = here[
                (here["operation"] == "softmax_attention") & (here["backend"] == "torch")
            ]
            linear = here[here["operation"] == "linear_attention"]
            if "other_function" in linear:  # a peer's; its crossover would be of another function
                linear = linear[linear["other_function"].isna()]
            for backend, curve in linear.groupby("backend", sort=False):
                both = softmax.merge(curve, on="N", suffixes=("_softmax", "_linear"))
                if len(both) < 2:
                    continue
                error = _ratio_error(both, group.fits, mode, str(backend))
                answer = crossover(
                    both["N"], both["median_s_softmax"], both["median_s_linear"], error
                )
                yield group, mode, str(backend), answer


def _ratio_error(both: pd.DataFrame, fits: FitTable, mode: str, backend: str) -> np.ndarray:
    """Standard error of the ratio of two medians, per length.

    The larger of two estimates: that of the medians within their own rounds, and the scatter of the
    two curves about their fits, which holds the drift from case to case that the rounds of one case
    don't see.
    """
    variance = np.zeros(len(both))
    scatter = 0.0
    for side, operation, name in (
        ("softmax", "softmax_attention", "torch"),
        ("linear", "linear_attention", backend),
    ):
        variance += both[f"error_{side}"].to_numpy() ** 2
        fit: Fit | None = fits.get((operation, mode, name))
        if fit is not None and fit.reason is None:
            scatter += fit.residual**2 * fit.lengths / (fit.lengths - 3)
    return np.sqrt(np.maximum(variance, scatter))


def write(found: Sequence[Group], out: Path) -> list[Path]:
    """Write every picture as PNG, SVG and CSV, and the two tables as CSV; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    several = len({group.machine for group in found}) > 1
    written = []
    for group in found:
        prefix = f"{_slug(group.machine)}-" if several else ""
        for picture, frame in pictures(group):
            total = f"-{group.total_tokens}-tokens" if group.total_tokens else ""
            stem = out / f"{prefix}{group.family}-{picture.name}-{group.dtype}{total}"
            written += plots.save(draw(group, picture, frame, group.passes), stem)
            table = stem.with_name(stem.name + ".csv")
            frame.filter(regex="^(?!datetime|seconds|turns)").to_csv(table, index=False)
            written.append(table)
    for name, table_frame in (
        ("exponents.csv", fit_table(found)),
        ("crossovers.csv", crossover_table(found)),
    ):
        table_frame.to_csv(out / name, index=False)
        written.append(out / name)
    return written


def summary(found: Sequence[Group]) -> str:
    """Exponents and crossovers as text."""
    lines = []
    for group in found:
        lines += [f"{group.family}, {group.where}"]
        for (operation, mode, backend), fit in group.fits.items():
            lines.append(f"  {plots.label(operation)}, {mode}, {backend}: time ~ {fit}")
        for _, mode, backend, answer in crossovers([group]):
            lines.append(
                f"  crossover of linear attention ({backend}) with SDPA, {mode}: {answer.text}"
            )
    return "\n".join(lines)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
