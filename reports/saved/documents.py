"""Everything saved that the page shows, by file name; what is damaged is named, not guessed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from linear_vit.reports.saved import records, runs
from linear_vit.reports.saved.records import Saved
from linear_vit.reports.saved.runs import Runs

T = TypeVar("T")


@dataclass
class Documents:
    """``runs`` are the timed cases; the others hold the documents of a kind, the newest first.

    ``of_repository``: nothing was found where it was looked for, so that all is the repository's.
    """

    runs: Runs | None = None
    checks: list[Saved] = field(default_factory=list)
    tables: list[Saved] = field(default_factory=list)
    ablations: list[Saved] = field(default_factory=list)
    breakdowns: list[Saved] = field(default_factory=list)
    statics: list[Saved] = field(default_factory=list)
    traffics: list[Saved] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    of_repository: bool = False

    def each(self, saved: Iterable[Saved], build: Callable[[Saved], T]) -> list[T]:
        """What ``build`` makes of each."""
        return [build(one) for one in saved]


_SHOWN = tuple(kind for kind in records.KINDS if kind != "runs")
# Machine code and counted bytes are the same anywhere.
_ANYWHERE = ("statics", "traffics")


def load(paths: Sequence[Path], results: Path) -> Documents:
    """Read timed runs from ``paths``, and all else from ``results`` and its sub-folders.

    Without ``paths``, the newest runs in ``results``, else the repository's measurements. Where
    ``results`` holds nothing at all, so are the other documents; static and traffic reports are the
    repository's wherever ``results`` lacks them.

    Raises:
        reports.saved.runs.NoRuns: ``paths`` were given and hold no run.
    """
    found = Documents()
    _read_all(found, results, _SHOWN)
    timed = runs.newest_of_each(results)
    if not timed.heads and not any(getattr(found, kind) for kind in _SHOWN):
        _read_all(found, runs.MEASUREMENTS, _SHOWN)
        found.of_repository = not paths
        own, timed = timed, runs.newest_of_each(runs.MEASUREMENTS)
        timed.skipped[:0] = own.skipped
    _read_all(found, runs.MEASUREMENTS, [kind for kind in _ANYWHERE if not getattr(found, kind)])
    complaints = timed.skipped
    if paths:
        timed = runs.load(paths)
        complaints = complaints + timed.skipped
    found.runs = timed if timed.heads else None
    # What is of another kind, and damaged, has been named already.
    named = {line.split(": ")[0] for line in found.skipped}
    found.skipped += [line for line in complaints if line.split(": ")[0] not in named]
    return found


def _read_all(found: Documents, folder: Path, kinds: Iterable[str]) -> None:
    for kind in kinds:
        saved, skipped = records.below(folder, kind)
        saved.sort(key=lambda one: str(one.content.get("created", "")), reverse=True)
        getattr(found, kind).extend(saved)
        found.skipped += skipped
