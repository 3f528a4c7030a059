"""The page's section on a GPU: what ``python -m bench.gpu`` saved, a folder of files a device."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linear_vit.reports import plots
from linear_vit.reports.page import proofs
from linear_vit.reports.page.kernel_sections import against_tokens, rate, short
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
from linear_vit.reports.saved.documents import Documents, Saved

HOW_TO_MEASURE = "python -m bench.gpu --minutes 8"
_MEASURED = "measured"
_SWEEPS = {
    "long": "one sequence",
    "single": "one head of one sequence",
    "crossover": "a batch of sequences",
    "vit": "a batch of images",
}
_OUTCOMES = {
    "huge": "Sizes past 2³¹ elements",
    "capture": "CUDA graphs: a captured call replayed on other inputs",
}
Result = dict[str, Any]


def section(found: Documents) -> Section:
    made = Section(
        "gpu",
        "On a GPU",
        "Correctness, ceilings, attention over length and batch, CUDA graphs and training steps, "
        "all from one command. GB/s are those of the operation's least traffic, whatever an "
        "implementation moves; of copy: that over the copy rate measured on the same device.",
    )
    for run in _folders(found.gpus):
        copy = next((rate for rate in found.each(run, _copy_rate) if rate), None)
        for part in found.each(run, functools.partial(_parts, copy)):
            made.tables += part.tables
            made.figures += part.figures
            made.notes += [note for note in part.notes if note not in made.notes]
    if not found.gpus:
        made.missing = HOW_TO_MEASURE
    return made


def _folders(files: Iterable[Saved]) -> list[list[Saved]]:
    folders: dict[Path, list[Saved]] = {}
    for saved in files:
        folders.setdefault(saved.path.parent, []).append(saved)
    return list(folders.values())


def _measured(results: list[Result]) -> list[Result]:
    return [r for r in results if r["status"] == _MEASURED]


def _copy_rate(saved: Saved) -> float | None:
    """Bytes a second, of the file that has it."""
    found = _measured(saved.content["results"]) if saved.content["section"] == "ceilings" else []
    return float(found[0]["copy_bytes_per_s"]) if found else None


@dataclass
class _Parts:
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _parts(copy: float | None, saved: Saved) -> _Parts:
    """What one file shows; ``copy`` is its device's copy rate."""
    content, made = saved.content, _Parts()
    section, results = content["section"], content["results"]
    where = proofs.machine(content["machine"])
    if content["dry_run"]:
        where = f"dry run, {where}"
        made.notes.append(
            f"A {where}: tiny sizes, to walk the code without a GPU; its times mean nothing."
        )
    done = _measured(results)
    if section == "check" and results:
        made.tables.append(_checks(results, where))
    elif section in _OUTCOMES and results:
        made.tables.append(_outcomes(f"{_OUTCOMES[section]}; {where}", results))
    elif section == "sweep":
        made.figures += _figures(done, where)
        made.tables += _sweeps(done, copy, where)
    elif done:
        tables = {"ceilings": _ceilings, "graphs": _graphs, "training": _training}
        made.tables.append(tables[section](done, where))
    if section in ("ceilings", "sweep", "graphs", "training"):
        made.notes += _not_measured(section, results)
    return made


def _contender(name: str) -> tuple[str, str]:
    """``linear_attention/triton`` as operation and backend; PyTorch's kernels are of SDPA."""
    operation, _, backend = name.partition("/")
    return ("softmax_attention", f"sdpa_{backend}") if operation == "sdpa" else (operation, backend)


def _facets(name: str, dtype: str) -> dict[str, str]:
    operation, backend = _contender(name)
    return {"operation": operation, "backend": backend, "dtype": dtype}


def _in_words(name: str) -> str:
    operation, backend = _contender(name)
    return f"{backend}, {plots.label(operation)}"


def _shape(shape: dict[str, int]) -> str:
    return f"B{shape['B']} H{shape['H']} N{shape['N']:,} D{shape['D']}"


def _ceilings(rows: list[Result], where: str) -> Table:
    found = rows[0]
    rates = found["matmul_flop_per_s"]
    copy, launch = found["copy_bytes_per_s"], found["launch_s"]
    cells = [number(f"{copy / 1e9:,.0f} GB/s", copy, exact(copy / 1e9, "GB/s"))]
    cells += [
        number(f"{value / 1e12:.3g} TFLOP/s", value, exact(value / 1e12, "TFLOP/s"))
        for value in rates.values()
    ]
    cells.append(number(plots.duration(launch), launch, exact(launch * 1e6, "µs")))
    titles = ["copy", *(f"{name} matmul" for name in rates), "launch"]
    return Table(f"Ceilings; {where}", columns(titles), [Row(cells)])


# Results against the reference.


