"""A table as plain data: built once, then written as Markdown or drawn by the page.

``facets`` say which operation, backend and dtype a part belongs to, so that the page's filters can
hide it; a part without a facet is never hidden by the filter of that name.
"""

import textwrap
from collections.abc import Iterable, Sequence
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


NOTHING = "–"


def columns(titles: Iterable[str], words: Iterable[str] = ()) -> list[Column]:
    """Columns by title; those in ``words`` hold text."""
    left = set(words)
    return [Column(title, title in left) for title in titles]


def number(text: str, value: float | None, tip: str = "", mark: str = "") -> Cell:
    """A figure, sorted by its value."""
    return Cell(text, value, tip, mark)


def word(text: Any, tip: str = "", mark: str = "") -> Cell:
    """A name, sorted as text."""
    return Cell(str(text), str(text).lower(), tip, mark)


def maybe(value: float | None, form: str) -> Cell:
    """A figure in this format, or a dash where there is none."""
    return Cell(NOTHING) if value is None else number(form.format(value), value, exact(value))


def from_lines(
    title: str, lines: Sequence[dict[str, Cell]], words: Iterable[str], note: str = ""
) -> Table:
    """A table of rows that are cells by column; a column that says nothing in any is left out."""
    kept = [name for name in lines[0] if any(line[name].text != NOTHING for line in lines)]
    rows = [Row([line[name] for name in kept]) for line in lines]
    return Table(title, columns(kept, words), rows, note)


def to_markdown(table: Table) -> str:
    """The table alone, without its title and note; a line per row. What failed is bold."""
    titles = [column.title for column in table.columns]
    lines = [titles, ["---" if column.words else "---:" for column in table.columns]]
    lines += [[_emphasised(cell) for cell in row.cells] for row in table.rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _emphasised(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.mark == "failed" else cell.text


def join(parts: Iterable[str]) -> str:
    """A Markdown document of headings, tables and paragraphs, prose wrapped at 100."""
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith(("|", "#", "```")):
        return part
    return textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
