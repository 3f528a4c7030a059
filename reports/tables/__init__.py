"""Every table that is written: from records and saved runs to Markdown, CSV and JSON.

What ``train_minimal.py`` and ``python -m reports`` call; each function writes into ``out`` and
returns what a terminal shows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linear_vit.reports.groups import groups
from linear_vit.reports.saved import machines, records, runs
from linear_vit.reports.saved.files import write_json, write_text
from linear_vit.reports.saved.runs import NoRuns
from linear_vit.reports.tables import ablation, breakdown, power, results, results_text, steps
from linear_vit.reports.tables.results import Exponents
from linear_vit.reports.tables.scaling import fit_frame
from linear_vit.reports.tables.table import Part, Table, join, on_screen

_OF_FITS = {"machine", "operation", "pass", "dtype", "backend", "exponent", "low", "high"}


def write_results(
    folder: Path,
    out: Path,
    *,
    speeds: Sequence[Path] | None = None,
    exponents: Path | None = None,
    ablations: Path | None = None,
) -> str:
    """The results table: table.md, table.csv and table.json.

    Args:
        folder: searched for run.json with its sub-folders.
        out: where the table goes.
        speeds: saved runs with the models' training steps; None takes those in ``folder`` itself.
        exponents: exponents.csv of ``python -m reports scaling``, or a saved run; None takes the
            newest saved run in ``out`` or the folder above. Only what was measured on the machine
            of the records is shown.
        ablations: folder of ablation-*.json, which are told of below the table.

    Raises:
        NoRuns: there is no such folder, or a file that was asked for can't be read.
    """
    if not folder.is_dir():
        raise NoRuns(f"no folder {folder} of run records")
    found, skipped = records.read_runs(folder)
    timed = _load(sorted(folder.glob("*.json")) if speeds is None else list(speeds))
    told, more = records.read_ablations(ablations) if ablations else ([], [])
    fits = _near(out, found) if exponents is None else read_exponents(exponents)
    skipped += [*more, *(fits.skipped if fits else ()), *(timed.skipped if timed else ())]
    content = results.make(
        found,
        steps=timed.training if timed else None,
        exponents=fits,
        ablations=told,
    )
    parts, rows = results_text.document(content), results_text.to_csv(content)
    return _write(out, "table", parts, rows, content, skipped, "md,csv,json")


def write_ablation(
    setting: str,
    configs: Sequence[Mapping[str, Any]],
    folder: Path,
    out: Path,
    *,
    environment: Mapping[str, Any] | None = None,
    speeds: Sequence[Path] | None = None,
) -> str:
    """One setting varied: ablation-SETTING.md, .csv, .json and .svg.

    Args:
        setting: the name of the field that is varied.
        configs: of every value and seed, as a record's ``config`` has them.
        folder: searched for run.json with its sub-folders.
        out: where the files go.
        environment: of the machine whose runs count; None takes that of the latest run.
        speeds: saved runs with the training steps of every value; None takes those in ``folder``.

    Raises:
        NoRuns: no finished run is of one of these configurations.
    """
    found, skipped = records.read_runs(folder)
    timed = _load(sorted(folder.glob("*.json")) if speeds is None else list(speeds))
    skipped += timed.skipped if timed else []
    of_steps = timed.training if timed else None
    try:
        content = ablation.make(setting, configs, found, environment=environment, steps=of_steps)
    except ValueError as error:
        raise NoRuns(str(error)) from error
    name, parts = f"ablation-{setting}", _document([ablation.as_table(content)])
    write_text(out / f"{name}.svg", ablation.plot(content))
    kinds = "md,csv,json,svg"
    return _write(out, name, parts, ablation.to_csv(content), content, skipped, kinds)


def write_steps(run: Path, out: Path) -> str:
    """Timed training steps of a saved run: step-speed.md and .csv.

    Raises:
        NoRuns: the file holds no timed training step.
    """
    found = steps.groups(runs.load([run]))
    if not found:
        raise NoRuns(f"{run} holds no timed training step")
    parts = _document([steps.as_table(one) for one in found])
    return _write(out, "step-speed", parts, steps.to_csv(found))


def write_breakdown(record: Path, out: Path) -> str:
    """Shares of a training step, of a step-breakdown.json: step-breakdown.md and .csv.

    Raises:
        NoRuns: the file is none.
    """
    try:
        found = records.read_breakdown(record)
    except records.Damaged as error:
        raise NoRuns(str(error)) from error
    parts = _document([breakdown.as_table(found)])
    return _write(out, "step-breakdown", parts, breakdown.to_csv(found))


def write_power(folder: Path, out: Path) -> str:
    """False alarms and power of ``compare``: repeats.md, .csv and .json.

    Args:
        folder: of repeats.json, or of the runs that it is made of.
        out: where the files go.

    Raises:
        NoRuns: the folder has neither.
    """
    kept = folder / "repeats.json"
    record = power.read(kept) if kept.exists() else power.condensed(folder)
    rows = power.of_each(record)
    parts = _document([power.as_table(record, rows)])
    return _write(out, "repeats", parts, power.to_csv(rows), record, kinds="md,csv,json")


def read_exponents(path: Path) -> Exponents:
    """Measured exponents of an exponents.csv or a saved run, of which those with a fit.

    Raises:
        NoRuns: the file is neither.
    """
    if path.suffix == ".json":
        return _fitted(path)
    try:
        rows, skipped = records.read_exponents(path)
    except records.Damaged as error:
        raise NoRuns(str(error)) from error
    if not rows and skipped:
        raise NoRuns(f"no exponents.csv of `python -m reports scaling`: {skipped[0]}")
    return Exponents(str(path), rows, skipped)


def _near(out: Path, found: Sequence[records.Record]) -> Exponents | None:
    """Of the saved runs beside the table, or in the folder above: the newest of each machine.

    Of runs on a record's machine and PyTorch, one of its revision comes before all others.
    """
    taken: dict[str, Exponents] = {}
    environments = {machines.label(run["environment"]): run["environment"] for run in found}
    for where in environments.values():
        for folder in (out, out.parent):
            loaded = _load(sorted(folder.glob("*.json")))
            heads = [h for h in loaded.heads if machines.same(h["facts"], where)] if loaded else []
            heads.sort(key=lambda head: _preference(head, where), reverse=True)
            fits = (_fitted(Path(head["file"])) for head in heads)
            if newest := next((one for one in fits if one.rows), None):
                taken.setdefault(str(newest.source), newest)
                break
    rows = [row for one in taken.values() for row in one.rows]
    return Exponents(", ".join(taken), rows) if taken else None


def _preference(head: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[bool, str]:
    return head["facts"].get("git") == where.get("revision"), head["datetime"]


def _fitted(run: Path) -> Exponents:
    rows = fit_frame(groups(runs.load([run]))).to_dict("records")
    return Exponents(str(run), [row for row in rows if not row["reason"]])


def _load(paths: Sequence[Path]) -> runs.Runs | None:
    """The saved runs among these files; None without one."""
    try:
        return runs.load(paths)
    except NoRuns:
        return None


def _document(tables: Sequence[Table]) -> list[Part]:
    parts: list[Part] = []
    for table in tables:
        parts += [f"{table.title}.", table, *filter(None, [table.note])]
    return parts


def _write(
    out: Path,
    name: str,
    parts: Sequence[Part],
    rows: str,
    content: Any = None,
    skipped: Sequence[str] = (),
    kinds: str = "md,csv",
) -> str:
    """Write NAME.md, .csv and, with a content, .json; what a terminal shows of it."""
    write_text(out / f"{name}.md", join(parts))
    write_text(out / f"{name}.csv", rows)
    if content is not None:
        write_json(out / f"{name}.json", content)
    lines = [f"skipped {line}" for line in skipped]
    return "\n".join(["", on_screen(parts), *lines, f"written to {out}/{name}.{{{kinds}}}"])
