"""Where the page's figures come from, what was not measured, and why."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linear_vit.reports.page.cases import Case, cases
from linear_vit.reports.page.parts import Part, Seen
from linear_vit.reports.page.proofs import checked, machine
from linear_vit.reports.saved.documents import Documents, Saved
from linear_vit.reports.saved.runs import MEASUREMENTS, ROOT
from linear_vit.reports.tables.table import Line, Table, disturbance, word
from linear_vit.screen import counted


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
        where = f" in {_shown(head['file'])}" if len(heads) > 1 else ""
        yield from _reasons(f"Not timed{where}", _not_timed(seen, head))
        yield from _reasons(f"Failed{where}", head["failed"])
        yield from _reasons(f"Disturbed{where}, so compared with nothing", _disturbed(seen, head))
    yield from (f"Skipped {line}" for line in dict.fromkeys(found.skipped))


def _of_document(saved: Saved) -> list[Line]:
    content, when = saved.content, saved.content.get("created")
    if "datasets" in content:
        return [
            _line(saved.path, f"{_runs(part)} on {part['title']}", where, when)
            for part in content["datasets"]
            if (where := part["environment"])
        ]
    what, facts = "shares of a step", content.get("environment")
    if "setting" in content and "best" in content:
        what = "ablation"
    elif content.get("kind") == "check":
        what, facts = counted(checked(content)[1], "check"), content["machine"]
    elif "kind" in content:
        rows = counted(len(content["rows"]), "row")
        what, facts = f"{rows} ({content['kind']})", content.get("machine")
    return [_line(saved.path, what, facts or {}, when)]


def _runs(dataset: Mapping[str, Any]) -> str:
    return counted(sum(len(row["seeds"]) for row in dataset["rows"]), "training run")


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


def _cases(seen: Seen, head: Mapping[str, Any]) -> list[Case]:
    frames = (seen.runs.kernels, seen.runs.training) if seen.runs else ()
    every = [case for frame in frames for case in cases(frame)]
    return [case for case in every if case["file"] == head["file"]]


def _not_timed(seen: Seen, head: Mapping[str, Any]) -> dict[str, Any]:
    """Where a backend lacks some operations only, its other cases were timed all the same."""
    timed = {f"backend {case['backend']}" for case in _cases(seen, head)}
    return {
        f"some operations with {name.removeprefix('backend ')}" if name in timed else name: why
        for name, why in head["not_timed"].items()
    }


def _disturbed(seen: Seen, head: Mapping[str, Any]) -> dict[str, str]:
    """Cases by what disturbed them while they were measured."""
    found = {case["name"]: disturbance(case) for case in _cases(seen, head)}
    return {name: why for name, why in found.items() if why}


def of_the_repository(seen: Seen) -> str:
    """What of the page came with the repository, in a sentence; empty where nothing did.

    Compiled kernels and counted bytes don't count: they are the same anywhere.
    """
    found, heads = seen.found, seen.runs.heads if seen.runs else []
    files = {str(head["file"]): str(head["machine"]) for head in heads}
    for of_kind in (found.checks, found.tables, found.ablations, found.breakdowns):
        files |= {str(saved.path): "" for saved in of_kind}
    own = {f: where for f, where in files.items() if Path(f).resolve().is_relative_to(MEASUREMENTS)}
    if len(own) < len(files):
        names = ", ".join(map(_shown, own))
        return f"Not measured here, but part of the repository: {names}." if own else ""
    if not own:
        return ""
    machines = "; ".join(dict.fromkeys(filter(None, own.values())))
    where = f", made on {machines}" if machines else ""
    return (
        f"These are the measurements that the repository came with{where}. "
        "To measure here: make demo."
    )


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
