"""What the page is made of: sections of tables and figures, as the template and page.js draw them.

Facets are those of :mod:`reports.tables.table`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linear_vit.reports.groups import Group
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import Runs, Words
from linear_vit.reports.tables.table import Table

FACETS = ("operation", "backend", "dtype")


@dataclass(frozen=True)
class Figure:
    """``kind`` names the function of page.js that draws ``data``; the caption says what to see."""

    kind: str
    title: str
    caption: str
    data: dict[str, Any]


Part = Table | Figure | str  # a string is a note below


@dataclass(frozen=True)
class Seen:
    """What the page is about: everything saved, and the timed cases in their groups.

    ``folder`` is the page's, which links start from; ``brief`` leaves out what is known of single
    cases beyond their time.
    """

    found: Documents
    groups: list[Group] = field(default_factory=list)
    folder: Path = Path()
    brief: bool = False

    @property
    def runs(self) -> Runs | None:
        return self.found.runs

    @property
    def words(self) -> Words:
        return self.found.runs.words if self.found.runs else Words()

    def each(self, saved: Iterable[Saved], build: Callable[[Saved], Iterable[Part]]) -> list[Part]:
        """The parts of each document; one that lacks what is read of it is named as damaged."""
        return [part for made in self.found.each(saved, lambda s: [*build(s)]) for part in made]


@dataclass(frozen=True)
class Section:
    """The parts of one section of the page."""

    parts: list[Part]

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def figures(self) -> list[Figure]:
        return [part for part in self.parts if isinstance(part, Figure)]

    @property
    def notes(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]
