"""The page's section on whole models: time and memory against resolution, from where, and why."""

from collections.abc import Iterator

from linear_vit.reports.page.kernel_sections import hollow
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.tables import models
from linear_vit.reports.tables.models import ORIGINAL, Swapped
from linear_vit.reports.units import duration, mebibytes


def section(seen: Seen) -> Iterator[Part]:
    found = models.groups(seen.runs) if seen.runs else []
    for swapped in found:
        yield from filter(None, (_figure(swapped, memory=False), _figure(swapped, memory=True)))
    yield from filter(None, [models.paying(found)])
    yield from map(models.as_table, found)


def _figure(swapped: Swapped, *, memory: bool) -> Figure | None:
    series = []
    for name, cases in swapped.at.items():
        points = []
        for resolution, case in sorted(cases.items()):
            value = (models.known(case["peak_memory_bytes"]) or 0) / 2**20
            value = value if memory else case["median_s"]
            if value > 0:
                point = {"x": resolution, "y": float(f"{value:.6g}")} | hollow(dict(case))
                bars = {} if memory else {"low": case["q1_s"], "high": case["q3_s"]}
                points.append(point | bars)
        if points:
            of = {"operation": "whole_model", "dtype": swapped.dtype, "style": name}
            series.append({**of, "name": name, "label": name, "points": points, "hollow": False})
    if not series:
        return None
    what, unit = ("peak memory", "mebibytes") if memory else ("time", "seconds")
    data = {
        "series": series,
        "x": {"label": "side of the image, pixels", "base": 2, "unit": "pixels", "name": "side"},
        "y": {"label": f"{what} of a call", "base": 10, "unit": unit},
        "rule": None,
    }
    return Figure(
        "curves", f"{what.capitalize()}; {swapped.where}", _caption(swapped, memory), data
    )


def _caption(swapped: Swapped, memory: bool) -> str:
    """What the largest images take, with the original and with each attention."""
    largest = swapped.resolutions[-1]
    said = []
    for name in (ORIGINAL, *swapped.swaps):
        case = swapped.quiet(name, largest)
        if case is None:
            continue
        peak = (models.known(case["peak_memory_bytes"]) or 0) / 2**20
        text = mebibytes(peak) if memory else duration(case["median_s"])
        if not memory or peak > 0:
            said.append(f"{name} {text}")
    return f"At {largest} pixels: {', '.join(said)}. Lower is better. {models.ACCURACY}"