def _checks(results: list[Result], where: str) -> Table:
    """A row per operation, dtype and head dim; a column per backend."""
    rows: dict[str, tuple[dict[str, str], dict[str, Cell]]] = {}
    backends: dict[str, None] = {}
    for r in results:
        what, _, backend = str(r["case"]).rpartition(" ")
        operation, dtype = what.split(" ")[:2]
        backends[backend] = None
        facets = {"operation": operation, "dtype": dtype}
        rows.setdefault(what, (facets, {}))[1][backend] = _check_cell(r)
    lines = [
        Row([word(what.replace("_", " ")), *(cells.get(b, Cell("")) for b in backends)], facets)
        for what, (facets, cells) in rows.items()
    ]
    titles = [Column("operation, dtype, head dim", words=True)]
    titles += [Column(name, words=True, facets={"backend": name}) for name in backends]
    right = sum(r["status"] == _MEASURED and not r["off"] for r in results)
    ran = sum(r["status"] in (_MEASURED, "failed") for r in results)
    note = (
        "✓ and the largest relative rms error of output and gradients against float64; ✗ where one "
        "is past its tolerance, or changes from one run to the next."
    )
    return Table(f"{right} of {ran} checks right; {where}", titles, lines, note)


def _check_cell(r: Result) -> Cell:
    if r["status"] != _MEASURED:
        failed = r["status"] == "failed"
        return Cell("✗" if failed else "–", None, str(r["reason"]), "failed" if failed else "")
    worst, tip = max(
        (
            error["rms_error"],
            f"{name}: rms {error['rms_error']:.1e} of {error['rms_tolerance']:.0e}\n{shape}",
        )
        for shape, errors in r["errors"].items()
        for name, error in errors.items()
    )
    if r["off"]:
        return Cell("✗", worst, str(r["off"]), "failed")
    return number(f"✓ {worst:.1e}", worst, tip, "passed")


# Times.


def _figures(rows: list[Result], where: str) -> Iterator[Figure]:
    """Time against N where a sweep has two lengths; one figure a kind, pass and dtype."""
    kinds = dict.fromkeys((r["what"], r["mode"], r["dtype"]) for r in rows)
    for what, mode, dtype in kinds:
        part = [r for r in rows if (r["what"], r["mode"], r["dtype"]) == (what, mode, dtype)]
        part.sort(key=lambda r: r["shape"]["N"])
        if len({r["shape"]["N"] for r in part}) < 2:
            continue
        lines = []
        for name in dict.fromkeys(name for r in part for name in r["times"]):
            points = [
                {
                    "x": r["shape"]["N"],
                    "y": short(r["times"][name]["seconds"]),
                    "low": short(r["times"][name]["interval_s"][0]),
                    "high": short(r["times"][name]["interval_s"][1]),
                }
                for r in part
                if name in r["times"]
            ]
            text = _in_words(name)
            hollow = _contender(name)[0] == "softmax_attention"
            line = {"name": text, "label": text, "points": points, "hollow": hollow}
            lines.append(_facets(name, dtype) | line)
        shape = part[0]["shape"]
        title = f"{_SWEEPS.get(what, what)}, B = {shape['B']}, H = {shape['H']}"
        yield against_tokens(
            f"Attention: time per call, {mode}, {title}; {dtype}, {where}",
            f"{_see(part)} Points: medians, with their 95 % intervals.",
            lines,
            {"label": "time per call", "base": 10, "unit": "seconds"},
        )


def _see(part: list[Result]) -> str:
    """The fastest linear and the fastest softmax attention, at either end."""
    said = []
    for r in (part[0], part[-1]):
        best = []
        for operation in ("linear_attention", "softmax_attention"):
            times = {
                name: t["seconds"]
                for name, t in r["times"].items()
                if _contender(name)[0] == operation
            }
            if times:
                name = min(times, key=times.__getitem__)
                best.append(f"{_in_words(name)} in {plots.duration(times[name])}")
        said.append(f"{r['shape']['N']:,} tokens: {'; '.join(best)}.")
    return " ".join(said)


def _sweeps(rows: list[Result], copy: float | None, where: str) -> Iterator[Table]:
    """A table per pass and dtype, a row per shape and contender; the fastest are marked."""
    for mode, dtype in dict.fromkeys((r["mode"], r["dtype"]) for r in rows):
        lines: list[Row] = []
        for r in rows:
            if (r["mode"], r["dtype"]) == (mode, dtype):
                lines += _sweep_rows(r, copy, dtype)
        titles = ["shape", "operation", "backend", "time", "GB/s", "of copy", "TFLOP/s", "memory"]
        titles.append("energy")
        words = ["shape", "operation", "backend"]
        title = f"Attention, {mode}; {dtype}, {where}"
        yield Table(title, columns(titles, words), lines)


