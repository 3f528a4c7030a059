"""The page's sections on kernels: complexity, speed and memory, from timed runs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from linear_vit.reports import plots, scaling
from linear_vit.reports.page.parts import (
    Cell,
    Column,
    Figure,
    Row,
    Section,
    Table,
    columns,
    exact,
    number,
    word,
)
from linear_vit.reports.plots import MEMORY, OVER_SOFTMAX, OVER_TORCH, TIME, Picture
from linear_vit.reports.saved import documents, runs
from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.scaling import Group
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import Fit

Case = dict[str, Any]  # a row of Runs.kernels, or of a picture's data

# Units as page.js formats them.
_UNITS = {TIME: "seconds", MEMORY: "mebibytes", OVER_SOFTMAX: "factor", OVER_TORCH: "factor"}


class Extras:
    """Limits and details of the runs behind a page, each file read once."""

    def __init__(self, loaded: Runs | None) -> None:
        self.left_out = False
        self._runs = {
            head["file"]: documents.extras(head["file"])
            for head in (loaded.heads if loaded else ())
        }

    def limits(self, file: str) -> dict[str, Any]:
        """The machine's limits that a run measured; empty where it has none."""
        return self._runs[file].limits if file in self._runs else {}

    def profile(self, case: Case) -> dict[str, Any] | None:
        """What ``--profile`` wrote of a case."""
        if self.left_out or case["file"] not in self._runs:
            return None
        return self._runs[case["file"]].profiles.get(tuple(case[n] for n in documents.CASE))

    def leave_out_details(self) -> None:
        """Keep the limits, and say nothing more of single cases."""
        self.left_out = True

    def tip(self, case: Case) -> str:
        """Lines on one case beyond its time."""
        if self.left_out or case["file"] not in self._runs:
            return ""
        key = tuple(case[name] for name in documents.CASE)
        return self._runs[case["file"]].details.get(key, "")


