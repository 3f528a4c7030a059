"""A table as plain data: built once, then written as Markdown or CSV, or drawn by the page.

``facets`` say which operation, backend and dtype a part belongs to, so that the page's filters can
hide it; a part without a facet is never hidden by the filter of that name.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from linear_vit import screen
from linear_vit.reports.units import duration, exact

Facets = dict[str, str]  # a facet's name to one value, or to several with | between
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """``value`` is what a column is sorted by (None sorts last), ``tip`` the exact figure.

    ``link`` is an address relative to the page, or empty; ``facets`` are those of the whole row.
    """

    text: str
    value: float | str | None = None
    tip: str = ""
    mark: str = ""
    link: str = ""
    facets: Facets = field(default_factory=dict)


Line = dict[str, Cell]  # a row's cells by column


@dataclass(frozen=True)
class Column:
    """``words`` stand on the left, numbers on the right."""

    title: str
    words: bool = False
    facets: Facets = field(default_factory=dict)
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """Lines that all have the same columns; there is at least one.

    ``facets`` are of the table as a whole, ``heads`` the columns that have more than a title, and
    ``words`` those that stand on the left, besides those that hold nothing but names.
    """

    title: str
    lines: Sequence[Line]
    note: str = ""
    facets: Facets = field(default_factory=dict)
    heads: Mapping[str, Column] = field(default_factory=dict)
    words: Sequence[str] = ()

    @property
    def columns(self) -> list[Column]:
        return [self.heads.get(name) or self._column(name) for name in self.lines[0]]

    def _column(self, name: str) -> Column:
        names_alone = all(isinstance(line[name].value, str) for line in self.lines)
        return Column(name, name in self.words or names_alone)


def facets_of(line: Line) -> Facets:
    """Those that a row's cells give it."""
    return {name: value for cell in line.values() for name, value in cell.facets.items()}


def without_empty(lines: Sequence[Line]) -> list[Line]:
    """The lines without the columns that say nothing in any of them."""
    kept = [name for name in lines[0] if any(line[name].text != NOTHING for line in lines)]
    return [{name: line[name] for name in kept} for line in lines]


def number(
    value: float | None, form: str | Callable[[float], str], tip: str | None = None, mark: str = ""
) -> Cell:
    """A figure in this format, sorted by its value; a dash where there is none.

    ``tip`` is its exact value, unless said otherwise, or a function makes its text.
    """
    if value is None or math.isnan(value):
        return Cell(NOTHING)
    if not isinstance(form, str):
        return Cell(form(value), value, tip or "", mark)
    if tip is None:
        tip = exact(value) if isinstance(value, float) else ""
    return Cell(form.format(value), value, tip, mark)


def count(value: int | None, tip: str = "", mark: str = "") -> Cell:
    return number(value, "{:,}", tip, mark)


Case = Mapping[Any, Any]  # a row of Runs.kernels or Runs.training


def disturbance(case: Case) -> str:
    """What disturbed the measurement of a case; empty where nothing did."""
    return str(case["info"].get("disturbed") or "")


def quiet(cases: Mapping[int, Case], size: int) -> Case | None:
    """The case of a size that others may be compared with: one that nothing disturbed."""
    case = cases.get(size)
    return case if case is not None and not disturbance(case) else None


def time_of(case: Case, tip: str = "", mark: str = "") -> Cell:
    """The median time of a case; of one that was disturbed with a mark, and what disturbed it."""
    cell = number(case["median_s"], duration, tip, mark)
    if why := disturbance(case):
        tip = f"disturbed: {why}\n{tip}".strip()
        cell = replace(cell, text=f"‡ {cell.text}", tip=tip, mark="disturbed")
    return cell


def of_disturbed(found: Iterable[Case]) -> str:
    """The footnote to those marks; empty where there are none."""
    why = dict.fromkeys(filter(None, map(disturbance, found)))
    return (
        f"‡ disturbed while it was measured, so compared with nothing: {'; '.join(why)}."
        if why
        else ""
    )


def word(text: Any, tip: str = "", mark: str = "", **facets: str) -> Cell:
    """A name, sorted as text; with it the facets that it gives its row."""
    return Cell(str(text), str(text).lower(), tip, mark, facets=facets)


def to_markdown(table: Table) -> str:
    """The table alone, without its title and note; a line per row. What failed is bold."""
    columns = table.columns
    lines = [[column.title for column in columns]]
    lines += [["---" if column.words else "---:" for column in columns]]
    lines += [[_emphasised(cell) for cell in line.values()] for line in table.lines]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _emphasised(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.mark == "failed" else cell.text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


Part = Table | str  # of a document: a table without its title and note, or Markdown


def section(table: Table, level: str = "##") -> list[Part]:
    """Heading, table and note, as parts of a document."""
    return [f"{level} {table.title}", table, *filter(None, [table.note])]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns, which the first names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def picked(row: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """By column what stands in a document at a path like ``speedup.median``, or None."""

    def at(path: str) -> Any:
        found: Any = row
        for name in path.split("."):
            found = (found or {}).get(name)
        return found

    return {column: at(path) for column, path in paths.items()}


def join(parts: Iterable[Part]) -> str:
    """A Markdown document of headings, tables and paragraphs, prose wrapped at 100."""
    return "\n\n".join(map(_as_markdown, parts)) + "\n"


def _as_markdown(part: Part) -> str:
    if isinstance(part, Table):
        return to_markdown(part)
    return part if part.startswith(("#", "```")) else screen.prose(part, 100)


def on_screen(parts: Iterable[Part], columns: int | None = None) -> str:
    """The same for a terminal so many columns wide; None takes that there is."""
    columns = screen.width() if columns is None else columns
    return "\n\n".join(_as_text(part, columns) for part in parts) + "\n"


def _as_text(part: Part, columns: int) -> str:
    if isinstance(part, str):
        return part if part.startswith("```") else screen.prose(part.lstrip("# "), columns)
    heads = part.columns
    rows = [[cell.text for cell in line.values()] for line in part.lines]
    left = [column.words for column in heads]
    keys = max(1, min([*left, False].index(False), len(left) - 1))
    names = [column.title for column in heads]
    text = screen.draw(names, rows, words=left, keys=keys, at_most=columns)
    return text.rstrip("\n")
