"""The page's sections on kernels: complexity, speed and memory, from timed runs."""

import math
from collections.abc import Iterator
from typing import Any

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.groups import (
    MEMORY,
    OVER_INCUMBENT,
    OVER_TORCH,
    TIME,
    Group,
    Picture,
    pictures,
)
from linear_vit.reports.page.cases import Case, by, cases, details, short, time_tip
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.statistics import turns
from linear_vit.reports.tables import scaling
from linear_vit.reports.tables.table import NOTHING, Cell, Column, Line, Table, count, number
from linear_vit.reports.units import capital, duration, exact, mebibytes, rate

# Units as page.js formats them.
_UNITS = {TIME: "seconds", MEMORY: "mebibytes", OVER_INCUMBENT: "factor", OVER_TORCH: "factor"}


def complexity(seen: Seen) -> Iterator[Part]:
    yield from _curves(seen.groups, TIME, OVER_INCUMBENT)
    yield from scaling.crossings(seen.groups)
    yield from filter(None, [scaling.exponents(seen.groups)])


def memory(seen: Seen) -> Iterator[Part]:
    yield from _curves(seen.groups, MEMORY)


def speed(seen: Seen) -> Iterator[Part]:
    yield from _heat_maps(seen.groups)
    for group in seen.groups:
        for (operation, mode), part in by(cases(group.frame), "operation", "pass").items():
            yield _speed_table(group, operation, mode, part, seen.brief)
    if seen.brief:
        yield "What ran in each case, and its profile, is left out, to keep this page under 3 MB."


# Curves.


def _curves(found: list[Group], *wanted: Picture) -> Iterator[Figure]:
    for group in found:
        for picture, frame in pictures(group):
            for mode in group.passes if picture in wanted else ():
                if part := [case for case in cases(frame) if case["pass"] == mode]:
                    yield _curve_figure(group, picture, mode, part)


def _curve_figure(group: Group, picture: Picture, mode: str, part: list[Case]) -> Figure:
    several = len(by(part, "operation")) > 1
    lines = []
    for (operation, backend), curve in by(part, "operation", "backend").items():
        fit = group.fits.get((operation, mode, backend))
        text = f"{backend}, {group.words.operation(operation)}" if several else backend
        if picture is TIME and fit is not None and fit.reason is None:
            half = max(fit.high - fit.exponent, fit.exponent - fit.low)
            text += f": N^{fit.exponent:.2f} ± {half:.2f}"
        drawn = {"y": "value"} | ({"low": "q1_s", "high": "q3_s"} if picture is TIME else {})
        points = [
            {"x": case["N"], **{name: short(case[column]) for name, column in drawn.items()}}
            for case in sorted(curve, key=lambda case: case["N"])
        ]
        lines.append(series(group, operation, backend, text, points))
    title, caption, unit = picture.words(group)
    data = {
        "series": lines,
        "x": {"label": "tokens N", "base": 2, "unit": "tokens"},
        "y": {"label": unit, "base": 10, "unit": _UNITS[picture]},
        "rule": 1 if picture.is_ratio else None,
    }
    heading = f"{title}, {mode.replace('+', ' + ')}; {group.where}"
    return Figure("curves", heading, f"{_see(group, picture, mode, part)} {caption}", data)


def series(
    group: Group, operation: str, backend: str, text: str, points: list[dict[str, Any]]
) -> dict[str, Any]:
    """One curve; that of a family's second operation is drawn hollow, as in the papers' plots."""
    facets = {"operation": operation, "backend": backend, "dtype": group.dtype}
    hollow = group.operations.index(operation) % 2 == 1
    name = f"{backend}, {group.words.operation(operation)}"
    return facets | {"name": name, "label": text, "points": points, "hollow": hollow}


def _see(group: Group, picture: Picture, mode: str, part: list[Case]) -> str:
    """What these very curves show, in words."""
    if picture is TIME:
        see = [
            _see_time(group, mode, op, curves) for (op,), curves in by(part, "operation").items()
        ]
    elif picture is MEMORY:
        see = [_see_memory(group, op, curves) for (op,), curves in by(part, "operation").items()]
    else:
        see = [_see_ratio(backend, curve) for (backend,), curve in by(part, "backend").items()]
    return " ".join(see)


def _see_time(group: Group, mode: str, operation: str, curves: list[Case]) -> str:
    longest = max(case["N"] for case in curves)
    at = {case["backend"]: case for case in curves if case["N"] == longest}
    best = min(at, key=lambda backend: at[backend]["median_s"])
    text = f"{capital(group.words.operation(operation))} of {longest:,} tokens takes "
    text += f"{duration(at[best]['median_s'])} at best ({best}"
    if PYTORCH in at and best != PYTORCH:
        log, _ = turns.speedup(at[best], at[PYTORCH])
        text += f", {math.exp(log):.1f}× as fast as {PYTORCH}"
    text += ")"
    fit = group.fits.get((operation, mode, best))
    if fit is not None:
        text += f", growing as {fit}" if fit.reason is None else f"; {fit}"
    return text + "."


def _see_memory(group: Group, operation: str, curves: list[Case]) -> str:
    longest = max(case["N"] for case in curves)
    at = {case["backend"]: case["value"] for case in curves if case["N"] == longest}
    least, most = min(at, key=at.__getitem__), max(at, key=at.__getitem__)
    text = f"{capital(group.words.operation(operation))} of {longest:,} tokens: "
    if at[least] == at[most]:
        return f"{text}{mebibytes(at[least])} with {', '.join(at)}."
    return (
        f"{text}least with {least}, {mebibytes(at[least])}; most with {most}, "
        f"{mebibytes(at[most])}."
    )


