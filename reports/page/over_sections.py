"""The page's section on a sequence over several processes: measured, modelled, for many GPUs."""

from collections.abc import Iterator

from linear_vit.reports.page.kernel_sections import hollow
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.tables import over_processes
from linear_vit.reports.tables.over_processes import LINEAR, Over, name_of
from linear_vit.reports.units import duration

_MODEL = "linear, 2 processes, by the model"


def section(seen: Seen) -> Iterator[Part]:
    found = over_processes.groups(seen.runs) if seen.runs else []
    yield from map(_figure, found)
    yield from filter(None, [over_processes.paying(found)])
    yield from map(over_processes.as_table, found)
    yield over_processes.on_gpus()


def _figure(over: Over) -> Figure:
    series = []
    for of, cases in over.at.items():
        points = [
            {"x": n, "y": float(f"{case['median_s']:.6g}"), "low": case["q1_s"]}
            | {"high": case["q3_s"]}
            | hollow(dict(case))
            for n, case in sorted(cases.items())
        ]
        series.append(_series(over, name_of(of), points))
    modelled = {n: y for n in over.lengths if (y := over.modelled(2, n)) is not None}
    if modelled:
        points = [{"x": n, "y": float(f"{y:.6g}")} for n, y in modelled.items()]
        series.append(_series(over, _MODEL, points))
    data = {
        "series": series,
        "x": {"label": "tokens N", "base": 2, "unit": "tokens"},
        "y": {"label": "time of a call", "base": 10, "unit": "seconds"},
        "rule": None,
    }
    return Figure("curves", f"Time over processes; {over.where}", _caption(over), data)


def _series(over: Over, name: str, points: list[dict[str, object]]) -> dict[str, object]:
    of = {"operation": "over_processes", "dtype": over.dtype, "style": name}
    return {**of, "name": name, "label": name, "points": points, "hollow": name == _MODEL}


def _caption(over: Over) -> str:
    longest = over.lengths[-1]
    said = [
        f"{name_of(of)} {duration(case['median_s'])}"
        for of in over.at
        if of[0] == LINEAR and (case := over.quiet(of, longest)) is not None
    ]
    return (
        f"At N = {longest:,}: {', '.join(said)}. Lower is better." if said else "Lower is better."
    )
