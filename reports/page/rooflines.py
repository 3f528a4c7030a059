"""The page's rooflines: what is done per second, beside what the machine allows for it."""

import math
from collections.abc import Iterable
from typing import Any

from linear_vit.reports import plots
from linear_vit.reports.page.kernel_sections import (
    Case,
    Extras,
    by,
    cases,
    rate,
    series,
    short,
)
from linear_vit.reports.page.parts import (
    Cell,
    Figure,
    Row,
    Section,
    Table,
    columns,
    exact,
    number,
    word,
)
from linear_vit.reports.saved import documents, runs
from linear_vit.reports.scaling import Group
from linear_vit.reports.statistics.fits import fit_scaling


def section(found: list[Group], extra: Iterable[Table | Figure], extras: Extras) -> Section:
    """Every case that was timed with its machine's limits; ``extra`` comes from :func:`cpu`."""
    made = Section(
        "roofline",
        "Roofline",
        "What a case does per second against what it must do per byte: FLOP of the operation's "
        "least work over bytes of its least traffic. Under the slope the memory's copy rate binds, "
        "under the roof the matmul rate; both were measured on the same machine within a day.",
    )
    for group in found:
        for (file,), part in by(cases(group.frame), "file").items():
            limits = extras.limits(file)
            peak = (limits.get("matmul_flop_per_s") or {}).get(group.dtype)
            copy = limits.get("copy_bytes_per_s")
            if peak and copy:
                when = str(limits.get("measured", ""))
                made.figures.append(_of_group(group, part, float(copy), float(peak), when))
    for one in extra:
        if isinstance(one, Figure):
            made.figures.append(one)
        else:
            made.tables.append(one)
    if not made.figures:
        made.missing = runs.HOW_TO_MEASURE
        if found:
            made.notes.append("The runs shown here are older than the measuring of limits.")
    return made


def _of_group(group: Group, part: list[Case], copy: float, peak: float, when: str) -> Figure:
    """``when`` the limits were measured (ISO 8601, UTC); empty where the run doesn't say."""
    ridge = peak / copy
    for case in part:
        case["x"] = case["tflop_per_s"] / case["gb_per_s"] * 1e3  # FLOP per byte
        case["y"] = case["tflop_per_s"] * 1e3  # GFLOP/s
        case["share"] = case["y"] * 1e9 / min(peak, case["x"] * copy)
    lines = []
    for (operation, backend), curve in by(part, "operation", "backend").items():
        text = f"{backend}, {plots.label(operation)}"
        points = [
            {
                "x": short(case["x"]),
                "y": short(case["y"]),
                "size": case["N"],
                "tip": f"{case['pass']}, N = {case['N']:,}\n{case['share']:.1%} of its roof",
            }
            for case in curve
        ]
        lines.append(series(group, operation, backend, text, points))
    best = max(part, key=lambda case: case["share"])
    under = sum(case["x"] < ridge for case in part)
    caption = (
        f"{under} of {len(part)} cases lie left of the ridge at {ridge:.3g} FLOP/byte, where "
        f"memory binds. Highest beside its roof: {plots.label(best['operation'])} "
        f"({best['backend']}, {best['pass']}) at N = {best['N']:,}, {best['share']:.0%}. Larger "
        "marks are longer sequences; a case above the roof reads from a cache, or does less than "
        "the dense work that is counted."
    )
    if when:
        caption += f" Limits measured {when[:16].replace('T', ' ')} UTC."
    names = " and ".join(plots.label(name) for name in group.operations)
    return _figure(f"{names.capitalize()}; {group.where}", caption, lines, copy, {"matmul": peak})


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
    axes = {
        "x": {"label": "FLOP per byte (least work over least traffic)", "base": 10},
        "y": {"label": "GFLOP/s", "base": 10},
    }
    data = {"series": lines, "lines": roofs, "dots": True, **axes}
    return Figure("curves", f"Roofline: {title}", caption, data)


# What bench.cpu measured.


def cpu(saved: documents.Saved) -> list[Table | Figure]:
    """Its cases against other backends, time against N, and each product beside its limits."""
    machine = runs.machine_label(saved.content["machine"])
    rows = saved.content["rows"]
    parts: list[Table | Figure] = []
    limits = next((row["limits"] for row in rows if "limits" in row), None)
    bound = [row for row in rows if "bounds" in row]
    if limits and bound:
        parts += _cpu_roofline(limits, bound, machine)
    scaling = [row for row in rows if row["name"].startswith("scaling")]
    if scaling:
        parts.append(_cpu_scaling(scaling, machine))
    timed = [row for row in rows if "ratio" in row]
    if timed:
        parts.append(_cpu_table(timed, machine))
    return parts


def _cpu_facets(row: dict[str, Any], dtype: str) -> dict[str, str]:
    operation = str(row.get("operation", "linear_attention"))
    return {"operation": operation, "backend": "cpu", "dtype": dtype}


