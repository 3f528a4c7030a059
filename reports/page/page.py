"""``python -m reports page``: everything measured, on one self-contained HTML page.

The page loads nothing: its data, its style, its script and the plotting library are in it. Equal
files make an equal page, byte for byte.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from linear_vit.reports import plots, scaling
from linear_vit.reports.page import (
    gpu_sections,
    kernel_sections,
    profile_sections,
    proofs,
    rooflines,
    training_sections,
)
from linear_vit.reports.page.parts import FACETS, Figure, Row, Section, Table, columns, word
from linear_vit.reports.saved import documents
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import ROOT

_MOST_BYTES = 3_000_000
_HERE = Path(__file__).resolve().parent
_LIBRARY = ("d3.min.js", "plot.umd.min.js")


def write(paths: Sequence[Path], results: Path, out: Path) -> int:
    """Build the page and write it; its size in bytes.

    Args:
        paths: saved benchmark runs; empty takes the newest in ``results``, else the repository's.
        results: folder that is searched for all else that the suite saves; see
            :func:`reports.documents.load`.
        out: the HTML file.

    Raises:
        reports.runs.NoRuns: ``paths`` were given and hold no run.
    """
    found = documents.load(paths, results)
    groups = scaling.groups(found.runs) if found.runs else []
    extras = kernel_sections.Extras(found.runs)
    text = _text(found, groups, extras, out.parent)
    if len(text.encode()) >= _MOST_BYTES:  # a sweep of thousands of cases
        extras.leave_out_details()
        text = _text(found, groups, extras, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return len(text.encode())


def _text(
    found: Documents, groups: list[scaling.Group], extras: kernel_sections.Extras, folder: Path
) -> str:
    """``folder``: where the page will be, which its links start from."""
    cpu_parts = [part for parts in found.each(found.cpus, rooflines.cpu) for part in parts]
    sections = [
        training_sections.results(found),
        kernel_sections.complexity(groups),
        kernel_sections.speed(groups, extras),
        rooflines.section(groups, cpu_parts, extras),
        kernel_sections.memory(groups),
        profile_sections.section(groups, extras, folder),
        gpu_sections.section(found),
        training_sections.steps(found),
        proofs.correctness(found),
        proofs.static(found),
        proofs.traffic(found),
    ]
    # What was damaged is known only after all else is made.
    sections.insert(0, _where(found))
    facts = [fact for facts in _facts(found, groups) for fact in facts]
    return render(sections, facts, _newest(found))


def render(sections: Sequence[Section], facts: Sequence[tuple[str, str]], newest: str) -> str:
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
        filters=_filters(sections),
        data_json=_script_json({"styles": _styles(figures), "figures": _numbered(figures)}),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        library=[Markup((_HERE / "vendor" / name).read_text("utf-8")) for name in _LIBRARY],
        number={id(figure): number for number, figure in enumerate(figures)},
        id=id,
    )


def _numbered(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"kind": figure.kind, "title": figure.title, **figure.data} for figure in figures]


def _styles(figures: Iterable[Figure]) -> dict[str, dict[str, str]]:
    names = {str(part["backend"]) for figure in figures for part in figure.data.get("series", ())}
    return {name: plots.page_style(name) for name in sorted(names)}


def _script_json(data: Any) -> Markup:
    """JSON that may stand in a script element, whatever its strings are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _filters(sections: Iterable[Section]) -> dict[str, list[tuple[str, str]]]:
    """Per facet, every value on the page with its name in words, in order of appearance."""
    values: dict[str, dict[str, None]] = {name: {} for name in FACETS}
    for section in sections:
        for facets in _facets(section):
            for name in FACETS:
                values[name] |= dict.fromkeys(filter(None, facets.get(name, "").split("|")))
    words = {"operation": plots.label}
    return {
        name: [(value, words.get(name, str)(value)) for value in found]
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
    titles = ["file", "what", "machine", "revision", "when (UTC)"]
    rows = []
    for head in found.runs.heads if found.runs else []:
        what = f"{head['cases']} timed cases"
        facts = head["facts"]
        rows.append(
            _source(head["file"], what, proofs.machine(facts), facts.get("git"), head["datetime"])
        )
    rows += found.each(found.checks, _check_source)
    for lines in found.each(found.tables, _table_sources):
        rows += lines
    for kind in (found.ablations, found.speeds, found.breakdowns):
        rows += found.each(kind, _training_source)
    for kind in (found.cpus, found.statics, found.traffics):
        rows += found.each(kind, _proof_source)
    rows += found.each(found.gpus, _gpu_source)
    if rows:
        section.tables.append(Table("", columns(titles, titles), rows))
    for head in found.runs.heads if found.runs else []:
        section.notes += [f"Not timed: {what}: {why}." for what, why in head["not_timed"].items()]
        cases: dict[str, list[str]] = {}
        for case, why in head["failed"].items():
            cases.setdefault(str(why), []).append(case)
        for why, names in cases.items():
            others = f" and {len(names) - 1} more cases" if len(names) > 1 else ""
            section.notes.append(f"Failed: {names[0]}{others}: {why}")
    section.notes += [f"Skipped {line}" for line in dict.fromkeys(found.skipped)]
    if not rows:
        section.missing = "make demo"
    return section


def _source(file: Path | str, what: str, machine: str, revision: Any, when: Any) -> Row:
    date = str(when or "–")[:16].replace("T", " ")
    return Row([word(_shown(file)), *map(word, (what, machine, revision or "–", date))])


def _shown(file: Path | str) -> str:
    """A path as a reader knows it: from the folder of ``reports`` where it lies below that."""
    path = Path(file).resolve()
    return str(path.relative_to(ROOT.parent)) if path.is_relative_to(ROOT.parent) else str(file)


def _check_source(saved: Saved) -> Row:
    ran = sum(r["status"] in ("passed", "failed") for r in saved.content["results"])
    facts = saved.content["machine"]
    when = saved.content.get("created")
    return _source(saved.path, f"{ran} checks", proofs.machine(facts), facts.get("git"), when)


def _table_sources(saved: Saved) -> list[Row]:
    return [
        _source(
            saved.path,
            f"{sum(len(row['seeds']) for row in dataset['rows'])} training runs on "
            f"{dataset['title']}",
            _trained_on(dataset["environment"]),
            dataset["environment"].get("revision"),
            saved.content.get("created"),
        )
        for dataset in saved.content["datasets"]
        if dataset["status"] == "measured"
    ]


def _training_source(saved: Saved) -> Row:
    names = {
        "linear-vit-ablation/1": "ablation",
        "linear-vit-step-speed/1": "training steps by backend",
        "linear-vit-step-breakdown/1": "shares of a training step",
    }
    environment = saved.content["environment"]
    what = names[saved.content["schema"]]
    where = _trained_on(environment)
    return _source(saved.path, what, where, environment.get("revision"), None)


def _trained_on(environment: dict[str, Any]) -> str:
    on_cpu = environment["device"] == "cpu"
    device = environment["cpu"] if on_cpu else environment["device"]
    threads = f", {environment['threads']} threads" if on_cpu else ""
    return f"{device}{threads}, torch {environment['torch']}"


def _proof_source(saved: Saved) -> Row:
    content = saved.content
    facts = content.get("machine")
    what = f"{len(content['rows']):,} rows ({content.get('kind', 'C++ kernels')})"
    machine = proofs.machine(facts) if facts else "any"
    return _source(saved.path, what, machine, (facts or {}).get("git"), content.get("created"))


def _gpu_source(saved: Saved) -> Row:
    content = saved.content
    done = sum(r["status"] == "measured" for r in content["results"])
    what = f"{content['section']}, {done} of {len(content['results'])} cases (gpu)"
    what += ", dry run" if content["dry_run"] else ""
    facts = content["machine"]
    return _source(saved.path, what, proofs.machine(facts), facts.get("git"), None)


def _newest(found: Documents) -> str:
    """When the newest of the measurements was taken."""
    dates = [head["datetime"] for head in found.runs.heads] if found.runs else []
    dates += [str(saved.content.get("created") or "") for saved in found.tables]
    return max(dates, default="")[:16].replace("T", " ")


# The few figures that a reader came for, each with what it is.


def _facts(found: Documents, groups: list[scaling.Group]) -> Iterable[Iterable[tuple[str, str]]]:
    yield found.each(found.checks[:1], _checked)
    if found.runs:
        yield _scaling_facts(groups)
    yield from found.each(found.tables, _accuracies)


def _checked(saved: Saved) -> tuple[str, str]:
    ran = [r for r in saved.content["results"] if r["status"] in ("passed", "failed")]
    right = sum(r["status"] == "passed" for r in ran)
    return f"{right} of {len(ran)}", "kernel checks agree with the float64 reference"


def _scaling_facts(groups: list[scaling.Group]) -> list[tuple[str, str]]:
    """Of the first machine and dtype: what the attention cores grow as, and where they cross."""
    for group in groups:
        facts = []
        for operation in ("linear_attention", "softmax_attention"):
            fit = group.fits.get((operation, "forward", "torch"))
            if fit and fit.reason is None:
                facts.append(
                    (
                        f"N^{fit.exponent:.2f}",
                        f"growth of {plots.label(operation)}'s time (torch, forward, "
                        f"{group.dtype}; 95 %: {fit.low:.2f} to {fit.high:.2f})",
                    )
                )
        answers = [(b, a) for _, m, b, a in scaling.crossovers([group]) if m == "forward"]
        if answers:
            backend, answer = min(answers, key=lambda item: item[1].estimate)
            facts.append(
                (
                    answer.brief,
                    f"crossover with SDPA ({backend}, forward, {group.dtype}: {answer.text})",
                )
            )
        return facts
    return []


def _accuracies(saved: Saved) -> list[tuple[str, str]]:
    return [
        (
            f"{row['accuracy']['mean']:.1f} %",
            f"{row['title']} on {dataset['title']} ({len(row['seeds'])} seeds)",
        )
        for dataset in saved.content["datasets"]
        for row in dataset["rows"]
        if row["accuracy"] and row["model"] in ("baseline", "ripple", "hydra")
    ]
