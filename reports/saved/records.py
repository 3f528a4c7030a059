"""Reads what training saved: records of runs, and the ablations made of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linear_vit.reports.saved.files import read_json

Record = dict[str, Any]

_RUN = "linear-vit-run/2"
_ABLATION = "linear-vit-ablation/1"
_BREAKDOWN = "linear-vit-step-breakdown/1"


def read_runs(folder: Path) -> tuple[list[Record], list[str]]:
    """Every finished run below a folder, and one line for each file that could not be used."""
    fields = {"status", "config", "environment", "model", "epochs"}
    runs, skipped = _read(folder.rglob("run.json"), _RUN, fields)
    return [run for run in runs if run["status"] == "finished"], skipped


def read_ablations(folder: Path) -> list[Record]:
    """The ablations saved in a folder; files that are none are left out."""
    return _read(folder.glob("ablation-*.json"), _ABLATION, {"setting", "rows", "best"})[0]


def read_breakdown(path: Path) -> Record:
    """The shares of a training step; ValueError where the file is none."""
    records, skipped = _read([path], _BREAKDOWN, {"environment", "setting", "rows"})
    if skipped:
        raise ValueError(skipped[0])
    return records[0]


def _read(paths: Iterable[Path], schema: str, fields: set[str]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    skipped: list[str] = []
    for path in sorted(paths):
        try:
            record = read_json(path)
            if not isinstance(record, dict) or record.get("schema") != schema:
                found = record.get("schema") if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"schema {found!r}, expected {schema!r}")
            if missing := fields - set(record):
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except ValueError as error:
            skipped.append(f"skipped {path}: {error}")
        else:
            records.append(record)
    return records, skipped
