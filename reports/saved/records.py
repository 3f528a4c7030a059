"""Reads everything saved but timed runs: each kind by its schema; what is damaged is named."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linear_vit.reports.saved import schema_records as schema
from linear_vit.reports.saved.files import read_json
from linear_vit.reports.saved.schema import Damaged, check

Record = dict[str, Any]

# Pattern of the file names of each kind, and its schema.
KINDS = {
    "checks": ("check.json", schema.Check),
    "tables": ("table.json", schema.ResultsTable),
    "ablations": ("ablation-*.json", schema.Ablation),
    "breakdowns": ("step-breakdown.json", schema.Breakdown),
    "statics": ("static*.json", schema.Static),
    "traffics": ("traffic.json", schema.Traffic),
    "runs": ("run.json", schema.Started),
}


@dataclass(frozen=True)
class Saved:
    path: Path
    content: Record


def read(path: Path, kind: str) -> Record:
    """One file of a kind, of ``KINDS``.

    Raises:
        Damaged: it can't be read, or is not what it should be; the message names file and field.
    """
    try:
        content: Record = read_json(path)
        check(KINDS[kind][1], content)
        if kind == "runs" and content["status"] == "finished":
            check(schema.Finished, content)
    except ValueError as error:
        raise Damaged(f"{path}: {error}") from error
    return content


def below(folder: Path, kind: str) -> tuple[list[Saved], list[str]]:
    """Every file of a kind in a folder and those below it, and a line for each that is damaged."""
    found, skipped = [], []
    for path in sorted(folder.rglob(KINDS[kind][0]), key=lambda path: path.with_suffix("")):
        try:
            found.append(Saved(path, read(path, kind)))
        except Damaged as error:
            skipped.append(str(error))
    return found, skipped


def read_runs(folder: Path) -> tuple[list[Record], list[str]]:
    """Every finished run below a folder, and one line for each file that could not be used."""
    found, skipped = below(folder, "runs")
    return [one.content for one in found if one.content["status"] == "finished"], skipped


def read_ablations(folder: Path) -> tuple[list[Record], list[str]]:
    """The ablations saved in a folder, and one line for each file that could not be used."""
    found, skipped = below(folder, "ablations")
    return [one.content for one in found], skipped


def read_breakdown(path: Path) -> Record:
    """The shares of a training step; Damaged where the file is none."""
    return read(path, "breakdowns")


def read_exponents(path: Path) -> tuple[list[Record], list[str]]:
    """Rows of exponents.csv with a fit, and one line for each that is damaged.

    Raises:
        Damaged: it can't be read.
    """
    found, skipped = [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise Damaged(f"{path}: no readable exponents.csv ({error})") from error
    for line, row in enumerate(rows, 2):
        try:
            made = check(schema.Exponents, {k: v for k, v in row.items() if v is not None})
        except Damaged as error:
            skipped.append(f"{path}: line {line}: {error}")
        else:
            if not made.reason:
                found.append(made.model_dump(by_alias=True))
    return found, skipped
