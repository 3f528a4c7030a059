"""``python -m reports page``: everything measured, on one self-contained HTML page.

The page loads nothing: its data, its style, its script and the plotting library are in it. Equal
files make an equal page, byte for byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from linear_vit import screen
from linear_vit.reports import targets
from linear_vit.reports.groups import groups
from linear_vit.reports.page import (
    answer,
    kernel_sections,
    model_sections,
    over_sections,
    profile_sections,
    proofs,
    rooflines,
    sources,
    training_sections,
)
from linear_vit.reports.page.parts import FACETS, Figure, Part, Section, Seen
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import NoRuns, Words
from linear_vit.reports.styles import page_style
from linear_vit.reports.tables import ablation, breakdown, results_text
from linear_vit.reports.tables.table import facets_of
from linear_vit.screen import counted

_MOST_BYTES = 3_000_000
_LONG = 16  # characters of a cell that may be folded
_HERE = Path(__file__).resolve().parent
_LIBRARY = ("d3.min.js", "plot.umd.min.js")


def write(paths: Sequence[Path], results: Path, out: Path) -> int:
    """Build the page and write it; its size in bytes.

    Args:
        paths: saved benchmark runs; empty takes the newest in ``results``, else the repository's.
        results: folder that is searched for all else that the suite saves; see
            :func:`reports.saved.documents.load`.
        out: the HTML file.

    Raises:
        reports.saved.runs.NoRuns: ``paths`` were given and hold no run.
    """
    found = documents.load(paths, results)
    _leave_out_damaged(found)
    seen = Seen(found, groups(found.runs) if found.runs else [], out.parent)
    text = _text(seen)
    if len(text.encode()) >= _MOST_BYTES:  # a sweep of thousands of cases
        text = _text(replace(seen, brief=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return len(text.encode())


def _leave_out_damaged(found: Documents) -> None:
    """Name documents that lack what several sections read of them, and go on without."""

    def sound(of_kind: list[Saved], read: Callable[[dict[str, Any]], Any]) -> list[Saved]:
        return found.each(of_kind, lambda saved: (read(saved.content), saved)[1])

    found.tables = sound(found.tables, results_text.parts)
    found.ablations = sound(found.ablations, ablation.as_table)
    found.breakdowns = sound(found.breakdowns, breakdown.as_table)


def _targets(seen: Seen) -> Iterator[Part]:
    """Of every run that measured half of its device's targets or more."""
    for run in map(seen.runs.of_file, (h["file"] for h in seen.runs.heads)) if seen.runs else ():
        try:
            verdicts = targets.verdicts(run, targets.of_device(run))
        except NoRuns:
            continue
        read = sum(verdict.holds is not None for verdict in verdicts)
        if 2 * read >= len(verdicts):
            kept = sum(verdict.holds is True for verdict in verdicts)
            title = f"{kept} of {counted(read, 'target')} met; {run.heads[0]['machine']}"
            yield replace(targets.as_table(verdicts), title=title)


# What makes the parts of a section; page.html has their order, titles and words.
_SECTIONS: dict[str, Callable[[Seen], Iterator[Part]]] = {
    "results": training_sections.results,
    "complexity": kernel_sections.complexity,
    "speed": kernel_sections.speed,
    "roofline": rooflines.section,
    "targets": _targets,
    "memory": kernel_sections.memory,
    "profiles": profile_sections.section,
    "steps": training_sections.training_steps,
    "models": model_sections.section,
    "over": over_sections.section,
    "correctness": proofs.correctness,
    "static": proofs.static,
    "traffic": proofs.traffic,
    "where": sources.section,
}


def _text(seen: Seen) -> str:
    sections = {anchor: Section(list(build(seen))) for anchor, build in _SECTIONS.items()}
    figures = [figure for section in sections.values() for figure in section.figures]
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["folded"] = _folded
    styles = _styles(figures, seen.words)
    return environment.get_template("page.html").render(
        made=sections,
        answer=answer.sentences(seen),
        elsewhere=sources.of_the_repository(seen),
        facts=answer.facts(seen),
        newest=sources.newest(seen.found),
        filters=_filters(sections.values(), seen.words),
        data_json=_script_json({"styles": styles, "figures": _numbered(figures)}),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        library=[Markup((_HERE / "vendor" / name).read_text("utf-8")) for name in _LIBRARY],
        number={id(figure): number for number, figure in enumerate(figures)},
        id=id,
        facets_of=facets_of,
    )


def _folded(text: str) -> str:
    """Long cells fold between words, not within a figure; short ones stay as they are."""
    if len(text) <= _LONG:
        return text
    # A browser would fold behind a dash, too.
    return screen.glued(text).replace("–\u00a0", "–\u2060\u00a0")


def _numbered(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"kind": figure.kind, "title": figure.title, **figure.data} for figure in figures]


def _styles(figures: Iterable[Figure], words: Words) -> dict[str, dict[str, str]]:
    series = [part for figure in figures for part in figure.data.get("series", ())]
    names = {str(part.get("style") or part["backend"]) for part in series}
    return {name: page_style(name, words) for name in sorted(names)}


def _script_json(data: Any) -> Markup:
    """JSON that may stand in a script element, whatever its strings are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _filters(sections: Iterable[Section], words: Words) -> dict[str, list[tuple[str, str]]]:
    """Per facet, every value on the page with its name in words, in order of appearance."""
    values: dict[str, dict[str, None]] = {name: {} for name in FACETS}
    for section in sections:
        for facets in _facets(section):
            for name in FACETS:
                values[name] |= dict.fromkeys(filter(None, facets.get(name, "").split("|")))
    said = {"operation": words.operation}
    return {
        name: [(value, said.get(name, str)(value)) for value in found]
        for name, found in values.items()
        if len(found) > 1
    }


def _facets(section: Section) -> Iterable[dict[str, str]]:
    for figure in section.figures:
        yield from figure.data.get("series", ())
    for table in section.tables:
        yield table.facets
        yield from (column.facets for column in table.columns)
        yield from map(facets_of, table.lines)
