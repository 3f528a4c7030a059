"""What a figure shows, in words made from its numbers; where nothing stands out, that is said.

What was disturbed while it was measured, and what computes another function, is never the best.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from linear_vit.reports.claims import BASELINE, PYTORCH
from linear_vit.reports.groups import MEMORY, TIME, Group, Picture
from linear_vit.reports.page.cases import Case, by, cases, competing
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.seeds import percent_text, points_text, t_interval
from linear_vit.reports.units import capital, duration, mebibytes
from linear_vit.screen import counted

_NORMAL_95 = 1.96
Row = Mapping[str, Any]


def faster(own: Case, base: Case) -> tuple[float, bool]:
    """How much faster a case is than another, and whether a 95 % interval tells the two apart."""
    log, error = turns.speedup(own, base)
    return math.exp(log), not abs(log) <= _NORMAL_95 * error


def some(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def of_curves(group: Group, picture: Picture, mode: str, part: list[Case]) -> str:
    """Of the curves of one pass."""
    if picture is TIME:
        of = [_time(group, mode, str(op), c) for (op,), c in by(part, "operation").items()]
    elif picture is MEMORY:
        every = [case for case in cases(group.frame) if case["pass"] == mode]
        of = [_memory(group, str(op), c) for (op,), c in by(every, "operation").items()]
    else:
        of = [_ratio(str(b), c) for (b,), c in by(competing(part), "backend").items()]
    return " ".join(filter(None, of))


def _time(group: Group, mode: str, operation: str, curves: list[Case]) -> str:
    able = competing(curves)
    if not able:
        return f"Every case of {group.words.operation(operation)} was disturbed."
    longest = max(case["N"] for case in able)
    at = {case["backend"]: case for case in able if case["N"] == longest}
    best = min(at, key=lambda backend: at[backend]["median_s"])
    text = f"{capital(group.words.operation(operation))} of {counted(longest, 'token')} takes "
    text += f"{duration(at[best]['median_s'])}"
    over = {name: faster(at[best], case) for name, case in at.items() if name != best}
    alike = [name for name, (_, apart) in over.items() if not apart]
    if alike:
        text += f" with {best} ({some(alike)} {_be(alike)} not told apart from it)"
    elif over:
        ratio = f", {over[PYTORCH][0]:.1f}× as fast as {PYTORCH}" if PYTORCH in over else ""
        text += f" at best ({best}{ratio})"
    else:
        text += f" with {best}, which no other backend was timed beside"
    fit = group.fits.get((operation, mode, best))
    if fit is not None:
        text += f", growing as {fit}" if fit.reason is None else f"; {fit}"
    return text + "."


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _memory(group: Group, operation: str, every: list[Case]) -> str:
    """Of the backends whose memory is known, those that need none too."""
    known = [case for case in every if _bytes(case) is not None]
    if not known:
        return ""
    longest = max(case["N"] for case in known)
    needs = {case["backend"]: _bytes(case) or 0.0 for case in known if case["N"] == longest}
    text = f"{capital(group.words.operation(operation))} of {counted(longest, 'token')}: "
    least, most = min(needs.values()), max(needs.values())
    if least == most:
        return f"{text}{_amount(most)} with {some(list(needs))}."
    lowest, highest = ([n for n, v in needs.items() if v == value] for value in (least, most))
    return (
        f"{text}least with {some(lowest)}, {_amount(least)}; most with {some(highest)}, "
        f"{_amount(most)}."
    )


def _bytes(case: Case) -> float | None:
    value = case["peak_memory_bytes"]
    return None if value is None or math.isnan(value) else float(value)


def _amount(value: float) -> str:
    return mebibytes(value / 2**20) if value else "nothing"


def _ratio(backend: str, curve: list[Case]) -> str:
    low = min(curve, key=lambda case: case["value"])
    high = max(curve, key=lambda case: case["value"])
    if f"{low['value']:.2g}" == f"{high['value']:.2g}":
        lengths = f"N = {low['N']:,}" if len(curve) == 1 else "every length"
        return f"{backend}: {low['value']:.2g}× at {lengths}."
    return (
        f"{backend}: from {low['value']:.2g}× at N = {low['N']:,} to {high['value']:.2g}× at "
        f"N = {high['N']:,}."
    )


def of_heat(part: list[Case]) -> str:
    """Of speed-ups over PyTorch."""
    able = competing(part)
    verdicts = [_over_base(case) for case in able]
    counts = {word: verdicts.count(word) for word in ("faster", "slower", "not told apart")}
    said = [f"{word} in {count}" for word, count in counts.items() if count]
    sentences = [f"Of {counted(len(able), 'case')} over {PYTORCH}: {some(said)}."] if able else []
    for (backend,), curve in by(able, "backend").items():
        worst = min(curve, key=lambda case: case["value"])
        mean = math.exp(sum(math.log(case["value"]) for case in curve) / len(curve))
        sentences.append(
            f"{backend}: {mean:.2f}× in geometric mean, worst {worst['value']:.2f}× at "
            f"N = {worst['N']:,}, {worst['pass']}, {worst['dtype']}."
        )
    return " ".join(sentences) + f" Blue is faster than {PYTORCH}, orange slower."


def _over_base(case: Case) -> str:
    ratio, apart = faster(case, {name: case[f"{name}_base"] for name in turns.OF_A_CASE})
    if not apart:
        return "not told apart"
    return "faster" if ratio > 1 else "slower"


def of_accuracies(rows: Sequence[Row]) -> str:
    """Of the models of one results table, which were all measured."""
    best = max(rows, key=lambda row: row["accuracy"]["mean"])
    text = f"Highest mean: {best['title']}, {percent_text(best['accuracy'])}. "
    others = [row for row in rows if row is not best]
    if others:
        apart = [_apart(best, row) for row in others]
        alike = [row["title"] for row, is_apart in zip(others, apart, strict=True) if not is_apart]
        if len(alike) == len(others):
            text += f"Nothing stands out: {_seeds(rows)} tell no other model apart from it. "
        elif alike:
            text += f"{some(alike)} {_be(alike)} not told apart from it. "
        else:
            text += "It is told apart from every other model, paired by seed. "
    text += _over_baseline([row for row in rows if row["model"] != BASELINE])
    return text + "Bars: 95 % t-intervals; small dots: one seed each; a diamond: the claim."


def _seeds(rows: Sequence[Row]) -> str:
    most = max(len(row["accuracy"]["values"]) for row in rows)
    return f"{most} seeds" if most > 1 else "runs of one seed"


def _apart(one: Row, other: Row) -> bool:
    """Whether the interval of their differences, paired by seed, leaves out 0."""
    of_one, of_other = (
        dict(zip(row["seeds"], row["accuracy"]["values"], strict=False)) for row in (one, other)
    )
    gains = [value - of_other[seed] for seed, value in of_one.items() if seed in of_other]
    if len(gains) < 2:
        return False
    gain = t_interval(gains)
    return abs(gain["mean"]) > gain["half_width"]


def _over_baseline(rows: Sequence[Row]) -> str:
    """What is above and below the baseline by more than the interval."""
    known = [(row, row["gain"]) for row in rows if row.get("gain")]
    known = [(row, gain) for row, gain in known if gain["half_width"] is not None]
    if not known:
        return ""
    sides = {
        "above": [(r, g) for r, g in known if g["mean"] > g["half_width"]],
        "below": [(r, g) for r, g in known if -g["mean"] > g["half_width"]],
    }
    said = [
        f"{side} the baseline, in points paired by seed: "
        + some([f"{row['title']} ({points_text(gain)})" for row, gain in found])
        for side, found in sides.items()
        if found
    ]
    if not said:
        return "None is told apart from the baseline. "
    rest = len(known) - sum(map(len, sides.values()))
    more = "; the others are not told apart from it" if rest else ""
    return f"{capital('; '.join(said))}{more}. "


def of_shares(rows: Sequence[Row]) -> str:
    """Of the parts of a training step."""
    of = {row["title"]: f"{row['shares']['attention']:.0%}" for row in rows}
    least, *_, most = sorted([*rows, *rows], key=lambda row: row["shares"]["attention"])
    text = f"{of[most['title']]} of a step of {most['title']}"
    if len(set(of.values())) > 1:
        text += f" and {of[least['title']]} of {least['title']}"
    elif len(rows) > 1:
        text = f"{of[most['title']]} of a step of every model"
    return f"The attention core takes {text}; only that part gets faster with a faster kernel."