def cases(frame: pd.DataFrame) -> list[Case]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def by(found: Iterable[Case], *names: str) -> dict[tuple[Any, ...], list[Case]]:
    """Cases by the values of some columns, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in found:
        groups.setdefault(tuple(case[name] for name in names), []).append(case)
    return groups


def complexity(found: list[Group]) -> Section:
    section = Section(
        "complexity",
        "Complexity",
        "Time against the number of tokens N, one sequence of 6 heads of 64 (ripple: one grid of "
        "384 channels). Fitted where the data supports it: time = a + b·N^p.",
    )
    if not found:
        section.missing = runs.HOW_TO_MEASURE
        return section
    section.figures = _curves(found, (TIME, OVER_SOFTMAX))
    answers = [
        Row(
            [word(group.where), word(mode), word(backend), number(answer.text, answer.estimate)],
            {"operation": "linear_attention", "backend": backend, "dtype": group.dtype},
        )
        for group, mode, backend, answer in scaling.crossovers(found)
    ]
    if answers:
        titles = ["where", "pass", "backend", "crossover (95 % interval)"]
        heading = "Crossover: from which N linear attention beats SDPA"
        section.tables.append(Table(heading, columns(titles, titles), answers))
    fits = [
        Row(
            [word(plots.label(op)), word(mode), word(group.dtype), word(backend), *_fit_cells(fit)],
            {"operation": op, "backend": backend, "dtype": group.dtype},
        )
        for group in found
        for (op, mode, backend), fit in group.fits.items()
    ]
    titles = ["operation", "pass", "dtype", "backend", "exponent p", "residual", "last slope"]
    if fits:
        section.tables.append(
            Table(
                "Fitted exponents",
                columns(titles, titles[:5]),
                fits,
                "Residual: rms of log time about the fit. Last slope: the local exponent between "
                "the two longest lengths, which says whether the growth has settled.",
            )
        )
    return section


def memory(found: list[Group]) -> Section:
    section = Section(
        "memory",
        "Memory",
        "Peak memory of a call beyond its inputs and outputs, measured in a call of its own.",
    )
    section.figures = _curves(found, (MEMORY,))
    if not section.figures:
        section.missing = runs.HOW_TO_MEASURE
    return section


def speed(found: list[Group], extras: Extras) -> Section:
    section = Section(
        "speed",
        "Speed",
        "Median time per call; the fastest of a row is marked. GFLOP/s and GB/s are those of the "
        "fastest, by the operation's least work and least traffic, whatever the implementation "
        "does. Of limit: the time that the machine's copy or matmul rate, measured on it within "
        "a day, allows for that, over the time taken.",
    )
    if not found:
        section.missing = runs.HOW_TO_MEASURE
        return section
    section.figures = _heat_maps(found)
    if extras.left_out:
        section.notes.append(
            "What ran in each case, and its profile, is left out, to keep this page under 3 MB."
        )
    section.tables = [
        _speed_table(group, operation, mode, part, extras)
        for group in found
        for (operation, mode), part in by(cases(group.frame), "operation", "pass").items()
    ]
    return section


# Curves.


def _curves(found: list[Group], wanted: Sequence[Picture]) -> list[Figure]:
    return [
        _curve_figure(group, picture, mode, part)
        for group in found
        for picture, frame in scaling.pictures(group)
        if picture in wanted
        for mode in group.passes
        if (part := [case for case in cases(frame) if case["pass"] == mode])
    ]


def _curve_figure(group: Group, picture: Picture, mode: str, part: list[Case]) -> Figure:
    several = len(by(part, "operation")) > 1
    lines = []
    for (operation, backend), curve in by(part, "operation", "backend").items():
        fit = group.fits.get((operation, mode, backend))
        text = f"{backend}, {plots.label(operation)}" if several else backend
        if picture is TIME and fit is not None and fit.reason is None:
            half = max(fit.high - fit.exponent, fit.exponent - fit.low)
            text += f": N^{fit.exponent:.2f} ± {half:.2f}"
        points = []
        for case in sorted(curve, key=lambda case: case["N"]):
            point = {"x": case["N"], "y": short(case["value"])}
            if picture is TIME:
                point |= {"low": short(case["q1_s"]), "high": short(case["q3_s"])}
            points.append(point)
        lines.append(series(group, operation, backend, text, points))
    return against_tokens(
        f"{plots.title(group.operations, picture)}, {mode.replace('+', ' + ')}; {group.where}",
        f"{_see(group, picture, mode, part)} {picture.caption}",
        lines,
        {"label": picture.unit, "base": 10, "unit": _UNITS[picture]},
        rule=1 if _UNITS[picture] == "factor" else None,
    )


def against_tokens(
    title: str,
    caption: str,
    lines: list[dict[str, Any]],
    y: dict[str, Any],
    rule: float | None = None,
) -> Figure:
    """Curves over N; ``y`` has ``label``, ``base`` of the logarithm and ``unit``."""
    x = {"label": "tokens N", "base": 2, "unit": "tokens"}
    return Figure("curves", title, caption, {"series": lines, "x": x, "y": y, "rule": rule})


def series(
    group: Group, operation: str, backend: str, text: str, points: list[dict[str, Any]]
) -> dict[str, Any]:
    """One curve; that of a family's second operation is drawn hollow, as in the papers' plots."""
    facets = {"operation": operation, "backend": backend, "dtype": group.dtype}
    hollow = group.operations.index(operation) % 2 == 1
    name = f"{backend}, {plots.label(operation)}"
    return facets | {"name": name, "label": text, "points": points, "hollow": hollow}


def _see(group: Group, picture: Picture, mode: str, part: list[Case]) -> str:
    """What these very curves show, in words."""
    if picture is TIME:
        see = [
            _see_time(group, mode, op, curves) for (op,), curves in by(part, "operation").items()
        ]
    elif picture is MEMORY:
        see = [_see_memory(op, curves) for (op,), curves in by(part, "operation").items()]
    else:
        see = [_see_ratio(backend, curve) for (backend,), curve in by(part, "backend").items()]
    return " ".join(see)


def _see_time(group: Group, mode: str, operation: str, curves: list[Case]) -> str:
    longest = max(case["N"] for case in curves)
    at = {case["backend"]: case for case in curves if case["N"] == longest}
    best = min(at, key=lambda backend: at[backend]["median_s"])
    text = f"{plots.label(operation).capitalize()} of {longest:,} tokens takes "
    text += f"{plots.duration(at[best]['median_s'])} at best ({best}"
    if "torch" in at and best != "torch":
        log, _ = turns.speedup(at[best], at["torch"])
        text += f", {math.exp(log):.1f}× as fast as torch"
    text += ")"
    fit = group.fits.get((operation, mode, best))
    if fit is not None:
        text += f", growing as {fit}" if fit.reason is None else f"; {fit}"
    return text + "."


def _see_memory(operation: str, curves: list[Case]) -> str:
    longest = max(case["N"] for case in curves)
    at = {case["backend"]: case["value"] for case in curves if case["N"] == longest}
    least, most = min(at, key=at.__getitem__), max(at, key=at.__getitem__)
    text = f"{plots.label(operation).capitalize()} of {longest:,} tokens: "
    if at[least] == at[most]:
        return f"{text}{plots.mebibytes(at[least])} with {', '.join(at)}."
    return (
        f"{text}least with {least}, {plots.mebibytes(at[least])}; most with {most}, "
        f"{plots.mebibytes(at[most])}."
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
    ratios = [
        case
        for group in found
        for picture, frame in scaling.pictures(group)
        if picture is OVER_TORCH
        for case in cases(frame)
    ]
    made = []
    for (machine, total, operation), part in by(
        ratios, "machine", "total_tokens", "operation"
    ).items():
        rows = []
        for (backend, mode, dtype), cells in by(part, "backend", "pass", "dtype").items():
            label = f"{backend}, {mode.replace('forward+backward', 'fwd + bwd')}, {dtype}"
            facets = {"operation": operation, "backend": backend, "dtype": dtype}
            points = [
                {"x": case["N"], "y": short(case["value"]), "tip": _ratio_tip(case)}
                for case in cells
            ]
            rows.append(facets | {"name": label, "points": points})
        tokens = f", {total:,} tokens a call" if total else ""
        title = f"{plots.label(operation).capitalize()}: speed-up over torch{tokens}; {machine}"
        made.append(Figure("heat", title, _see_heat(part), {"series": rows}))
    return made


def _see_heat(part: list[Case]) -> str:
    ahead = sum(case["value"] > 1 for case in part)
    sentences = [f"Faster than torch in {ahead} of {len(part)} cases."]
    for (backend,), curve in by(part, "backend").items():
        worst = min(curve, key=lambda case: case["value"])
        mean = math.exp(sum(math.log(case["value"]) for case in curve) / len(curve))
        sentences.append(
            f"{backend}: {mean:.2f}× in geometric mean, worst {worst['value']:.2f}× at "
            f"N = {worst['N']:,}, {worst['pass']}, {worst['dtype']}."
        )
    return " ".join(sentences) + " Blue is faster than torch, orange slower."


# Tables.


def _speed_table(
    group: Group, operation: str, mode: str, part: list[Case], extras: Extras
) -> Table:
    backends = [name for (name,) in by(part, "backend")]
    limits = any(isinstance(case["limit"], str) for case in part)
    rows = []
    for (tokens,), line in sorted(by(part, "N").items()):
        at = {case["backend"]: case for case in line}
        best = min(line, key=lambda case: case["median_s"])
        cells = [number(f"{tokens:,}", tokens)]
        for backend in backends:
            mark = "best" if backend == best["backend"] and len(line) > 1 else ""
            cells.append(
                _time_cell(at[backend], extras, mark)
                if backend in at
                else Cell("–", tip=f"{backend} was not timed at this length")
            )
        for value in (best["tflop_per_s"] * 1e3, best["gb_per_s"]):
            cells.append(number(rate(value), value, f"{exact(value)} ({best['backend']})"))
        if limits:
            share, limit = best["share_of_limit"], best["limit"]
            cells.append(
                number(f"{share:.0%} {limit}", share, exact(100 * share, "%"))
                if isinstance(limit, str)
                else Cell("–")
            )
        rows.append(Row(cells))
    what = {case["backend"]: case["implementation"] for case in reversed(part)}
    note = "; ".join(
        what[name] if what[name].startswith(f"{name}:") else f"{name}: {what[name]}"
        for name in backends
    )
    other = {case["backend"]: case.get("other_function") for case in part}
    note += "".join(
        f"; {name} computes another function: {words}"
        for name, words in other.items()
        if isinstance(words, str)
    )
    titles = [Column("N"), *(Column(name, facets={"backend": name}) for name in backends)]
    titles += columns(["GFLOP/s", "GB/s", *(["of limit"] if limits else [])])
    return Table(
        f"{plots.label(operation).capitalize()}, {mode.replace('+', ' + ')}; {group.where}",
        titles,
        rows,
        note,
        {"operation": operation, "dtype": group.dtype},
    )


# Cells and words.


def _time_cell(case: Case, extras: Extras, mark: str) -> Cell:
    tip = f"{case['backend']}, N = {case['N']:,}\n{_time_tip(case)}\n{extras.tip(case)}".strip()
    return number(plots.duration(case["median_s"]), case["median_s"], tip, mark)


def _fit_cells(fit: Fit) -> list[Cell]:
    if math.isnan(fit.residual):  # too few lengths to fit anything
        return [Cell(str(fit.reason)), Cell("–"), Cell("–")]
    scatter = number(f"{fit.residual:.0%}", fit.residual, exact(100 * fit.residual, "%"))
    slope = number(f"{fit.local_slope:.2f}", fit.local_slope, exact(fit.local_slope))
    if fit.reason:
        return [Cell(f"no fit: {fit.reason}"), scatter, slope]
    tip = f"a = {exact(fit.floor * 1e6, 'µs')}, b = {fit.scale:.3g} s, {fit.lengths} lengths"
    text = f"{fit.exponent:.2f} ({fit.low:.2f} to {fit.high:.2f})"
    return [number(text, fit.exponent, tip), scatter, slope]


def _time_tip(case: Case) -> str:
    return (
        f"{exact(case['median_s'] * 1e3, 'ms')} (quartiles {exact(case['q1_s'] * 1e3)} to "
        f"{exact(case['q3_s'] * 1e3)}; {case['rounds']:,} rounds)"
    )


def _ratio_tip(case: Case) -> str:
    return (
        f"{exact(case['median_s'] * 1e3, 'ms')} against {exact(case['median_s_base'] * 1e3, 'ms')}"
    )


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short(value: float) -> float:
    """Enough digits to draw, and few enough to keep the page small."""
    return float(f"{value:.6g}")
