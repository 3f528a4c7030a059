"""Where the page's figures come from, and the few that a reader came for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.groups import crossovers
from linear_vit.reports.page.parts import Part, Seen
from linear_vit.reports.page.proofs import checked, machine
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import ROOT
from linear_vit.reports.tables.table import Line, Table, word


def section(seen: Seen) -> Iterator[Part]:
    """A line per file, then what was not measured and why."""
    found, heads = seen.found, seen.runs.heads if seen.runs else []
    lines = [
        _line(head["file"], f"{head['cases']} timed cases", head["facts"], head["datetime"])
        for head in heads
    ]
    for of_kind in (
        found.checks, found.tables, found.ablations, found.breakdowns, found.statics, found.traffics
    ):  # fmt: skip
        lines += [line for of_one in found.each(of_kind, _of_document) for line in of_one]
    if lines:
        yield Table("", lines)
    for head in heads:
        yield from _reasons("Not timed", head["not_timed"])
        yield from _reasons("Failed", head["failed"])
    yield from (f"Skipped {line}" for line in dict.fromkeys(found.skipped))


def _of_document(saved: Saved) -> list[Line]:
    content, when = saved.content, saved.content.get("created")
    if "datasets" in content:
        return [
            _line(saved.path, f"{_runs(part)} training runs on {part['title']}", where, when)
            for part in content["datasets"]
            if (where := part["environment"])
        ]
    what, facts = "shares of a step", content.get("environment")
    if "setting" in content and "best" in content:
        what = "ablation"
    elif content.get("kind") == "check":
        what, facts = f"{checked(content)[1]} checks", content["machine"]
    elif "kind" in content:
        what, facts = f"{len(content['rows']):,} rows ({content['kind']})", content.get("machine")
    return [_line(saved.path, what, facts or {}, when)]


def _runs(dataset: Mapping[str, Any]) -> int:
    return sum(len(row["seeds"]) for row in dataset["rows"])


def _line(file: Path | str, what: str, facts: Mapping[str, Any], when: Any) -> Line:
    said = {
        "file": _shown(file),
        "what": what,
        "machine": machine(facts) if facts else "any",
        "revision": facts.get("revision") or facts.get("git") or "–",
        "when (UTC)": str(when or "–")[:16].replace("T", " "),
    }
    return {name: word(text) for name, text in said.items()}


def _shown(file: Path | str) -> str:
    """A path as a reader knows it: from the folder of ``reports`` where it lies below that."""
    path = Path(file).resolve()
    return str(path.relative_to(ROOT.parent)) if path.is_relative_to(ROOT.parent) else str(file)


def _reasons(words: str, cases: Mapping[str, Any]) -> Iterator[str]:
    """A line per reason, with one of its cases."""
    by_reason: dict[str, list[str]] = {}
    for case, why in cases.items():
        by_reason.setdefault(str(why).rstrip("."), []).append(case)
    for why, names in by_reason.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{words}: {names[0]}{others}: {why}."


def newest(found: Documents) -> str:
    """When the newest measurement was taken, or empty."""
    dates = [head["datetime"] for head in found.runs.heads] if found.runs else []
    dates += [str(saved.content.get("created") or "") for saved in found.tables]
    return max(dates, default="")[:16].replace("T", " ")


# The few figures that a reader came for, each with what it is.
Fact = tuple[str, str]


def facts(seen: Seen) -> list[Fact]:
    """Of what there is: checks that agree, growth and crossover, and accuracies."""
    found = seen.found
    of_checks = found.each(found.checks[:1], _checks)
    accuracies = found.each(found.tables, lambda saved: list(_accuracies(saved)))
    return [*of_checks, *_scaling(seen), *(fact for of_one in accuracies for fact in of_one)]


def _checks(saved: Saved) -> Fact:
    right, ran = checked(saved.content)
    return f"{right} of {ran}", "kernel checks agree with the float64 reference"


def _scaling(seen: Seen) -> Iterator[Fact]:
    """Of the first machine and dtype: what two operations grow as, and where they cross."""
    group = next((g for g in seen.groups if g.family.incumbent and not g.total_tokens), None)
    if group is None:
        return
    for operation in group.operations:
        fit = group.fits.get((operation, "forward", PYTORCH))
        if fit and fit.reason is None:
            yield (
                f"N^{fit.exponent:.2f}",
                f"growth of {group.words.operation(operation)}'s time ({PYTORCH}, forward, "
                f"{group.dtype}; 95 %: {fit.low:.2f} to {fit.high:.2f})",
            )
    answers = [(b, a) for _, mode, b, a in crossovers([group]) if mode == "forward"]
    if answers:
        backend, answer = min(answers, key=lambda item: item[1].estimate)
        said = f"crossover with {group.family.incumbent} ({backend}, forward, {group.dtype}"
        yield answer.brief, f"{said}: {answer.text})"


def _accuracies(saved: Saved) -> Iterator[Fact]:
    """Of the models themselves, without a local branch."""
    for dataset in saved.content["datasets"]:
        for row in dataset["rows"]:
            if row["accuracy"] and not row["local_branch"]:
                what = f"{row['title']} on {dataset['title']} ({len(row['seeds'])} seeds)"
                yield f"{row['accuracy']['mean']:.1f} %", what
