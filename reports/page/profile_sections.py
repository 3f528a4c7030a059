"""The page's section on profiles: what ``pytest --benchmark-only --profile`` saw in each case."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from linear_vit.reports.groups import Group
from linear_vit.reports.page.cases import Case, by, cases
from linear_vit.reports.page.parts import Section
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, number, of_lines, word
from linear_vit.reports.units import capital, duration, exact

HOW_TO_PROFILE = "pytest --benchmark-only --profile --benchmark-json=reports/out/benchmark.json"
_MOST = 5  # of a case's kernels; the trace has them all
# Nsight Compute's name, heading, and by how much the value is multiplied to be in its unit.
_COUNTERS = (
    ("gpu__time_duration.sum", "µs", 1e-3),
    ("dram__bytes_read.sum", "MB read", 1e-6),
    ("dram__bytes_write.sum", "MB written", 1e-6),
    ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "memory %", 1.0),
    ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "SM %", 1.0),
    ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "tensor cores %", 1.0),
    ("sm__warps_active.avg.pct_of_peak_sustained_active", "warps %", 1.0),
    ("launch__registers_per_thread", "registers", 1.0),
)
_Profiled = tuple[Case, dict[str, Any]]


def section(found: list[Group], folder: Path, *, brief: bool) -> Section:
    """Top kernels and counters of every profiled case.

    Args:
        found: the timed cases.
        folder: the page's, which links to traces start from.
        brief: leave all of them out.
    """
    made = Section(
        "profiles",
        "Profiles",
        "Where a case's time goes: its kernels on CUDA, its operators on a CPU, by time of their "
        "own. Traces open in ui.perfetto.dev and chrome://tracing. A profiler slows what it "
        "watches, so these are shares, and times of calls are those of the speed section.",
    )
    for group in found:
        for (operation, mode), part in by(cases(group.frame), "operation", "pass").items():
            profiled = []
            for case in part:
                seen = None if brief else case["info"].get("profile")
                if isinstance(seen, dict) and seen and _is_sound(seen):
                    profiled.append((case, seen))
                elif seen:
                    made.notes.append(f"{case['file']}: damaged profile of {case['backend']}")
            if profiled:
                what = capital(group.words.operation(operation))
                what += f", {mode.replace('+', ' + ')}; {group.where}"
                facets = {"operation": operation, "dtype": group.dtype}
                made.tables.append(_top(what, profiled, facets, folder))
                made.tables += _counters(f"Counters: {what}", profiled, facets)
    if not made.tables:
        made.missing = HOW_TO_PROFILE
    return made


def _is_sound(seen: dict[str, Any]) -> bool:
    numbers = ("share", "total_us", "calls")
    try:
        for one in seen["top"]:
            if not (isinstance(one["name"], str) and all(float(one[n]) > 0 for n in numbers)):
                return False
        counted = [value for values in (seen["ncu"] or {}).values() for value in values.values()]
        return isinstance(seen["trace"], str) and all(isinstance(v, int | float) for v in counted)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _top(title: str, profiled: Iterable[_Profiled], facets: dict[str, str], folder: Path) -> Table:
    lines, of_rows = [], []
    why: dict[str, None] = {}
    for case, seen in profiled:
        trace = _trace(case, str(seen["trace"]), folder)
        for one in seen["top"][:_MOST]:
            per_call = one["total_us"] / one["calls"]
            measured = {
                "share": number(
                    f"{one['share']:.1%}", one["share"], exact(100 * one["share"], "%")
                ),
                "time each": number(duration(per_call * 1e-6), per_call, exact(per_call, "µs")),
                "calls": number(f"{one['calls']:,}", one["calls"]),
            }
            named = _named(case, "kernel or operator", one["name"])
            lines.append(named | measured | {"trace": trace})
            of_rows.append({"backend": str(case["backend"])})
        if not seen.get("ncu") and seen.get("ncu_why"):
            why[str(seen["ncu_why"])] = None
    note = f"No counters: {'; '.join(why)}." if why else ""
    return of_lines(title, lines, note, facets, rows=of_rows)


def _counters(title: str, profiled: Iterable[_Profiled], facets: dict[str, str]) -> list[Table]:
    lines, of_rows = [], []
    for case, seen in profiled:
        for kernel, values in (seen.get("ncu") or {}).items():
            counted = {h: _counter(values, name, h, scale) for name, h, scale in _COUNTERS}
            lines.append(_named(case, "kernel", kernel) | counted)
            of_rows.append({"backend": str(case["backend"])})
    note = "Of one call, by Nsight Compute; percentages are of the device's peak."
    return [of_lines(title, lines, note, facets, rows=of_rows)] if lines else []


def _named(case: Case, what: str, kernel: str) -> Line:
    named = word(_shortened(kernel), kernel)
    return {"N": number(f"{case['N']:,}", case["N"]), "backend": word(case["backend"]), what: named}


def _counter(values: dict[str, float], name: str, heading: str, scale: float) -> Cell:
    value = values.get(name)
    if value is None:
        return Cell(NOTHING, tip=f"{name} was not counted")
    return number(f"{value * scale:,.3g}", value, f"{heading}: {exact(value * scale)}")


def _trace(case: Case, name: str, folder: Path) -> Cell:
    """The trace's file name; a link where the file is there."""
    path = Path(case["file"]).parent / name
    shown = path.name if len(path.name) < 40 else f"…{path.name[-36:]}"
    if not (path.name.endswith(".trace.json.gz") and path.is_file()):
        return word(shown, f"{name}\n(not there)")
    return Cell(shown, shown.lower(), name, "", quote(os.path.relpath(path, folder)))


def _shortened(kernel: str) -> str:
    """A kernel's name without its template arguments, which fill lines."""
    name = kernel.partition("<")[0].removeprefix("void ")
    return name if len(name) <= 60 else f"{name[:57]}…"
