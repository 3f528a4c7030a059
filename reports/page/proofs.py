"""The page's sections on proofs: checked against float64, compiled, bytes counted."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from linear_vit.reports.page.parts import Part, Seen
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.documents import Saved
from linear_vit.reports.saved.runs import Words
from linear_vit.reports.tables.table import NOTHING, Cell, Column, Line, Table, count, number, word
from linear_vit.screen import counted

# Checked.


def correctness(seen: Seen) -> Iterator[Part]:
    yield from seen.each(seen.found.checks, lambda saved: _matrix(seen.words, saved))


def checked(content: dict[str, Any]) -> tuple[int, int]:
    """How many checks agreed, and how many could be made."""
    found = [r["status"] for r in content["results"]]
    return found.count("passed"), found.count("passed") + found.count("failed")


def _matrix(words: Words, saved: Saved) -> Iterator[Part]:
    results = saved.content["results"]
    backends = list(dict.fromkeys(str(r["backend"]) for r in results))
    rows: dict[tuple[str, str], Line] = {}
    unusable: dict[str, list[str]] = {}
    for r in results:
        if r["status"] == "failed":
            yield f"Failed: {r['operation']} {r['dtype']} {r['backend']}: {r['reason']}"
        elif r["status"] != "passed":
            unusable.setdefault(str(r["reason"]), []).append(str(r["backend"]))
        operation, dtype = str(r["operation"]), str(r["dtype"])
        names = {
            "operation": word(words.operation(operation), operation=operation),
            "dtype": word(dtype, dtype=dtype),
        }
        new = names | {backend: Cell("") for backend in backends}
        rows.setdefault((operation, dtype), new)[r["backend"]] = _check_cell(r)
    yield from (f"{', '.join(dict.fromkeys(who))}: {why}" for why, who in unusable.items())
    if any(r["mode"] == "interpreter" and r["status"] == "passed" for r in results):
        yield (
            "(interpreter): Triton's kernels run instruction by instruction on the CPU, on small "
            "shapes; this shows that they are right and says nothing about their speed."
        )
    passed, ran = checked(saved.content)
    title = f"{passed} of {ran} that can run here agree; {machine(saved.content['machine'])}"
    heads = {name: Column(name, words=True, facets={"backend": name}) for name in backends}
    yield Table(title, list(rows.values()), heads=heads)


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
        f"{counted(len(tensors), 'tensor')} checked; nearest to its tolerance: {t['tensor']}, rms "
        f"{t['rms_error']:.3e} of {t['rms_tolerance']:.0e} allowed, {t['shape']}"
    )


# Compiled.


def static(seen: Seen) -> Iterator[Part]:
    yield from seen.each(seen.found.statics, lambda saved: _compiled(_operations(seen), saved))


def _compiled(known: Iterable[str], saved: Saved) -> Iterator[Part]:
    rows = saved.content["rows"]
    wrong = [row for row in rows if row["faults"]]
    for row in wrong:
        yield (
            f"{row['backend']} {row['room']} {row['kernel']} {row['architecture']} "
            f"D={row['head_dim']} {row['dtype']}: {'; '.join(row['faults'])}"
        )
    parts = pd.DataFrame(rows).groupby(["backend", "room", "kernel", "architecture"], sort=False)
    lines = [_of_kernel(known, part, *map(str, key)) for key, part in parts]
    said = f"{counted(len(rows), 'kernel')} compiled, {len(wrong)} at fault"
    yield Table(
        said + _by(saved.content.get("toolchain") or {}, {row["backend"] for row in rows}), lines
    )


def _by(toolchain: dict[str, str | None], backends: set[str]) -> str:
    """Which versions compiled these backends' kernels."""
    tools = {"cuda": "nvcc", "triton": "triton", "sdpa": "torch"}
    found = {tool: toolchain.get(tool) for backend, tool in tools.items() if backend in backends}
    text = ", ".join(f"{tool} {version}" for tool, version in found.items() if version)
    return f"; {text}" if text else ""