def _sweep_rows(r: Result, copy: float | None, dtype: str) -> Iterator[Row]:
    fastest: dict[str, float] = {}
    for name, t in r["times"].items():
        operation = _contender(name)[0]
        fastest[operation] = min(t["seconds"], fastest.get(operation, t["seconds"]))
    for name, t in r["times"].items():
        operation, backend = _contender(name)
        share = t["bytes_per_s"] / copy if copy else None
        mark = "best" if t["seconds"] == fastest[operation] else ""
        cells = [
            word(_shape(r["shape"])),
            word(plots.label(operation)),
            word(backend, str(t["implementation"])),
            number(plots.duration(t["seconds"]), t["seconds"], _time_tip(t), mark),
            number(rate(t["bytes_per_s"] / 1e9), t["bytes_per_s"]),
            Cell("–") if share is None else number(f"{share:.0%}", share, exact(100 * share, "%")),
            number(rate(t["flop_per_s"] / 1e12), t["flop_per_s"]),
            _peak(t),
            _energy(t, "J a call"),
        ]
        yield Row(cells, _facets(name, dtype))
    for name, why in r["absent"].items():
        operation, backend = _contender(name)
        cells = [word(_shape(r["shape"])), word(plots.label(operation)), word(backend)]
        cells += [Cell("–", tip=str(why)), *(Cell("–") for _ in range(5))]
        yield Row(cells, _facets(name, dtype))


def _peak(t: Result) -> Cell:
    peak = t["peak_memory_bytes"]
    if peak is None:
        return Cell("–", tip=str(t.get("peak_memory_how", "")))
    return number(plots.mebibytes(peak / 2**20), peak)


def _energy(t: Result, unit: str) -> Cell:
    joules = t["joules"]
    if joules is None:
        return Cell("–", tip=str(t["joules_how"]))
    return number(f"{joules:.3g} J", joules, exact(joules, unit))


def _time_tip(t: Result) -> str:
    low, high = (value * 1e3 for value in t["interval_s"])
    return (
        f"{exact(t['seconds'] * 1e3, 'ms')} ({exact(low)} to {exact(high)})\n"
        f"{t['rounds']} rounds, quartiles {t['relative_iqr']:.1%} apart\n"
        f"stopped: {t['stop']}\n{t['clock']}"
    )


def _graphs(rows: list[Result], where: str) -> Table:
    """Called and replayed side by side; the difference is what launches cost."""
    lines = []
    for r in rows:
        for name in dict.fromkeys(name.rpartition(" ")[0] for name in r["times"]):
            called, replayed = (r["times"].get(f"{name} {how}") for how in ("called", "replayed"))
            operation, backend = _contender(name)
            why = str(r["absent"].get(f"{name} replayed", "not captured"))
            cells = [word(_shape(r["shape"])), word(r["mode"]), word(plots.label(operation))]
            cells.append(word(backend))
            for t in (called, replayed):
                cells.append(
                    Cell("–", tip=why)
                    if t is None
                    else number(plots.duration(t["seconds"]), t["seconds"], _time_tip(t))
                )
            gain = called["seconds"] / replayed["seconds"] if called and replayed else None
            cells.append(Cell("–") if gain is None else number(f"{gain:.2f}×", gain, exact(gain)))
            lines.append(Row(cells, _facets(name, r["dtype"])))
    titles = ["shape", "pass", "operation", "backend", "called", "replayed", "speed-up"]
    return Table(f"CUDA graphs; {where}", columns(titles, titles[:4]), lines)


def _training(rows: list[Result], where: str) -> Table:
    lines = []
    for r in rows:
        cells = [
            word(r["model"]),
            word(r["backend"]),
            number(plots.duration(r["seconds"]), r["seconds"], _time_tip(r)),
            number(f"{r['images_per_s']:,.0f}", r["images_per_s"]),
            _peak(r),
            _energy(r, "J a step"),
        ]
        lines.append(Row(cells, {"backend": str(r["backend"])}))
    settings = rows[0]["settings"]
    note = ", ".join(f"{k} {settings[k]}" for k in ("dataset", "dim", "depth", "batch_size", "amp"))
    titles = ["model", "backend", "time", "images/s", "memory", "energy"]
    return Table(f"Training step; {where}", columns(titles, titles[:2]), lines, note)


# What has no time.


def _outcomes(title: str, results: list[Result]) -> Table:
    lines = []
    for r in results:
        words = {_MEASURED: "✓ right", "failed": "✗ failed"}.get(r["status"], r["status"])
        mark = {_MEASURED: "passed", "failed": "failed"}.get(r["status"], "")
        lines.append(Row([word(r["case"]), word(words, str(r["reason"] or ""), mark)]))
    return Table(title, columns(["case", "result"], ["case", "result"]), lines)


def _not_measured(section: str, results: list[Result]) -> Iterator[str]:
    """One note a reason, for the cases that no table has."""
    reasons: dict[str, list[str]] = {}
    for r in results:
        if r["status"] != _MEASURED:
            why = f"{r['status']}: {r['reason']}"
            reasons.setdefault(why, []).append(f"{section}: {r['case']}")
    for why, cases in reasons.items():
        others = f" and {len(cases) - 1} more cases" if cases[1:] else ""
        yield f"{cases[0]}{others}: {why}"
