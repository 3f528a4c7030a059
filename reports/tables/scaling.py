"""Exponents, and where curves cross, as tables."""

import math
from collections.abc import Sequence

from linear_vit.reports.groups import Group, crossovers
from linear_vit.reports.statistics.fits import Fit
from linear_vit.reports.tables.table import NOTHING, Cell, Row, Table, columns, number, word
from linear_vit.reports.units import exact

_RESIDUAL = (
    "Residual: rms of log time about the fit. Last slope: the local exponent between the two "
    "longest lengths, which says whether the growth has settled."
)


def crossings(found: Sequence[Group]) -> list[Table]:
    """From which N each backend overtakes the incumbent; a table per family that asks for it."""
    lines: dict[str, list[tuple[dict[str, Cell], dict[str, str]]]] = {}
    for group, mode, backend, answer in crossovers(found):
        first = group.family.operations[0]
        heading = f"Crossover: from which N {group.words.operation(first)} beats "
        line = {
            "pass": word(mode),
            "dtype": word(group.dtype),
            "backend": word(backend),
            "crossover (95 % interval)": number(answer.text, answer.estimate),
            "where": word(_where(group)),
        }
        facets = {"operation": first, "backend": backend, "dtype": group.dtype}
        lines.setdefault(heading + group.family.incumbent, []).append((line, facets))
    return [_table(heading, of, "") for heading, of in lines.items()]


def exponents(found: Sequence[Group]) -> Table | None:
    """A row per fitted curve; None without one."""
    lines = []
    for group in found:
        for (operation, mode, backend), fit in group.fits.items():
            line = {
                "operation": word(group.words.operation(operation)),
                "pass": word(mode),
                "dtype": word(group.dtype),
                "backend": word(backend),
                **dict(zip(("exponent p", "residual", "last slope"), _fit_cells(fit), strict=True)),
                "where": word(_where(group)),
            }
            facets = {"operation": operation, "backend": backend, "dtype": group.dtype}
            lines.append((line, facets))
    return _table("Fitted exponents", lines, _RESIDUAL) if lines else None


def _where(group: Group) -> str:
    return group.where.partition(", ")[2]


def _table(title: str, lines: Sequence[tuple[dict[str, Cell], dict[str, str]]], note: str) -> Table:
    """Where all rows are of one machine, the title says it; else each row does."""
    places = {line["where"].text for line, _ in lines}
    names = [name for name in lines[0][0] if name != "where" or len(places) > 1]
    if len(places) == 1:
        title += f"; {places.pop()}"
    rows = [Row([line[name] for name in names], facets) for line, facets in lines]
    left = [name for name in names if name not in ("residual", "last slope")]
    return Table(title, columns(names, left), rows, note)


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
