"""The page's sections on kernels: complexity, speed and memory, from timed runs."""

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
from linear_vit.reports.page import captions
from linear_vit.reports.page.cases import Case, by, cases, competing, details, short, time_tip
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.tables import scaling
from linear_vit.reports.tables.table import (
    NOTHING,
    Cell,
    Column,
    Line,
    Table,
    count,
    disturbance,
    number,
    of_disturbed,
    time_of,
)
from linear_vit.reports.units import capital, exact, rate

# Units as page.js formats them.
_UNITS = {TIME: "seconds", MEMORY: "mebibytes", OVER_INCUMBENT: "factor", OVER_TORCH: "factor"}


def complexity(seen: Seen) -> Iterator[Part]:
    yield from _curves([g for g in seen.groups if not g.total_tokens], TIME, OVER_INCUMBENT)
    yield from scaling.crossings(seen.groups)
    yield from filter(None, [scaling.exponents(seen.groups)])


def memory(seen: Seen) -> Iterator[Part]:
    yield from _curves(seen.groups, MEMORY)


def speed(seen: Seen) -> Iterator[Part]:
    yield from _curves([g for g in seen.groups if g.total_tokens], OVER_INCUMBENT)
    yield from _heat_maps(seen.groups)
    for group in seen.groups:
        for (operation, mode), part in by(cases(group.frame), "operation", "pass").items():
            yield _speed_table(group, operation, mode, part, seen.brief)
    if seen.brief:
        yield "What ran in each case, and its profile, is left out, to keep this page under 3 MB."


# Curves.


def _drawn(group: Group) -> Iterator[tuple[Picture, list[Case]]]:
    """Pictures with their cases: ratios are of what was not disturbed, on either side."""
    every = [case for case in cases(group.frame) if case["backend"] == PYTORCH]
    shaken = {(c["operation"], c["pass"], c["N"]) for c in every if disturbance(c)}
    for picture, frame in pictures(group):
        found = cases(frame)
        if picture.is_ratio:
            second = group.family.operations[-1] if picture is OVER_INCUMBENT else None
            found = [
                case
                for case in found
                if not disturbance(case)
                and (second or case["operation"], case["pass"], case["N"]) not in shaken
            ]
        if found:
            yield picture, found


def _curves(found: list[Group], *wanted: Picture) -> Iterator[Figure]:
    for group in found:
        for picture, drawn in _drawn(group):
            for mode in group.passes if picture in wanted else ():
                if part := [case for case in drawn if case["pass"] == mode]:
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
            | hollow(case)
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
    caption = f"{captions.of_curves(group, picture, mode, part)} {caption}"
    return Figure("curves", heading, caption, data)


def hollow(case: Case) -> dict[str, str]:
    """What a point is drawn hollow for."""
    why = disturbance(case)
    return {"disturbed": why} if why else {}


def series(
    group: Group, operation: str, backend: str, text: str, points: list[dict[str, Any]]
) -> dict[str, Any]:
    """One curve; that of a family's second operation is drawn hollow, as in the papers' plots."""
    facets = {"operation": operation, "backend": backend, "dtype": group.dtype}
    hollow = group.operations.index(operation) % 2 == 1
    name = f"{backend}, {group.words.operation(operation)}"
    return facets | {"name": name, "label": text, "points": points, "hollow": hollow}


# Heat maps.


def _heat_maps(found: list[Group]) -> list[Figure]:
    """A map per machine and operation: its groups, which differ in dtype, are rows of one."""
    maps: dict[tuple[str, ...], list[tuple[Group, list[Case]]]] = {}
    for group in found:
        for picture, drawn in _drawn(group):
            if picture is OVER_TORCH:
                for (operation,), part in by(drawn, "operation").items():
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
    return Figure("heat", title, captions.of_heat(every), {"series": rows, "base": PYTORCH})


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
    able = competing(found)
    best = min(able, key=lambda case: case["median_s"], default=None)
    line = {"N": count(tokens)}
    for name in backends:
        mark = "best" if best and name == best["backend"] and len(able) > 1 else ""
        absent = Cell(NOTHING, tip=f"{name} was not timed at this length")
        line[name] = _time_cell(at[name], brief, mark) if name in at else absent
    for unit, name, scale in (("GFLOP/s", "tflop_per_s", 1e3), ("GB/s", "gb_per_s", 1.0)):
        of_best = f"{exact(best[name] * scale)} ({best['backend']})" if best else ""
        line[unit] = number(best[name] * scale if best else None, rate, of_best)
    if limits:
        known = best if best and isinstance(best["limit"], str) else None
        line["of limit"] = Cell(NOTHING)
        if known:
            share, why = known["share_of_limit"], _beaten(known)
            form = f"{'§ ' if why else ''}{{:.0%}} {known['limit']}"
            line["of limit"] = number(share, form, f"{exact(100 * share, '%')}\n{why}".strip())
    return line


def _beaten(case: Case) -> str:
    """Why a share of a limit is above 1; empty where it is not."""
    share = case["share_of_limit"]
    if not share > 1:  # of no known limit it is NaN
        return ""
    said = "above the limit: its data were in a cache, or it does less than the work counted"
    return str(case["info"].get("limit_note") or said)


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
    parts += [f"§ {why}" for why in dict.fromkeys(map(_beaten, competing(part))) if why]
    return "; ".join(filter(None, [*parts, of_disturbed(part)]))


def _time_cell(case: Case, brief: bool, mark: str) -> Cell:
    tip = f"{case['backend']}, N = {case['N']:,}\n{time_tip(case)}"
    if not brief:
        tip += f"\n{details(case['info'])}"
    return time_of(case, tip.strip(), mark)


def _ratio_tip(case: Case) -> str:
    own, base = (exact(case[name] * 1e3, "ms") for name in ("median_s", "median_s_base"))
    return f"{own} against {base}"
