"""Exponents, and where curves cross, as tables."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from linear_vit.reports.groups import Group, crossovers
from linear_vit.reports.statistics.fits import Fit
from linear_vit.reports.tables.table import Cell, Line, Table, number, word
from linear_vit.reports.units import exact
from linear_vit.screen import counted

_RESIDUAL = (
    "Residual: rms of log time about the fit. Last slope: the local exponent between the two "
    "longest lengths, which says whether the growth has settled."
)


def crossings(found: Sequence[Group]) -> list[Table]:
    """From which N each backend overtakes the incumbent; a table per family that asks for it."""
    lines: dict[str, list[Line]] = {}
    for group, mode, backend, answer in crossovers(found):
        first = group.family.operations[0]
        heading = f"Crossover: from which N {group.words.operation(first)} beats "
        line = _named(group, first, mode, backend)
        # Its facet stays with the row, though the heading says what it is.
        line["pass"] = replace(line["pass"], facets=line.pop("operation").facets)
        cell = Cell(answer.text, answer.estimate)
        line |= {"crossover (95 % interval)": cell, "where": _where(group)}
        lines.setdefault(heading + group.family.incumbent, []).append(line)
    return [_table(heading, of, "") for heading, of in lines.items()]


def exponents(found: Sequence[Group]) -> Table | None:
    """A row per fitted curve; None without one."""
    lines = [
        _named(group, operation, mode, backend)
        | {"exponent p": _exponent(fit)}
        | {"residual": number(fit.residual, "{:.0%}", exact(100 * fit.residual, "%"))}
        | {"last slope": number(fit.local_slope, "{:.2f}")}
        | {"where": _where(group)}
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    return _table("Fitted exponents", lines, _RESIDUAL) if lines else None


def fit_frame(found: Sequence[Group]) -> pd.DataFrame:
    """A row per curve: the exponent with its interval, or why there is none."""
    rows = [
        {"machine": group.machine, "operation": operation, "pass": mode, "dtype": group.dtype}
        | {"backend": backend, "exponent": fit.exponent, "low": fit.low, "high": fit.high}
        | {"floor_s": fit.floor, "residual": fit.residual, "local_slope": fit.local_slope}
        | {"lengths": fit.lengths, "reason": fit.reason or ""}
        | {"sweep": group.sweep, "setting": group.setting}
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    frame = pd.DataFrame(rows)
    if rows:
        frame.loc[frame["reason"] != "", ["exponent", "low", "high", "floor_s"]] = float("nan")
    return frame


def crossover_frame(found: Sequence[Group]) -> pd.DataFrame:
    """A row per backend that is set against an incumbent: the length from which on it is faster."""
    rows = [
        {"machine": group.machine, "pass": mode, "dtype": group.dtype}
        | {"total_tokens": group.total_tokens, "backend": backend, "estimate": answer.estimate}
        | {"low": answer.low, "high": answer.high, "text": answer.text}
        | {"sweep": group.sweep, "setting": group.setting}
        for group, mode, backend, answer in crossovers(found)
    ]
    return pd.DataFrame(rows)


def _named(group: Group, operation: str, mode: str, backend: str) -> Line:
    return {
        "operation": word(group.words.operation(operation), operation=operation),
        "pass": word(mode),
        "dtype": word(group.dtype, dtype=group.dtype),
        "backend": word(backend, backend=backend),
    }


def _where(group: Group) -> Cell:
    return word(group.where.partition(", ")[2])


def _table(title: str, lines: list[Line], note: str) -> Table:
    """Where all rows are of one machine, the title says it; else each row does."""
    places = {line["where"].text for line in lines}
    if len(places) == 1:
        title += f"; {places.pop()}"
        for line in lines:
            del line["where"]
    return Table(title, lines, note, words=("exponent p", "crossover (95 % interval)"))


def _exponent(fit: Fit) -> Cell:
    if math.isnan(fit.residual):  # too few lengths to fit anything
        return Cell(str(fit.reason))
    if fit.reason:
        return Cell(f"no fit: {fit.reason}")
    tip = f"a = {exact(fit.floor * 1e6, 'µs')}, b = {fit.scale:.3g} s, "
    tip += counted(fit.lengths, "length")
    text = f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
    return Cell(text, fit.exponent, tip)
