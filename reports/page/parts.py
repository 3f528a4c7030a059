"""What the page is made of: sections of tables and figures, as the template and page.js draw them.

``facets`` say which operation, backend and dtype a part belongs to, so that the page's filters can
hide it; a part without a facet is never hidden by the filter of that name.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FACETS = ("operation", "backend", "dtype")

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


@dataclass(frozen=True)
class Figure:
    """``kind`` names the function of page.js that draws ``data``; the caption says what to see."""

    kind: str
    title: str
    caption: str
    data: dict[str, Any]


@dataclass
class Section:
    """One part of the page; where it has nothing, ``missing`` is the command that makes it."""

    anchor: str
    title: str
    intro: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: str | None = None


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


def exact(value: float, unit: str = "") -> str:
    """Six significant digits, for a tooltip."""
    return f"{value:,.6g} {unit}".rstrip()
