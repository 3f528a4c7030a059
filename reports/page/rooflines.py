"""The page's rooflines: what is done per second, beside what the machine allows for it."""

import math
from collections.abc import Iterator
from typing import Any

from linear_vit.reports.groups import Group
from linear_vit.reports.page.cases import Case, by, cases, competing, short
from linear_vit.reports.page.kernel_sections import hollow, series
from linear_vit.reports.page.parts import Figure, Part, Seen
from linear_vit.reports.saved.runs import Runs
from linear_vit.reports.tables import cpu
from linear_vit.reports.units import capital
from linear_vit.screen import counted

Point = dict[str, Any]


def section(seen: Seen) -> Iterator[Part]:
    """Every case that was timed with its machine's limits."""
    drawn = [figure for group in seen.groups for figure in _of_group(group, seen.runs)]
    products = list(_of_cpu(seen.runs)) if seen.runs else []
    yield from (*drawn, *products)
    if seen.groups and not drawn and not products:
        yield "The runs shown here are older than the measuring of limits."


def _of_group(group: Group, loaded: Runs | None) -> Iterator[Figure]:
    for (file,), part in by(cases(group.frame), "file").items():
        limits = loaded.limits(file) if loaded else {}
        peak = (limits.get("matmul_flop_per_s") or {}).get(group.dtype)
        copy = limits.get("copy_bytes_per_s")
        known = [case for case in part if _is_known(case)]
        if peak and copy and known:
            when = str(limits.get("measured") or "")
            roof = _matmul((limits.get("matmul_kernels") or {}).get(group.dtype))
            yield _roofline(group, known, float(copy), {roof: float(peak)}, when)


def _is_known(case: Case) -> bool:
    """Whether the file says both the work and the traffic."""
    return not (math.isnan(case["gb_per_s"]) or math.isnan(case["tflop_per_s"]))


def _matmul(kernel: str | None) -> str:
    """The roof's name, with the unit that multiplied where oneDNN told."""
    if kernel is None:
        return "matmul"
    return f"matmul on {'the matrix unit (AMX)' if 'amx' in kernel else 'vectors'}, {kernel}"


def _roofline(
    group: Group, part: list[Case], copy: float, roof: dict[str, float], when: str
) -> Figure:
    """``when`` the limits were measured (ISO 8601, UTC); empty where the run doesn't say."""
    (peak,) = roof.values()
    ridge = peak / copy
    for case in part:
        case["x"] = case["tflop_per_s"] / case["gb_per_s"] * 1e3  # FLOP per byte
        case["y"] = case["tflop_per_s"] * 1e3  # GFLOP/s
        case["share"] = case["y"] * 1e9 / min(peak, case["x"] * copy)
    lines = []
    for (operation, backend), curve in by(part, "operation", "backend").items():
        text = f"{backend}, {group.words.operation(operation)}"
        points = [
            _point(case, f"{case['pass']}, N = {case['N']:,}\n{case['share']:.1%} of its roof")
            for case in curve
        ]
        lines.append(series(group, operation, backend, text, points))
    able = competing(part) or part
    best = max(able, key=lambda case: case["share"])
    under = sum(case["x"] < ridge for case in part)
    caption = (
        f"{under} of {counted(len(part), 'case')} {'lies' if under == 1 else 'lie'} left of the "
        f"ridge at {ridge:.3g} FLOP/byte, where memory binds. Highest beside its roof: "
        f"{group.words.operation(best['operation'])} "
        f"({best['backend']}, {best['pass']}) at N = {best['N']:,}, {best['share']:.0%}. Larger "
        "marks are longer sequences; a case above the roof reads from a cache, or does less than "
        "the dense work that is counted."
    )
    if when:
        caption += f" Limits measured {when[:16].replace('T', ' ')} UTC."
    return _figure(f"{capital(group.names)}; {group.where}", caption, lines, copy, roof)


def _point(case: Case, tip: str) -> Point:
    at = {"x": short(case["x"]), "y": short(case["y"]), "size": case["N"], "tip": tip}
    return at | hollow(case)


def _figure(
    title: str, caption: str, lines: list[dict[str, Any]], copy: float, peaks: dict[str, float]
) -> Figure:
    """Cases beneath the copy rate's slope and one roof per rate (bytes/s, and FLOP/s by name)."""
    top = max(peaks.values())
    xs = [top / copy, *(point["x"] for one in lines for point in one["points"])]
    left, right = min(xs) / 2, max(xs) * 2
    roofs = [
        {
            "label": f"copy, {copy / 1e9:,.3g} GB/s",
            "points": [{"x": left, "y": left * copy / 1e9}, {"x": top / copy, "y": top / 1e9}],
        }
    ]
    for name, peak in peaks.items():
        level = [{"x": peak / copy, "y": peak / 1e9}, {"x": right, "y": peak / 1e9}]
        roofs.append({"label": f"{name}, {peak / 1e9:,.0f} GFLOP/s", "points": level})
    data = {
        "series": lines,
        "lines": roofs,
        "dots": True,
        "x": {"label": "FLOP per byte (least work over least traffic)", "base": 10},
        "y": {"label": "GFLOP/s", "base": 10},
    }
    return Figure("curves", f"Roofline: {title}", caption, data)


# The C++ products, beside what the processor allows for just their instructions.


def _of_cpu(loaded: Runs) -> Iterator[Part]:
    of_files: dict[str, list[cpu.Product]] = {}
    for product in cpu.products(loaded):
        of_files.setdefault(str(product.case["file"]), []).append(product)
    for file, products in of_files.items():
        yield _of_products(loaded, file, products)
        yield cpu.products_table(loaded, products)


def _of_products(loaded: Runs, file: str, products: list[cpu.Product]) -> Figure:
    limits = loaded.limits(file)
    lines: dict[str, dict[str, Any]] = {}
    for product in products:
        case = product.case
        operation, backend = str(case["operation"]), str(case["backend"])
        text = f"{backend}, {loaded.words.operation(operation)}"
        facets = {"operation": operation, "backend": backend, "dtype": str(case["dtype"])}
        new = facets | {"name": text, "label": text, "points": [], "hollow": len(lines) % 2 == 1}
        case["x"] = product.flop_done / case["info"]["least_bytes"]
        case["y"] = product.flop_done / case["median_s"] / 1e9
        binding = product.binding
        tip = f"N = {case['N']:,}\n{product.share(binding):.1%} of {binding}"
        lines.setdefault(operation, new)["points"].append(_point(case, tip))
    best = max(products, key=lambda product: product.share(product.binding))
    name = loaded.words.operation(best.case["operation"])
    caption = (
        "FLOP that the C++ kernels really do, half of the dense work. Closest to its limit: "
        f"{name} at N = {best.case['N']:,}, {best.share(best.binding):.0%} of {best.binding}."
    )
    probes = limits["probes"]
    peaks = {"FMA on registers": probes["fma"], "FMA with a load each": probes["load"]}
    title = f"the C++ products; {products[0].case['machine']}"
    return _figure(title, caption, list(lines.values()), limits["copy_bytes_per_s"], peaks)
