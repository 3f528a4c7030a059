"""``python -m reports page``: everything measured, on one self-contained HTML page.

The page loads nothing: its data, its style, its script and the plotting library are in it. Equal
files make an equal page, byte for byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from linear_vit.reports import targets
from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.groups import Group, crossovers, groups
from linear_vit.reports.page import (
    kernel_sections,
    profile_sections,
    proofs,
    rooflines,
    training_sections,
)
from linear_vit.reports.page.parts import FACETS, Figure, Section
from linear_vit.reports.saved import documents, machines
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import ROOT, NoRuns, Words
from linear_vit.reports.styles import page_style
from linear_vit.reports.tables import ablation, breakdown, results_text
from linear_vit.reports.tables.table import Line, of_lines, word

HOW_TO_JUDGE = "pytest --benchmark-only --sweep cpu --benchmark-json=reports/out/cpu.json"
_MOST_BYTES = 3_000_000
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
    grouped = groups(found.runs) if found.runs else []
    text = _text(found, grouped, out.parent, brief=False)
    if len(text.encode()) >= _MOST_BYTES:  # a sweep of thousands of cases
        text = _text(found, grouped, out.parent, brief=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return len(text.encode())


def _text(found: Documents, grouped: list[Group], folder: Path, *, brief: bool) -> str:
    """``folder``: where the page will be, which its links start from."""
    _leave_out_damaged(found)
    sections = [
        training_sections.results(found),
        kernel_sections.complexity(grouped),
        kernel_sections.speed(grouped, brief=brief),
        rooflines.section(grouped, found.runs),
        _targets(found),
        kernel_sections.memory(grouped),
        profile_sections.section(grouped, folder, brief=brief),
        training_sections.training_steps(found),
        proofs.correctness(found),
        proofs.static(found),
        proofs.traffic(found),
    ]
    # What was damaged is known only after all else is made.
    sections.insert(0, _where(found))
    facts = [fact for facts in _facts(found, grouped) for fact in facts]
    words = found.runs.words if found.runs else Words()
    return render(sections, facts, _newest(found), words)


def _leave_out_damaged(found: Documents) -> None:
    """Name documents that lack what several sections read of them, and go on without."""

    def read(build: Callable[[dict[str, Any]], Any], saved: Saved) -> Saved:
        build(saved.content)
        return saved

    found.tables = found.each(found.tables, partial(read, results_text.parts))
    found.ablations = found.each(found.ablations, partial(read, ablation.as_table))
    found.breakdowns = found.each(found.breakdowns, partial(read, breakdown.as_table))


def _targets(found: Documents) -> Section:
    """Of every run that measured half of its device's targets or more."""
    section = Section("targets", "Targets", "The bounds that this project set itself.")
    for run in [found.runs.of_file(h["file"]) for h in found.runs.heads] if found.runs else ():
        try:
            verdicts = targets.verdicts(run, targets.of_device(run))
        except NoRuns:
            continue
        read = sum(verdict.holds is not None for verdict in verdicts)
        if 2 * read >= len(verdicts):
            kept = sum(verdict.holds is True for verdict in verdicts)
            title = f"{kept} of {read} targets met; {run.heads[0]['machine']}"
            section.tables.append(replace(targets.as_table(verdicts), title=title))
    if not section.tables:
        section.missing = HOW_TO_JUDGE
    return section