def _of_kernel(
    known: Iterable[str], part: pd.DataFrame, backend: str, room: str, kernel: str, where: str
) -> Line:
    # The operations that a folder of kernels makes, by their common beginning.
    operations = "|".join(name for name in known if name.startswith(room)) or room
    dtypes = "|".join(sorted({str(name) for name in part["dtype"].dropna()}))
    spilled = (part["spill_stores"] + part["spill_loads"]).dropna()
    # A few bytes beside the main loops are no fault (bench.static.faults).
    too_much = any(fault.startswith("spills") for found in part["faults"] for fault in found)
    shared = (part["static_shared"] + part["dynamic_shared"].fillna(0)) / 1024
    return {
        "backend": word(backend, backend=backend),
        "kernel": word(f"{room}: {kernel}", operation=operations, dtype=dtypes),
        "architecture": word(where),
        "configurations": count(len(part)),
        "registers": _range(part["registers"]),
        "spilled bytes": replace(_range(spilled), mark="failed" if too_much else ""),
        "shared KiB": _range(shared.round()),
        "occupancy": _range(100 * part["occupancy"].dropna(), " %"),
        "tensor core": _range(part["tensor_core"]),
        "wide accesses": _range(part["wide_loads"] + part["wide_stores"]),
        **_main_loops(part),
    }


_TILE = ["steady", "steady_barriers", "issue_us", "copy_us", "copy_share"]


def _main_loops(part: pd.DataFrame) -> Line:
    """What a warp runs for a tile, and what that leaves of memory's copy rate."""
    if "steady" not in part:  # older files have no such columns
        return {}
    # Any of them may be missing from all rows.
    timed = part.reindex(columns=[*_TILE, "steady_tensor_core"]).dropna(subset=_TILE)
    if timed.empty:
        return {"instructions a tile": Cell(NOTHING), "issue / copy": Cell(NOTHING)}
    barriers, possible = (_range(timed["steady_barriers"]), _range(100 * timed["copy_share"], " %"))
    ratio = _range(100 * timed["issue_us"] / timed["copy_us"], " %")
    products = timed[timed["steady_tensor_core"] > 0]
    of_products = products["steady"] / products["steady_tensor_core"]
    each = f"; to one of the tensor cores: {of_products.mean():.1f}" if len(products) else ""
    return {
        "instructions a tile": replace(
            _range(timed["steady"]), tip=f"of one warp; barriers: {barriers.text}{each}"
        ),
        "issue / copy": replace(
            ratio,
            tip="the least time to start a tile's instructions, over the time to copy its bytes; "
            f"at most {possible.text} of the copy rate is possible",
        ),
    }


def _operations(seen: Seen) -> list[str]:
    """Every operation that something saved is about."""
    names = list(seen.words.operations)
    for saved, rows in ((seen.found.checks, "results"), (seen.found.traffics, "rows")):
        names += [str(row.get("operation")) for one in saved for row in one.content[rows]]
    return list(dict.fromkeys(names))


def _range(values: pd.Series, unit: str = "") -> Cell:
    if values.empty:
        return Cell(NOTHING)
    low, high = round(values.min()), round(values.max())
    return number(high, f"{{:,}}{unit}" if low == high else f"{low:,} – {{:,}}{unit}")


# Counted.


def traffic(seen: Seen) -> Iterator[Part]:
    yield from seen.each(seen.found.traffics, lambda saved: [_counted(seen.words, saved)])


def _counted(words: Words, saved: Saved) -> Table:
    rows = saved.content["rows"]
    return Table(
        f"{counted(len(rows), 'tensor')} counted", [_traffic_line(words, row) for row in rows]
    )


def _traffic_line(words: Words, row: dict[str, Any]) -> Line:
    launches, operation = row["launches"].split(), row["operation"]
    backend = row.get("backend", "triton")  # of files that don't say it
    return {
        "operation": word(words.operation(operation), operation=operation, backend=backend),
        "pass": word(row["pass"]),
        "dtype": word(row["dtype"], dtype=row["dtype"]),
        "shape": word(row["shape"]),
        "launches": count(len(launches), ", ".join(launches)),
        "tensor": word(row["tensor"]),
        "loaded": count(row["loaded"]),
        "of them distinct": count(row["distinct"]),
        "stored": count(row["stored"]),
        "× least": _times_least(row),
    }


def _times_least(row: dict[str, Any]) -> Cell:
    if row["tensor"] == "workspace":  # beside the least traffic, not a part of it
        return number(row["ratio"], "+{:.1%}")
    return Cell("not needed") if row["ratio"] is None else number(row["ratio"], "{:.2f}")


def machine(facts: Mapping[str, Any]) -> str:
    """A machine's label, and its cores where they are known."""
    cores = f", {counted(facts['cores'], 'core')}" if facts.get("cores") else ""
    return machines.label(facts) + cores