def _see_ratio(backend: str, curve: list[Case]) -> str:
    low = min(curve, key=lambda case: case["value"])
    high = max(curve, key=lambda case: case["value"])
    return (
        f"{backend}: from {low['value']:.2g}× at N = {low['N']:,} to {high['value']:.2g}× at "
        f"N = {high['N']:,}."
    )


# Heat maps.


def _heat_maps(found: list[Group]) -> list[Figure]:
    """A map per machine and operation: its groups, which differ in dtype, are rows of one."""
    maps: dict[tuple[str, ...], list[tuple[Group, list[Case]]]] = {}
    for group in found:
        for picture, frame in pictures(group):
            if picture is OVER_TORCH:
                for (operation,), part in by(cases(frame), "operation").items():
                    where = group.where.partition(", ")[2]
                    maps.setdefault((where, operation), []).append((group, part))
    return [_heat_map(where, operation, parts) for (where, operation), parts in maps.items()]


def _heat_map(where: str, operation: str, parts: list[tuple[Group, list[Case]]]) -> Figure:
    rows, every = [], [case for _, part in parts for case in part]
    for (backend, mode, dtype), cells in by(every, "backend", "pass", "dtype").items():
        label = f"{backend}, {mode.replace('forward+backward', 'fwd + bwd')}, {dtype}"
        facets = {"operation": operation, "backend": backend, "dtype": dtype}
        points = [
            {"x": case["N"], "y": short(case["value"]), "tip": _ratio_tip(case)} for case in cells
        ]
        rows.append(facets | {"name": label, "points": points})
    title = f"{capital(parts[0][0].words.operation(operation))}: speed-up over {PYTORCH}; {where}"
    return Figure("heat", title, _see_heat(every), {"series": rows, "base": PYTORCH})


def _see_heat(part: list[Case]) -> str:
    ahead = sum(case["value"] > 1 for case in part)
    sentences = [f"Faster than {PYTORCH} in {ahead} of {len(part)} cases."]
    for (backend,), curve in by(part, "backend").items():
        worst = min(curve, key=lambda case: case["value"])
        mean = math.exp(sum(math.log(case["value"]) for case in curve) / len(curve))
        sentences.append(
            f"{backend}: {mean:.2f}× in geometric mean, worst {worst['value']:.2f}× at "
            f"N = {worst['N']:,}, {worst['pass']}, {worst['dtype']}."
        )
    return " ".join(sentences) + f" Blue is faster than {PYTORCH}, orange slower."


# Tables.


def _speed_table(group: Group, operation: str, mode: str, part: list[Case], brief: bool) -> Table:
    backends = [name for (name,) in by(part, "backend")]
    limits = any(isinstance(case["limit"], str) for case in part)
    words = group.words.backend
    return Table(
        f"{capital(group.words.operation(operation))}, {mode.replace('+', ' + ')}; {group.where}",
        [
            _speed_line(tokens, line, backends, limits, brief)
            for (tokens,), line in sorted(by(part, "N").items())
        ],
        _what_ran(part, backends),
        {"operation": operation, "dtype": group.dtype},
        heads={n: Column(n, facets={"backend": n}, tip=words(n)) for n in backends},
    )


def _speed_line(
    tokens: int, found: list[Case], backends: list[str], limits: bool, brief: bool
) -> Line:
    at = {case["backend"]: case for case in found}
    best = min(found, key=lambda case: case["median_s"])
    line = {"N": count(tokens)}
    for name in backends:
        mark = "best" if name == best["backend"] and len(found) > 1 else ""
        absent = Cell(NOTHING, tip=f"{name} was not timed at this length")
        line[name] = _time_cell(at[name], brief, mark) if name in at else absent
    for unit, value in (("GFLOP/s", best["tflop_per_s"] * 1e3), ("GB/s", best["gb_per_s"])):
        line[unit] = number(value, rate, f"{exact(value)} ({best['backend']})")
    if limits:
        share, limit = best["share_of_limit"], best["limit"]
        known = isinstance(limit, str)
        tip = exact(100 * share, "%") if known else ""
        line["of limit"] = number(share if known else None, f"{{:.0%}} {limit}", tip)
    return line


def _what_ran(part: list[Case], backends: list[str]) -> str:
    """Each backend's implementation in words, as far as the run says it."""
    said = {case["backend"]: case for case in reversed(part)}
    parts = [
        text if text.startswith(f"{name}:") else f"{name}: {text}"
        for name in backends
        if isinstance(text := said[name]["implementation"], str)
    ]
    parts += [
        f"{name} computes another function: {text}"
        for name in backends
        if isinstance(text := said[name]["other_function"], str)
    ]
    return "; ".join(parts)


def _time_cell(case: Case, brief: bool, mark: str) -> Cell:
    tip = f"{case['backend']}, N = {case['N']:,}\n{time_tip(case)}"
    if not brief:
        tip += f"\n{details(case['info'])}"
    return number(case["median_s"], duration, tip.strip(), mark)


def _ratio_tip(case: Case) -> str:
    own, base = (exact(case[name] * 1e3, "ms") for name in ("median_s", "median_s_base"))
    return f"{own} against {base}"
