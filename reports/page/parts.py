"""What the page is made of: sections of tables and figures, as the template and page.js draw them.

Facets are those of :mod:`reports.tables.table`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from linear_vit.reports.tables.table import Table

FACETS = ("operation", "backend", "dtype")


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

    def add(self, made: Iterable[tuple[Table, list[str]]], how: str) -> "Section":
        """Tables with notes on each; ``how`` is the command that makes the first."""
        for table, notes in made:
            self.tables.append(table)
            self.notes += notes
        if not self.tables:
            self.missing = how
        return self
