"""What the page opens with: the answer in a few sentences, and the few figures behind it."""

from collections.abc import Iterator
from typing import Any

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.groups import Group, crossovers
from linear_vit.reports.page.captions import faster, some
from linear_vit.reports.page.cases import Case, by, cases, competing
from linear_vit.reports.page.parts import Seen
from linear_vit.reports.page.proofs import checked
from linear_vit.reports.saved.documents import Saved
from linear_vit.reports.statistics.seeds import percent_text
from linear_vit.reports.units import capital
from linear_vit.screen import counted

Fact = tuple[str, str]
_PASS = "forward"


def sentences(seen: Seen) -> list[str]:
    """What is fastest from which length on, and what each model reaches."""
    groups = _answering(seen)
    said = [_fastest(group, name_machine=len(groups) > 1) for group in groups]
    tables = seen.found.each(seen.found.tables, lambda saved: list(_reached(saved)))
    return [*filter(None, said), *dict.fromkeys(text for of_one in tables for text in of_one)]


def _answering(seen: Seen) -> list[Group]:
    """Of each machine the first group in which two operations do the same work."""
    found: dict[str, Group] = {}
    for group in seen.groups:
        if group.family.incumbent and not group.total_tokens and len(group.operations) > 1:
            found.setdefault(group.machine, group)
    return list(found.values())


def _fastest(group: Group, *, name_machine: bool) -> str:
    """The fastest of all operations and backends of a group, by ranges of lengths."""
    able = competing(case for case in cases(group.frame) if case["pass"] == _PASS)
    ranges = _ranges(able)
    if not ranges:
        return ""
    what = f"{some([group.words.operation(name) for name in group.operations])}, {_PASS}"
    what += f", {group.dtype}, one sequence a call"
    if name_machine:
        what += f", on {group.machine}"
    if not any(len({case["operation"] for case in at}) > 1 for at in by(able, "N").values()):
        return f"{capital(what)}: no length was measured undisturbed for more than one of them."
    who = [_known_as(group, case) for case, _, _ in ranges]
    (_, first, last), *later = ranges
    if not later:
        lengths = f"at N = {first:,}" if first == last else f"from N = {first:,} to {last:,}"
        return f"{capital(what)}: the fastest {lengths} is {who[0]}."
    said = [f"up to N = {last:,} {who[0]}"]
    said += [f"from {low:,} on {name}" for (_, low, _), name in zip(later, who[1:], strict=True)]
    return f"{capital(what)}: the fastest is {', '.join(said)}."


def _ranges(able: list[Case]) -> list[tuple[Case, int, int]]:
    """The leader of each range of lengths, the first and the last of them.

    A leader stays one until another is faster by more than their interval.
    """
    found: list[tuple[Case, int, int]] = []
    for (length,), at in sorted(by(able, "N").items()):
        best = min(at, key=lambda case: case["median_s"])
        before, low, _ = found[-1] if found else (best, length, length)
        same = next((case for case in at if _who(case) == _who(before)), None)
        if found and same and (same is best or not faster(best, same)[1]):
            found[-1] = (before, low, length)
        else:
            found.append((best, length, length))
    return found


def _known_as(group: Group, case: Case) -> str:
    """An operation with its backend, that by its title too where it is another word."""
    name, title = str(case["backend"]), group.words.backend(str(case["backend"]))
    said = f"{group.words.operation(case['operation'])} with {name}"
    return said if title == name else f"{said} ({title})"


def _who(case: Case) -> tuple[Any, Any]:
    return case["operation"], case["backend"]


def _reached(saved: Saved) -> Iterator[str]:
    """What each model of a data set reaches, the highest mean first."""
    for dataset in saved.content["datasets"]:
        rows = [row for row in dataset["rows"] if row["accuracy"]]
        rows.sort(key=lambda row: -row["accuracy"]["mean"])
        reached = [f"{row['title']} {percent_text(row['accuracy'])}" for row in rows]
        if reached:
            s, seeds = dataset["setting"], max(len(row["seeds"]) for row in rows)
            how = f"preset {s['preset']}, {counted(s['epochs'], 'epoch')}, {counted(seeds, 'seed')}"
            yield f"Test accuracy on {dataset['title']} ({how}): {some(reached)}."


def facts(seen: Seen) -> list[Fact]:
    """Figures, each with what it is: checks that agree, growth, and where two curves cross."""
    checks = seen.found.each(seen.found.checks[:1], _checks)
    return [*checks, *(fact for group in _answering(seen)[:1] for fact in _scaling(group))]


def _checks(saved: Saved) -> Fact:
    right, ran = checked(saved.content)
    return f"{right} of {ran}", "kernel checks agree with the float64 reference"


def _scaling(group: Group) -> Iterator[Fact]:
    """What two operations grow as, and where they cross."""
    for operation in group.operations:
        fit = group.fits.get((operation, _PASS, PYTORCH))
        if fit and fit.reason is None:
            yield (
                f"N^{fit.exponent:.2f}",
                f"growth of {group.words.operation(operation)}'s time ({PYTORCH}, {_PASS}, "
                f"{group.dtype}; 95 %: {fit.low:.2f} to {fit.high:.2f})",
            )
    answers = [(b, a) for _, mode, b, a in crossovers([group]) if mode == _PASS]
    if answers:
        backend, answer = min(answers, key=lambda item: item[1].estimate)
        said = f"crossover with {group.family.incumbent} ({backend}, {_PASS}, {group.dtype}"
        yield answer.brief, f"{said}): {answer.text}"
