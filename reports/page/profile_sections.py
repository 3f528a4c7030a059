"""The page's section on profiles: what ``pytest --benchmark-only --profile`` saw in each case."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from linear_vit.reports.page.cases import Case, by, cases
from linear_vit.reports.page.parts import Part, Seen
from linear_vit.reports.tables.table import Cell, Facets, Line, Table, count, number, word
from linear_vit.reports.units import capital, duration, exact

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


def section(seen: Seen) -> Iterator[Part]:
    """Top kernels and counters of every profiled case; of a brief page none."""
    for group in () if seen.brief else seen.groups:
        for (operation, mode), part in by(cases(group.frame), "operation", "pass").items():
            profiled = []
            for case in part:
                profile = case["info"].get("profile")
                if isinstance(profile, dict) and profile and _is_sound(profile):
                    profiled.append((case, profile))
                elif profile:
                    yield f"{case['file']}: damaged profile of {case['backend']}"
            if profiled:
                what = capital(group.words.operation(operation))
                what += f", {mode.replace('+', ' + ')}; {group.where}"
                facets = {"operation": operation, "dtype": group.dtype}
                yield _top(what, profiled, facets, seen.folder)
                yield from _counters(f"Counters: {what}", profiled, facets)


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


def _top(title: str, profiled: list[_Profiled], facets: Facets, folder: Path) -> Table:
    lines = [
        _named(case, "kernel or operator", one["name"])
        | {
            "share": number(one["share"], "{:.1%}", exact(100 * one["share"], "%")),
            "time each": number(1e-6 * one["total_us"] / one["calls"], duration),
            "calls": count(one["calls"]),
            "trace": _trace(case, profile["trace"], folder),
        }
        for case, profile in profiled
        for one in profile["top"][:_MOST]
    ]
    why = dict.fromkeys(p["ncu_why"] for _, p in profiled if not p.get("ncu") and p.get("ncu_why"))
    return Table(title, lines, f"No counters: {'; '.join(map(str, why))}." if why else "", facets)


def _counters(title: str, profiled: list[_Profiled], facets: Facets) -> Iterator[Table]:
    lines = [
        _named(case, "kernel", kernel)
        | {heading: _counter(values, name, scale) for name, heading, scale in _COUNTERS}
        for case, profile in profiled
        for kernel, values in (profile.get("ncu") or {}).items()
    ]
    note = "Of one call, by Nsight Compute; percentages are of the device's peak."
    if lines:
        yield Table(title, lines, note, facets)


def _named(case: Case, what: str, kernel: str) -> Line:
    backend = str(case["backend"])
    named = {what: word(_shortened(kernel), kernel)}
    return {"N": count(case["N"]), "backend": word(backend, backend=backend), **named}


def _counter(values: dict[str, float], name: str, scale: float) -> Cell:
    return number(scale * values[name] if name in values else None, "{:,.3g}")


def _trace(case: Case, name: str, folder: Path) -> Cell:
    """The trace's file name; a link where the file is there."""
    path = Path(case["file"]).parent / name
    shown = path.name if len(path.name) < 40 else f"…{path.name[-36:]}"
    if not (path.name.endswith(".trace.json.gz") and path.is_file()):
        return word(shown, f"{name}\n(not there)")
    return Cell(shown, shown.lower(), name, link=quote(os.path.relpath(path, folder)))


def _shortened(kernel: str) -> str:
    """A kernel's name without its template arguments, which fill lines."""
    name = kernel.partition("<")[0].removeprefix("void ")
    return name if len(name) <= 60 else f"{name[:57]}…"