def render(
    sections: Sequence[Section], facts: Sequence[tuple[str, str]], newest: str, words: Words
) -> str:
    """The page as text; ``newest`` is when the newest measurement on it was taken, or empty."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [figure for section in sections for figure in section.figures]
    return environment.get_template("page.html").render(
        sections=sections,
        facts=facts,
        newest=newest,
        filters=_filters(sections, words),
        data_json=_script_json({"styles": _styles(figures, words), "figures": _numbered(figures)}),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        library=[Markup((_HERE / "vendor" / name).read_text("utf-8")) for name in _LIBRARY],
        number={id(figure): number for number, figure in enumerate(figures)},
        id=id,
    )


def _numbered(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"kind": figure.kind, "title": figure.title, **figure.data} for figure in figures]


def _styles(figures: Iterable[Figure], words: Words) -> dict[str, dict[str, str]]:
    names = {str(part["backend"]) for figure in figures for part in figure.data.get("series", ())}
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
        yield from (row.facets for row in table.rows)


def _where(found: Documents) -> Section:
    section = Section("where", "What ran where", "Every figure below comes from these files.")
    heads = found.runs.heads if found.runs else []
    lines = [_run_source(head) for head in heads]
    for of_kind, describe in (
        (found.checks, _check_source),
        (found.tables, _table_sources),
        (found.ablations, partial(_training_source, "ablation")),
        (found.breakdowns, partial(_training_source, "shares of a step")),
        (found.statics, _proof_source),
        (found.traffics, _proof_source),
    ):
        for of_one in found.each(of_kind, describe):
            lines += of_one
    if lines:
        section.tables.append(of_lines("", lines))
    else:
        section.missing = "make demo"
    for head in heads:
        for words, which in (("Not timed", "not_timed"), ("Failed", "failed")):
            section.notes += list(_reasons(words, head[which]))
    section.notes += [f"Skipped {line}" for line in dict.fromkeys(found.skipped)]
    return section


def _reasons(words: str, cases: Mapping[str, Any]) -> Iterator[str]:
    """A line per reason, with one of its cases."""
    by_reason: dict[str, list[str]] = {}
    for case, why in cases.items():
        by_reason.setdefault(str(why).rstrip("."), []).append(case)
    for why, names in by_reason.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{words}: {names[0]}{others}: {why}."


def _source(file: Path | str, what: str, machine: str, revision: Any, when: Any) -> Line:
    date = str(when or "–")[:16].replace("T", " ")
    said = {"file": _shown(file), "what": what, "machine": machine, "revision": revision or "–"}
    return {name: word(text) for name, text in (said | {"when (UTC)": date}).items()}


def _shown(file: Path | str) -> str:
    """A path as a reader knows it: from the folder of ``reports`` where it lies below that."""
    path = Path(file).resolve()
    return str(path.relative_to(ROOT.parent)) if path.is_relative_to(ROOT.parent) else str(file)


def _run_source(head: Mapping[str, Any]) -> Line:
    facts, what = head["facts"], f"{head['cases']} timed cases"
    return _source(head["file"], what, proofs.machine(facts), facts.get("git"), head["datetime"])


def _check_source(saved: Saved) -> list[Line]:
    facts, results = saved.content["machine"], saved.content["results"]
    ran = sum(r["status"] in ("passed", "failed") for r in results)
    when = saved.content.get("created")
    return [_source(saved.path, f"{ran} checks", proofs.machine(facts), facts.get("git"), when)]


def _table_sources(saved: Saved) -> list[Line]:
    lines = []
    for dataset in saved.content["datasets"]:
        where = dataset["environment"]
        if where:
            runs = sum(len(row["seeds"]) for row in dataset["rows"])
            what = f"{runs} training runs on {dataset['title']}"
            when = saved.content.get("created")
            of = (machines.label(where), where.get("revision"), when)
            lines.append(_source(saved.path, what, *of))
    return lines


def _training_source(what: str, saved: Saved) -> list[Line]:
    where = saved.content["environment"]
    revision = where.get("revision") or where.get("git")
    return [_source(saved.path, what, machines.label(where), revision, None)]


def _proof_source(saved: Saved) -> list[Line]:
    content, facts = saved.content, saved.content.get("machine") or {}
    what = f"{len(content['rows']):,} rows ({content['kind']})"
    machine = proofs.machine(facts) if facts else "any"
    return [_source(saved.path, what, machine, facts.get("git"), content.get("created"))]


def _newest(found: Documents) -> str:
    """When the newest of the measurements was taken."""
    dates = [head["datetime"] for head in found.runs.heads] if found.runs else []
    dates += [str(saved.content.get("created") or "") for saved in found.tables]
    return max(dates, default="")[:16].replace("T", " ")


# The few figures that a reader came for, each with what it is.


def _facts(found: Documents, grouped: list[Group]) -> Iterable[Iterable[tuple[str, str]]]:
    yield found.each(found.checks[:1], _checked)
    yield _scaling_facts(grouped)
    yield from found.each(found.tables, _accuracies)


def _checked(saved: Saved) -> tuple[str, str]:
    ran = [r for r in saved.content["results"] if r["status"] in ("passed", "failed")]
    right = sum(r["status"] == "passed" for r in ran)
    return f"{right} of {len(ran)}", "kernel checks agree with the float64 reference"


def _scaling_facts(grouped: list[Group]) -> list[tuple[str, str]]:
    """Of the first machine and dtype: what two operations grow as, and where they cross."""
    group = next((g for g in grouped if g.family.incumbent and not g.total_tokens), None)
    if group is None:
        return []
    facts = []
    for operation in group.operations:
        fit = group.fits.get((operation, "forward", PYTORCH))
        if fit and fit.reason is None:
            facts.append(
                (
                    f"N^{fit.exponent:.2f}",
                    f"growth of {group.words.operation(operation)}'s time ({PYTORCH}, forward, "
                    f"{group.dtype}; 95 %: {fit.low:.2f} to {fit.high:.2f})",
                )
            )
    answers = [(b, a) for _, mode, b, a in crossovers([group]) if mode == "forward"]
    if answers:
        backend, answer = min(answers, key=lambda item: item[1].estimate)
        said = f"crossover with {group.family.incumbent} ({backend}, forward, {group.dtype}"
        facts.append((answer.brief, f"{said}: {answer.text})"))
    return facts


def _accuracies(saved: Saved) -> list[tuple[str, str]]:
    """Of the models themselves, without a local branch."""
    return [
        (
            f"{row['accuracy']['mean']:.1f} %",
            f"{row['title']} on {dataset['title']} ({len(row['seeds'])} seeds)",
        )
        for dataset in saved.content["datasets"]
        for row in dataset["rows"]
        if row["accuracy"] and not row["local_branch"]
    ]
