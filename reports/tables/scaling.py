"""Exponents, and where curves cross, as tables."""

import math
from collections.abc import Sequence

import pandas as pd

from linear_vit.reports.groups import Group, crossovers
from linear_vit.reports.statistics.fits import Fit
from linear_vit.reports.tables import table
from linear_vit.reports.tables.table import NOTHING, Cell, Facets, Line, Table, number, word
from linear_vit.reports.units import exact

_RESIDUAL = (
    "Residual: rms of log time about the fit. Last slope: the local exponent between the two "
    "longest lengths, which says whether the growth has settled."
)


def crossings(found: Sequence[Group]) -> list[Table]:
    """From which N each backend overtakes the incumbent; a table per family that asks for it."""
    lines: dict[str, list[tuple[Line, Facets]]] = {}
    for group, mode, backend, answer in crossovers(found):
        first = group.family.operations[0]
        heading = f"Crossover: from which N {group.words.operation(first)} beats "
        crossing = {"crossover (95 % interval)": number(answer.text, answer.estimate)}
        line = _line(group, first, mode, backend, crossing)
        del line[0]["operation"]
        lines.setdefault(heading + group.family.incumbent, []).append(line)
    return [_table(heading, of, "") for heading, of in lines.items()]


def exponents(found: Sequence[Group]) -> Table | None:
    """A row per fitted curve; None without one."""
    names = ("exponent p", "residual", "last slope")
    lines = [
        _line(group, operation, mode, backend, dict(zip(names, _fit_cells(fit), strict=True)))
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    return _table("Fitted exponents", lines, _RESIDUAL) if lines else None


def fit_frame(found: Sequence[Group]) -> pd.DataFrame:
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
            "sweep": group.sweep,
            "setting": group.setting,
        }
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    return pd.DataFrame(rows)


def crossover_frame(found: Sequence[Group]) -> pd.DataFrame:
    """A row per backend that is set against an incumbent: the length from which on it is faster."""
    rows = [
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
            "sweep": group.sweep,
            "setting": group.setting,
        }
        for group, mode, backend, answer in crossovers(found)
    ]
    return pd.DataFrame(rows)


def _line(
    group: Group, operation: str, mode: str, backend: str, measured: Line
) -> tuple[Line, Facets]:
    names = {"operation": group.words.operation(operation), "pass": mode}
    names |= {"dtype": group.dtype, "backend": backend}
    where = word(group.where.partition(", ")[2])
    line = {name: word(text) for name, text in names.items()} | measured | {"where": where}
    return line, {"operation": operation, "backend": backend, "dtype": group.dtype}


def _table(title: str, found: Sequence[tuple[Line, Facets]], note: str) -> Table:
    """Where all rows are of one machine, the title says it; else each row does."""
    lines, facets = zip(*found, strict=True)
    places = {line["where"].text for line in lines}
    if len(places) == 1:
        title += f"; {places.pop()}"
        lines = tuple({k: cell for k, cell in line.items() if k != "where"} for line in lines)
    left = [name for name in lines[0] if name not in ("residual", "last slope")]
    return table.of_lines(title, lines, note, rows=facets, words=left)


def _fit_cells(fit: Fit) -> list[Cell]:
    if math.isnan(fit.residual):  # too few lengths to fit anything
        return [Cell(str(fit.reason)), Cell(NOTHING), Cell(NOTHING)]
    scatter = number(f"{fit.residual:.0%}", fit.residual, exact(100 * fit.residual, "%"))
    slope = number(f"{fit.local_slope:.2f}", fit.local_slope, exact(fit.local_slope))
    if fit.reason:
        return [Cell(f"no fit: {fit.reason}"), scatter, slope]
    tip = f"a = {exact(fit.floor * 1e6, 'µs')}, b = {fit.scale:.3g} s, {fit.lengths} lengths"
    text = f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
    return [number(text, fit.exponent, tip), scatter, slope]