def _cpu_table(timed: list[dict[str, Any]], machine: str) -> Table:
    rows = []
    for row in timed:
        _, mode, dtype = row["table"].rsplit(", ", 2)
        facets = _cpu_facets(row, dtype)
        own = row["seconds"]["cpu"]
        others = {name: s for name, s in row["seconds"].items() if name != "cpu"}
        size = row.get("tokens") or row["grid"] ** 2
        tip = ", ".join(f"{name} {plots.duration(seconds)}" for name, seconds in others.items())
        cells = [
            word(plots.label(facets["operation"])),
            word(mode),
            word(dtype),
            number(f"{size:,}", size),
            number(plots.duration(own), own, f"{exact(own * 1e3, 'ms')}; {tip}"),
            number(f"{row['ratio']:.2f}×", row["ratio"], f"{exact(row['ratio'])}×"),
            word(row.get("against", "torch")),
            *(
                number(f"{row[key]:.2f}×", row[key], f"{exact(row[key])}×")
                if row.get(key)
                else Cell("–")
                for key in ("over_softmax", "over_matmul")
            ),
        ]
        rows.append(Row(cells, facets))
    ratios = [row["ratio"] for row in timed]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    titles = ["operation", "pass", "dtype", "tokens", "cpu", "speed-up", "over", "over SDPA"]
    titles.append("over float32 matmul")
    words = ["operation", "pass", "dtype", "over"]
    note = f"Geometric mean {mean:.2f}×, worst {min(ratios):.2f}×; backends of a row took turns."
    return Table(f"The C++ kernels on batches; {machine}", columns(titles, words), rows, note)


def _cpu_scaling(rows: list[dict[str, Any]], machine: str) -> Figure:
    rows = sorted(rows, key=lambda row: row["tokens"])
    fit = fit_scaling([row["tokens"] for row in rows], [row["seconds"]["cpu"] for row in rows])
    points = [
        {
            "x": row["tokens"],
            "y": short(row["seconds"]["cpu"]),
        }
        for row in rows
    ]
    label = "cpu, linear attention" + ("" if fit.reason else f": {fit}")
    line = {"name": "cpu, linear attention", "label": label, "points": points, "hollow": False}
    return Figure(
        "curves",
        f"C++ linear attention: time per call, forward, one sequence; {machine}",
        f"From {rows[0]['tokens']:,} to {rows[-1]['tokens']:,} tokens the time grows as {fit}.",
        {
            "series": [_cpu_facets({}, "float32") | line],
            "x": {"label": "tokens N", "base": 2, "unit": "tokens"},
            "y": {"label": "time per call", "base": 10, "unit": "seconds"},
        },
    )


def _cpu_roofline(
    limits: dict[str, float], bound: list[dict[str, Any]], machine: str
) -> list[Table | Figure]:
    rows = []
    lines: dict[str, dict[str, Any]] = {}
    shares = []
    for row in bound:
        name, tokens, seconds = plots.label(row["operation"]), row["tokens"], row["seconds"]["cpu"]
        limit = max(row["bounds"], key=row["bounds"].__getitem__)
        share = row["bounds"][limit] / seconds
        traffic = row["bounds"]["memory"] * limits["copy"]  # bytes
        reached = row["flop_done"] / seconds / 1e9
        facets = _cpu_facets(row, "float32")
        bounds = "\n".join(f"{k}: {plots.duration(v)}" for k, v in row["bounds"].items() if v)
        cells = [
            word(name),
            number(f"{tokens:,}", tokens),
            number(plots.duration(seconds), seconds, exact(seconds * 1e3, "ms")),
            number(rate(reached), reached, exact(reached, "GFLOP/s")),
            word(limit, f"each limit alone allows\n{bounds}"),
            number(f"{share:.0%}", share, exact(100 * share, "%")),
        ]
        rows.append(Row(cells, facets))
        shares.append((share, f"{name} at N = {tokens:,}, {share:.0%} of {limit}"))
        tip = f"N = {tokens:,}\n{share:.1%} of {limit}"
        point = {
            "x": short(row["flop_done"] / traffic),
            "y": short(reached),
            "size": tokens,
            "tip": tip,
        }
        text = f"cpu, {name}"
        new = facets | {"name": text, "label": text, "points": [], "hollow": len(lines) % 2 == 1}
        lines.setdefault(row["operation"], new)["points"].append(point)
    caption = (
        "FLOP that the C++ kernels really do, half of the dense work. Closest to its limit: "
        f"{max(shares)[1]}."
    )
    peaks = {"FMA on registers": limits["fma"], "FMA with a load each": limits["load"]}
    titles = ["product", "tokens", "time", "GFLOP/s done", "limited by", "of it"]
    table_columns = columns(titles, ["product", "limited by"])
    what = f"the C++ products; {machine}"
    return [
        _figure(what, caption, list(lines.values()), limits["copy"], peaks),
        Table(f"Limits of {what}", table_columns, rows),
    ]
