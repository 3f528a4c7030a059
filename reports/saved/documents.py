"""Everything saved that the page shows, by file name; what is damaged is named, not guessed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from linear_vit.reports.saved import runs
from linear_vit.reports.saved.files import read_json
from linear_vit.reports.saved.runs import Runs

Content = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    path: Path
    content: Content


@dataclass
class Documents:
    """``runs`` are the timed cases; the others hold the documents of a kind, in order of path."""

    runs: Runs | None = None
    checks: list[Saved] = field(default_factory=list)
    tables: list[Saved] = field(default_factory=list)
    ablations: list[Saved] = field(default_factory=list)
    breakdowns: list[Saved] = field(default_factory=list)
    statics: list[Saved] = field(default_factory=list)
    traffics: list[Saved] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def each(self, saved: Iterable[Saved], build: Callable[[Saved], T]) -> list[T]:
        """What ``build`` makes of each; a document that lacks what it reads is named as damaged."""
        made = []
        for one in saved:
            try:
                made.append(build(one))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                self.skipped.append(f"{one.path}: damaged ({type(error).__name__}: {error})")
        return made


def _schema(value: str) -> Callable[[Content], Any]:
    return lambda content: content["schema"] == value


def _kind(name: str, rows: str) -> Callable[[Content], Any]:
    return lambda c: c["kind"] == name and c["schema"] == 1 and isinstance(c[rows], list)


# File name, where it is kept, and whether a document is what its name says.
_KINDS: tuple[tuple[str, str, Callable[[Content], Any]], ...] = (
    ("check.json", "checks", _kind("check", "results")),
    ("table.json", "tables", _schema("linear-vit-table/1")),
    ("ablation-*.json", "ablations", _schema("linear-vit-ablation/1")),
    ("step-breakdown.json", "breakdowns", _schema("linear-vit-step-breakdown/1")),
    ("static*.json", "statics", _kind("static", "rows")),
    ("traffic.json", "traffics", _kind("traffic", "rows")),
)
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
    every = tuple(name for _, name, _ in _KINDS)
    _read_all(found, results, every)
    here, complaints = runs.newest_of_each(results)
    if not here and not any(getattr(found, name) for name in every):
        _read_all(found, runs.MEASUREMENTS, every)
        here, more = runs.newest_of_each(runs.MEASUREMENTS)
        complaints += more
    _read_all(found, runs.MEASUREMENTS, tuple(n for n in _ANYWHERE if not getattr(found, n)))
    try:
        found.runs = runs.load(paths or here)
    except runs.NoRuns:
        if paths:
            raise
    else:
        complaints += found.runs.skipped
    # What is of another kind, and damaged, has been named already.
    named = {line.split(": ")[0] for line in found.skipped}
    found.skipped += [line for line in complaints if line.split(": ")[0] not in named]
    return found


def _read_all(found: Documents, folder: Path, wanted: tuple[str, ...]) -> None:
    for pattern, name, is_right in _KINDS:
        if name not in wanted or not folder.is_dir():
            continue
        for path in sorted(folder.rglob(pattern), key=lambda path: path.with_suffix("")):
            try:
                content = read_json(path)
                if not isinstance(content, dict) or not is_right(content):
                    raise ValueError("of another schema")
            except ValueError as error:
                found.skipped.append(f"{path}: {error}")
            except (KeyError, TypeError) as error:
                found.skipped.append(f"{path}: of another schema ({error} is missing)")
            else:
                getattr(found, name).append(Saved(path, content))
