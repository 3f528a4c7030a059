"""A table as plain data: built once, then written as Markdown or CSV, or drawn by the page.

``facets`` say which operation, backend and dtype a part belongs to, so that the page's filters can
hide it; a part without a facet is never hidden by the filter of that name.
"""

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from linear_vit.reports.units import exact

Facets = dict[str, str]  # a facet's name to one value, or to several with | between


@dataclass(frozen=True)
class Cell:
    """``value`` is what a column is sorted by (None sorts last), ``tip`` the exact figure.

    ``link`` is an address relative to the page, or empty.
    """

    text: str
    value: float | str | None = None
    tip: str = ""
    mark: str = ""
    link: str = ""


@dataclass(frozen=True)
class Column:
    """``words`` stand on the left, numbers on the right."""

    title: str
    words: bool = False
    facets: Facets = field(default_factory=dict)
    tip: str = ""


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    facets: Facets = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[Column]
    rows: list[Row]
    note: str = ""
    facets: Facets = field(default_factory=dict)


Line = dict[str, Cell]  # a row's cells by column
NOTHING = "–"


def of_lines(
    title: str,
    lines: Sequence[Line],
    note: str = "",
    facets: Facets | None = None,
    *,
    rows: Sequence[Facets] = (),
    heads: Mapping[str, Column] | None = None,
    words: Sequence[str] = (),
) -> Table:
    """A table of such lines, which all have the same columns; there is at least one.

    Args:
        facets: of the table as a whole.
        rows: facets of each row.
        heads: columns, by title, that have a tip or facets of their own.
        words: columns that stand on the left, besides those that hold nothing but names.
    """
    columns = [
        (heads or {}).get(name)
        or Column(name, name in words or all(isinstance(line[name].value, str) for line in lines))
        for name in lines[0]
    ]
    of_rows = rows or [{} for _ in lines]
    made = [Row(list(line.values()), of) for line, of in zip(lines, of_rows, strict=True)]
    return Table(title, columns, made, note, facets or {})


def without_empty(lines: Sequence[Line]) -> list[Line]:
    """The lines without the columns that say nothing in any of them."""
    kept = [name for name in lines[0] if any(line[name].text != NOTHING for line in lines)]
    return [{name: line[name] for name in kept} for line in lines]


def number(text: str, value: float | None, tip: str = "", mark: str = "") -> Cell:
    """A figure, sorted by its value."""
    return Cell(text, value, tip, mark)


def word(text: Any, tip: str = "", mark: str = "") -> Cell:
    """A name, sorted as text."""
    return Cell(str(text), str(text).lower(), tip, mark)


def maybe(value: float | None, form: str, tip: str | None = None) -> Cell:
    """A figure in this format, or a dash where there is none; ``tip`` if not its exact value."""
    if value is None:
        return Cell(NOTHING)
    return number(form.format(value), value, exact(value) if tip is None else tip)


def to_markdown(table: Table) -> str:
    """The table alone, without its title and note; a line per row. What failed is bold."""
    titles = [column.title for column in table.columns]
    lines = [titles, ["---" if column.words else "---:" for column in table.columns]]
    lines += [[_emphasised(cell) for cell in row.cells] for row in table.rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _emphasised(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.mark == "failed" else cell.text


def section(table: Table, level: str = "##") -> list[str]:
    """Heading, table and note, as parts of a document."""
    return [f"{level} {table.title}", to_markdown(table), *filter(None, [table.note])]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns, which the first names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def join(parts: Iterable[str]) -> str:
    """A Markdown document of headings, tables and paragraphs, prose wrapped at 100."""
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith(("|", "#", "```")):
        return part
    return textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
