"""What the commands show and write: tables for a terminal, and files of rows."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from linear_vit import screen


def draw(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    width: int | None = None,
    colour: bool | None = None,
    *,
    keys: int = 1,
) -> str:
    """A table that fits ``width`` columns, the screen's if that is None; nothing in it is cut.

    ``keys`` is how many columns, from the first, say what a row is about.
    """
    width = screen.width() if width is None else width
    colour = sys.stdout.isatty() if colour is None else colour
    heading = screen.prose(title, width)
    heading = f"\033[1m{heading}\033[0m" if colour else heading
    words = [True] * keys
    table = screen.draw(columns, rows, words=words, keys=keys, at_most=width, colour=colour)
    return f"{heading}\n\n{table}\n"


OUT = "write every row there: FILE.csv, or FILE.json with its toolchain"


def add_old_options(parser: argparse.ArgumentParser) -> None:
    """``--csv FILE`` and ``--json FILE``, which may both be given; --help has ``--out``."""
    for name in ("--csv", "--json"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)


def write(document: dict[str, Any], columns: Sequence[str], given: argparse.Namespace) -> None:
    """Write a document, or these columns of its rows alone, where ``--out`` and the like say."""
    is_csv = given.out is not None and given.out.suffix == ".csv"
    for path in (given.json, None if is_csv else given.out):
        if path is not None:
            write_json(document, path)
    for path in (given.csv, given.out if is_csv else None):
        if path is not None:
            write_csv(document["rows"], columns, path)


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document as JSON, a row a line: small, and a diff shows the rows that changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({name: x for name, x in document.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in document["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def write_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Write these columns: lists as words, ratios to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row[name]) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return "; ".join(value) if isinstance(value, list) else value
