"""The page's sections on proofs: checked against float64, compiled, bytes counted."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pandas as pd

from linear_vit.reports.page.parts import FACETS, Section
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import Words
from linear_vit.reports.tables.table import (
    NOTHING,
    Cell,
    Column,
    Line,
    Table,
    number,
    of_lines,
    word,
)

HOW_TO_CHECK = "python -m bench check --json reports/out/check.json"
HOW_TO_COMPILE = "python -m bench static --json reports/out/static.json"
HOW_TO_COUNT = "python -m bench traffic --json reports/out/traffic.json"


# Checked.


def correctness(found: Documents) -> Section:
    made = found.each(found.checks, partial(_matrix, _words(found)))
    return Section(
        "correctness",
        "Correctness",
        "Output and every gradient against the float64 reference: ✓ and the largest relative rms "
        "error where all are within tolerance, ✗ where one is not, – where a backend can't run "
        "here. Point at a cell for the tensor, its tolerance, or the reason.",
    ).add(made, HOW_TO_CHECK)


def _matrix(words: Words, saved: Saved) -> tuple[Table, list[str]]:
    results = saved.content["results"]
    backends = list(dict.fromkeys(str(r["backend"]) for r in results))
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    unusable: dict[str, list[str]] = {}
    notes = []
    for r in results:
        if r["status"] == "failed":
            where = f"{r['operation']} {r['dtype']} {r['backend']}"
            notes.append(f"Failed: {where}: {r['reason']}")
        elif r["status"] != "passed":
            unusable.setdefault(str(r["reason"]), []).append(str(r["backend"]))
        rows.setdefault((r["operation"], r["dtype"]), {})[r["backend"]] = _check_cell(r)
    notes += [f"{', '.join(dict.fromkeys(who))}: {why}" for why, who in unusable.items()]
    if any(r["mode"] == "interpreter" and r["status"] == "passed" for r in results):
        notes.append(
            "(interpreter): Triton's kernels run instruction by instruction on the CPU, on small "
            "shapes; this shows that they are right and says nothing about their speed."
        )
    lines = []
    for (operation, dtype), cells in rows.items():
        names = {"operation": word(words.operation(operation)), "dtype": word(dtype)}
        lines.append(names | {backend: cells.get(backend, Cell("")) for backend in backends})
    facets = [{"operation": operation, "dtype": dtype} for operation, dtype in rows]
    passed = sum(r["status"] == "passed" for r in results)
    ran = passed + sum(r["status"] == "failed" for r in results)
    title = f"{passed} of {ran} that can run here agree; {machine(saved.content['machine'])}"
    heads = {name: Column(name, words=True, facets={"backend": name}) for name in backends}
    return of_lines(title, lines, rows=facets, heads=heads), notes


def _check_cell(r: dict[str, Any]) -> Cell:
    if r["status"] == "passed":
        mark = " (interpreter)" if r["mode"] == "interpreter" else ""
        error = float(r["worst_rms_error"])
        return Cell(f"✓ {error:.1e}{mark}", error, _worst(r), "passed")
    if r["status"] == "failed":
        return Cell("✗ failed", float("inf"), f"{r['reason']}\n{_worst(r)}".strip(), "failed")
    why = "not usable here" if r["status"] == "unusable" else r["status"]
    return Cell(NOTHING, None, f"{why}: {r['reason']}", "unusable")


def _worst(r: dict[str, Any]) -> str:
    tensors = [t for t in r["tensors"] if t.get("rms_error") is not None]
    if not tensors:
        return f"relative rms error {r['worst_rms_error']:.3e}" if r.get("worst_rms_error") else ""
    t = max(tensors, key=lambda t: t["rms_error"] / t["rms_tolerance"])
    return (
        f"{len(tensors)} tensors checked; nearest to its tolerance: {t['tensor']}, rms "
        f"{t['rms_error']:.3e} of {t['rms_tolerance']:.0e} allowed, {t['shape']}"
    )


# Compiled.


_STATIC_KEY = ["backend", "room", "kernel", "architecture"]


def static(found: Documents) -> Section:
    made = found.each(found.statics, partial(_compiled, _operations(found)))
    return Section(
        "static",
        "Compiled kernels",
        "Every kernel and configuration that ships, compiled for every architecture, with no GPU. "
        "A line is a kernel's range over its head dims, dtypes and tiles; spilled bytes and shared "
        "memory are those that ptxas reports, the instruction counts are of the machine code, and "
        "the occupancy is what registers and shared memory allow.",
    ).add(made, HOW_TO_COMPILE)


def _compiled(known: Iterable[str], saved: Saved) -> tuple[Table, list[str]]:
    rows = saved.content["rows"]
    wrong = [row for row in rows if row["faults"]]
    notes = [
        f"{row['backend']} {row['room']} {row['kernel']} {row['architecture']} D={row['head_dim']} "
        f"{row['dtype']}: {'; '.join(row['faults'])}"
        for row in wrong
    ]
    lines, of_rows = [], []
    for key, part in pd.DataFrame(rows).groupby(_STATIC_KEY, sort=False):
        backend, room, kernel, architecture = map(str, key)
        shared = (part["static_shared"] + part["dynamic_shared"].fillna(0)) / 1024
        spilled = int((part["spill_stores"] + part["spill_loads"]).max())
        lines.append(
            {
                "backend": word(backend),
                "kernel": word(f"{room}: {kernel}"),
                "architecture": word(architecture),
                "configurations": number(str(len(part)), len(part)),
                "registers": _range(part["registers"]),
                "spilled bytes": number(f"{spilled:,}", spilled, "", "failed" if spilled else ""),
                "shared KiB": _range(shared.round()),
                "occupancy": _range(100 * part["occupancy"].dropna(), " %"),
                "tensor-core instructions": _range(part["tensor_core"]),
                "16-byte accesses": _range(part["wide_loads"] + part["wide_stores"]),
            }
        )
        dtypes = "|".join(sorted({str(name) for name in part["dtype"]}))
        of_rows.append({"operation": _of_room(room, known), "backend": backend, "dtype": dtypes})
    title = f"{len(rows):,} kernels compiled, {len(wrong)} at fault"
    return of_lines(title, lines, rows=of_rows), notes


# Counted.


def traffic(found: Documents) -> Section:
    made = found.each(found.traffics, partial(_counted, _words(found)))
    return Section(
        "traffic",
        "Traffic",
        "Bytes that the Triton kernels load and store, counted while Triton's interpreter runs "
        "them: exact, and the same on any machine. Beside each tensor, how often the least traffic "
        "that is; what is neither input nor result is workspace, as a share of the whole least "
        "traffic. A byte loaded twice counts twice, though the second time may come from a cache.",
    ).add(made, HOW_TO_COUNT)


def _counted(words: Words, saved: Saved) -> tuple[Table, list[str]]:
    rows = saved.content["rows"]
    alike = {"backend": "triton"}  # of files that don't say it
    facets = [{name: (alike | row)[name] for name in FACETS} for row in rows]
    lines = [_traffic_line(words, row) for row in rows]
    return of_lines(f"{len(rows):,} tensors counted", lines, rows=facets), []


def _traffic_line(words: Words, row: dict[str, Any]) -> Line:
    launches, counted = row["launches"].split(), ("loaded", "distinct", "stored")
    loaded, distinct, stored = (number(f"{row[name]:,}", row[name]) for name in counted)
    return {
        "operation": word(words.operation(row["operation"])),
        "pass": word(row["pass"]),
        "dtype": word(row["dtype"]),
        "shape": word(row["shape"]),
        "launches": number(str(len(launches)), len(launches), ", ".join(launches)),
        "tensor": word(row["tensor"]),
        "loaded": loaded,
        "of them distinct": distinct,
        "stored": stored,
        "× least": _times_least(row),
    }


def _times_least(row: dict[str, Any]) -> Cell:
    ratio = row["ratio"]
    if row["tensor"] == "workspace":  # beside the least traffic, not a part of it
        return Cell(NOTHING) if ratio is None else number(f"+{ratio:.1%}", ratio)
    return Cell("not needed") if ratio is None else number(f"{ratio:.2f}", ratio, f"{ratio:.6g}")


# Words.


def _words(found: Documents) -> Words:
    return found.runs.words if found.runs else Words()


def _operations(found: Documents) -> list[str]:
    """Every operation that something saved is about."""
    names = list(_words(found).operations)
    for saved, rows in ((found.checks, "results"), (found.traffics, "rows")):
        for one in saved:
            names += [str(row.get("operation")) for row in one.content[rows]]
    return list(dict.fromkeys(names))


def _of_room(room: str, known: Iterable[str]) -> str:
    """The operations that a folder of kernels makes, by their common beginning, as a facet."""
    return "|".join(name for name in known if name.startswith(room)) or room


def machine(facts: dict[str, Any]) -> str:
    return f"{machines.label(facts)}, {facts.get('cores', '?')} cores"


def _range(values: pd.Series, unit: str = "") -> Cell:
    if values.empty:
        return Cell(NOTHING)
    low, high = round(values.min()), round(values.max())
    return number(f"{low:,}{unit}" if low == high else f"{low:,} – {high:,}{unit}", high)
