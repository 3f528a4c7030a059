"""``python -m reports compare BEFORE AFTER``: what became faster or slower between two runs.

A case's change is d = log(median after / median before); its standard error follows from the
rounds of both medians. Five things other than the code mislead, and each is dealt with by name:

- *Drift of the machine*, common to all backends of a case since their rounds took turns. It is read
  off the control: a backend whose code is the same in both runs (``torch`` unless told otherwise).
  Drifts of single cases scatter about that of the whole run, and a control's own d is noisy; the
  two are weighed as their variances say (the best linear prediction of a random effect).
- *A machine of several speeds*, which a median of rounds may be at either of. Where both runs say
  which rounds were of one turn, the part of a case's own control in that weighing is the change of
  the ratio to it, turn by turn (:mod:`reports.statistics.turns`), and it is all of it where the
  medians of case and control, or of control and run, differ from each other by more than they may.
- *Luck of a process* (where its memory lies): the scatter of the changes beyond what their rounds
  explain, by their median absolute deviation, so that a few true changes do not count as scatter.
- *Luck of a process in all cases of a backend alike*, which one pair of processes can't show: a
  change counts only where it is surely past a third of the margin.
- *Many chances*: the intervals are simultaneous (Šidák), so that of two runs of the same code 95 %
  have no false alarm at all, however many cases there are.

What single cases leave undecided, all lengths of a backend together may decide: see
:mod:`reports.statistics.pools`. Cases and pools have half of the chances of a false alarm each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from linear_vit.reports import units
from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.runs import PLACE, TRAINING_STEP, Asked, NoRuns, Runs, only
from linear_vit.reports.statistics import pools, turns

SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "same", "undecided"
VERDICTS = (SLOWER, FASTER, UNDECIDED, SAME)
DEFAULT_CONTROL = PYTORCH
MARGIN = 0.03  # a change that is surely smaller is called none
_LEVEL = 0.95
# Medians of a machine that kept one speed differ by less than so many of their standard errors.
_STEADY = 3
# Of fewer values a scatter is a guess.
_FEWEST_FOR_SCATTER = 6
_SIGMA_PER_MAD = 1.4826
_MAD_EFFICIENCY = 0.37  # of a scatter from n values, against their standard deviation
_ANYTHING = 100.0  # half an interval of logarithms: exp of more may overflow
_WHEN = ("before", "after")

_OF_A_MEDIAN = ["median_s", "error", "independent_rounds", "seconds", "turns"]


@dataclass
class Changes:
    """What two runs say about each other.

    ``cases``: a row per case that both have, with ``case`` (words), the columns of a place,
    ``backend``, ``before_s``, ``after_s``, ``ratio`` (of times, drift taken off), ``low``, ``high``
    and ``verdict``. ``pools``: a row per operation, pass, dtype and backend of at least three
    cases, with those columns, ``cases`` (how many), and ``ratio`` to ``verdict``. ``drift``: ratio
    of times of the control between the runs, None without one. ``scatter``: standard deviation from
    run to run that the rounds do not explain, None where there are too few cases to tell.
    ``notes``: what a reader has to know besides.
    """

    cases: pd.DataFrame
    pools: pd.DataFrame
    control: str | None
    drift: float | None
    scatter: float | None
    notes: list[str] = field(default_factory=list)

    def only(self, *asked: Asked) -> "Changes":
        """Those of these operations, dtypes and backends, as :meth:`Runs.only` takes them."""
        cases, pooled = only(self.cases, *asked), self.pools
        for column in ("operation", "dtype", "backend"):
            pooled = pooled[pooled[column].isin(cases[column])]
        return replace(self, cases=cases, pools=pooled)

    @property
    def verdicts(self) -> set[str]:
        """Every verdict that a case or a pool got."""
        return {*self.cases["verdict"], *self.pools["verdict"]}


def changes(
    before: Runs,
    after: Runs,
    *,
    control: str | None = DEFAULT_CONTROL,
    margin: float = MARGIN,
    anyway: bool = False,
) -> Changes:
    """Compare every case that both runs have.

    Args:
        before, after: saved runs; of several machines in ``before`` those that match are taken.
        control: the backend whose code is taken to be the same in both; None takes no drift off.
        margin: the relative change that is too small to matter.
        anyway: compare although the machines' fingerprints differ.

    Raises:
        NoRuns: the runs may not be compared, or have no case in common; the message says why.
    """
    notes: list[str] = []
    both, why = _in_both(before, after, anyway, notes)
    d = np.log(both["median_s_after"].to_numpy() / both["median_s_before"].to_numpy())
    own = _sums_of_errors(*(_of(both, when) for when in _WHEN))
    control = _usable_control(both, control, why, notes)
    is_control = (both["backend"] == control).to_numpy()
    of_place = _controls(both, is_control)
    relative, against = _against_controls(both, d, own, of_place)
    estimate = _estimate(d, own, is_control, of_place, relative, against)
    if estimate.scatter is None and not is_control.all():
        notes.append("too few cases to see how much runs of the same code differ from one another")
    edge = np.log1p(margin)
    low, high = estimate.change - estimate.half, estimate.change + estimate.half
    cases = both[["case", *PLACE, "backend"]].assign(
        before_s=both["median_s_before"],
        after_s=both["median_s_after"],
        ratio=np.exp(estimate.change),
        low=np.exp(low),
        high=np.exp(high),
        verdict=_verdicts(low, high, edge, sure_of=edge / 3),
    )
    pooled = pools.pooled(
        both,
        d if control is None else relative,
        own.variance if control is None else against.variance,
    )
    shift = float(np.exp(np.median(d[is_control]))) if is_control.any() else None
    cases = cases[~is_control].reset_index(drop=True)
    return Changes(cases, _judged(pooled, edge), control, shift, estimate.scatter, notes)


def _in_both(
    before: Runs, after: Runs, anyway: bool, notes: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The cases that both runs have, and what the runs' environments differ in.

    Raises:
        NoRuns: they may not be compared, or have no case in common.
    """
    kept, why = _comparable(before, after)
    if not kept:
        if not anyway:
            raise NoRuns(
                "these runs may not be compared: "
                + "; ".join(why)
                + " (--anyway compares them all the same)"
            )
        notes.append("compared although they differ in " + "; ".join(why))
        kept = {head["file"] for head in before.heads}
    elif len(kept) < len(before.heads):
        notes.append(f"of {len(before.heads)} earlier runs, those of the same environment")

    # Whether length and backend alone do not tell the cases of an operation apart.
    place = [name for name in (*PLACE, "backend") if name != "setting"]
    kernels = [run.kernels for run in (before, after) if not run.kernels.empty]
    ambiguous = any(frame.duplicated(place).any() for frame in kernels)
    one, other = (_cases(run, with_setting=ambiguous) for run in (before, after))
    one = one[one["file"].isin(kept)].drop_duplicates("case", keep="last")
    both = one.merge(other, on="case", suffixes=("_before", "_after"))
    for frame, where in ((one, "earlier"), (other, "later")):
        if alone := len(set(frame["case"]) - set(both["case"])):
            notes.append(f"{alone} cases only in the {where} run")
    both = _same_method(both, notes)
    if both.empty:
        raise NoRuns("the two runs have no case in common")
    return both, why


@dataclass
class _Estimate:
    """Per case log(after / before), drift taken off, and half of its simultaneous interval."""

    change: np.ndarray
    half: np.ndarray
    scatter: float | None


def _estimate(
    d: np.ndarray,
    own: "_Errors",
    is_control: np.ndarray,
    of_place: np.ndarray,
    relative: np.ndarray,
    against: "_Errors",
) -> _Estimate:
    weight, centre, of_centre = _shares(d, own.variance, is_control, of_place, relative, against)
    change = np.where(weight > 0, weight * relative, 0) + (1 - weight) * (d - centre)
    from_own = (1 - weight) * own.variance
    from_control = np.where(weight > 0, weight * against.variance, 0)
    variance = from_own + from_control + (1 - weight) * of_centre
    scatter = _excess(change[~is_control], variance[~is_control])
    tests = max(1, int((~is_control).sum()))
    between = (scatter or 0.0) ** 2
    total = variance + between
    # Welch and Satterthwaite: each variance counts with what it is known from.
    unsure = from_own**2 / own.freedom + np.where(weight > 0, from_control**2 / against.freedom, 0)
    unsure += (((1 - weight) * of_centre) ** 2 + between**2) / (_MAD_EFFICIENCY * tests)
    half = stats.t.isf(_tail(tests), total**2 / unsure) * np.sqrt(total)
    return _Estimate(change, np.minimum(half, _ANYTHING), scatter)


def _tail(tests: int) -> float:
    """What an interval leaves out at either end, so that all ``tests`` of one of two families hold.

    Cases are one family, pools the other.
    """
    return (1 - _LEVEL ** (1 / (2 * max(1, tests)))) / 2


def _verdicts(low: np.ndarray, high: np.ndarray, edge: float, *, sure_of: float) -> np.ndarray:
    """Of intervals of log ratios; a change has to be surely past ``sure_of``, either way."""
    verdict = np.full(len(low), UNDECIDED, dtype=object)
    verdict[(low > sure_of) & (high > edge)] = SLOWER
    verdict[(high < -sure_of) & (low < -edge)] = FASTER
    verdict[(low >= -edge) & (high <= edge)] = SAME
    return verdict


def _judged(pooled: pd.DataFrame, edge: float) -> pd.DataFrame:
    change, error, freedom = (pooled[c].to_numpy(float) for c in ("change", "error", "freedom"))
    half = stats.t.isf(_tail(len(pooled)), freedom) * error
    low, high = change - half, change + half
    return pooled[[*pools.KEY, "cases"]].assign(
        ratio=np.exp(change),
        low=np.exp(low),
        high=np.exp(high),
        verdict=_verdicts(low, high, edge, sure_of=edge),
    )


def render(found: Changes) -> str:
    """The comparison as text: verdicts that matter first, pools before cases; the count of each."""
    lines = []
    for row in found.pools.to_dict("records"):
        what = f"{row['operation']} {row['pass']} {row['dtype']} {row['backend']}"
        lines.append((row, f"{what:64} {row['cases']:4} cases together"))
    for row in found.cases.to_dict("records"):
        times = f"{units.duration(row['before_s']):>8} → {units.duration(row['after_s']):>8}"
        lines.append((row, f"{row['case']:64} {times}"))
    lines.sort(key=lambda line: VERDICTS.index(line[0]["verdict"]))
    text = [
        f"{row['verdict']:9}  {what}  {row['ratio']:.3f}× the time "
        f"({_bound(row['low'])} to {_bound(row['high'])})"
        for row, what in lines
    ]
    if found.drift is not None:
        text.append(
            f"control {found.control}: {found.drift:.3f}× the time between the runs, taken off"
        )
    if found.scatter is not None:
        text.append(f"scatter from run to run beyond that of the rounds: {found.scatter:.1%}")
    text += [f"note: {note}" for note in found.notes]
    for words, frame in (("all lengths together", found.pools), ("cases", found.cases)):
        if not frame.empty:
            counts = frame["verdict"].value_counts()
            counted = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
            text.append(f"{words}: {counted}")
    return "\n".join(text)


def _bound(ratio: float) -> str:
    """Of three rounds an interval may reach anywhere; how far past 1,000 is no matter."""
    if ratio > 1000:
        return "over 1,000"
    return f"{ratio:.3f}" if ratio >= 0.001 else "under 0.001"


def _comparable(before: Runs, after: Runs) -> tuple[set[str], list[str]]:
    """Files of ``before`` that match a run of ``after``; if none, what the nearest differs in."""
    matches: set[str] = set()
    nearest: list[str] | None = None
    for old in before.heads:
        for new in after.heads:
            why = machines.obstacles(old["facts"], new["facts"])
            if not why:
                matches.add(old["file"])
            elif nearest is None or len(why) < len(nearest):
                nearest = why
    return matches, [] if matches else nearest or []


def _cases(runs: Runs, *, with_setting: bool) -> pd.DataFrame:
    """Kernels and training steps in one table, each case named in words."""
    columns = ["case", *PLACE, "backend", "file", *_OF_A_MEDIAN, "clock", "least_bytes"]
    columns += ["settings"]
    parts = []
    if not runs.kernels.empty:
        kernels = runs.kernels.copy()
        names = ("operation", "pass", "dtype", "sweep", "total_tokens", "setting", "N", "backend")
        kernels["case"] = [
            f"{op} {mode} {dtype} {f'{sweep} sweep ' if sweep else ''}"
            f"{f'{total:,} tokens ' if total else ''}{f'{setting}, ' if with_setting else ''}"
            f"N = {n:,} {backend}"
            for op, mode, dtype, sweep, total, setting, n, backend in zip(
                *(kernels[name] for name in names), strict=True
            )
        ]
        parts.append(kernels)
    if not runs.training.empty:
        steps = runs.training.assign(
            operation=TRAINING_STEP, total_tokens=0, N=0, clock="", setting=""
        )
        steps["pass"] = "step"
        # The settings are part of what a step is: two presets are two cases.
        steps["case"] = [
            f"{TRAINING_STEP} {model} ({backend}), dim {s.get('dim')}, depth {s.get('depth')}, "
            f"batch {s.get('batch_size')}, {s.get('dataset')}, {dtype}"
            for model, backend, s, dtype in zip(
                *(steps[c] for c in ("model", "backend", "settings", "dtype")), strict=True
            )
        ]
        # A model's step has no control of its own; its backend names no control either.
        steps["backend"] = steps["model"] + " with " + steps["backend"]
        parts.append(steps)
    table = pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)
    # A step of one name and other settings (heads, dropout) does not pass for the same one.
    table["settings"] = table["settings"].map(lambda s: s if isinstance(s, dict) else None)
    return table


def _same_method(both: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Without the cases that are of the same name and not of the same thing."""
    for column, words in (
        ("clock", "timed by different clocks"),
        ("least_bytes", "of different shapes"),
        ("settings", "of different settings"),
    ):
        one, other = both[f"{column}_before"], both[f"{column}_after"]
        alike = (one == other) | (one.isna() & other.isna())
        if not alike.all():
            notes.append(f"{int((~alike).sum())} cases left out: {words}")
        both = both[alike]
    known = np.isfinite(both["error_before"].astype(float) + both["error_after"].astype(float))
    if not known.all():
        notes.append(f"{int((~known).sum())} cases left out: their rounds were not kept")
    both = both[known].reset_index(drop=True)
    renamed = {f"{name}_after": name for name in (*PLACE, "backend")}
    return both.rename(columns=renamed)


@dataclass
class _Errors:
    """Per case the variance of an estimate and its degrees of freedom."""

    variance: np.ndarray
    freedom: np.ndarray


def _of(both: pd.DataFrame, when: str) -> pd.DataFrame:
    return pd.DataFrame({name: both[f"{name}_{when}"] for name in _OF_A_MEDIAN})


def _sums_of_errors(before: pd.DataFrame, after: pd.DataFrame) -> _Errors:
    """Of differences of two medians, from ``error`` and ``independent_rounds`` of each (Welch)."""
    # Rounds that are all alike to the clock's last digit do not make a median exact.
    a, b = (np.maximum(x["error"].to_numpy(float) ** 2, 1e-8) for x in (before, after))
    df_a, df_b = (
        np.maximum(x["independent_rounds"].to_numpy(float) - 1, 1.0) for x in (before, after)
    )
    return _Errors(a + b, (a + b) ** 2 / (a**2 / df_a + b**2 / df_b))


def _controls(both: pd.DataFrame, is_control: np.ndarray) -> np.ndarray:
    """Per case the row of the control at its place, −1 where that is none or the case itself."""
    place = pd.MultiIndex.from_frame(both[PLACE])
    at = dict(zip(place[is_control], np.flatnonzero(is_control), strict=True))
    rows = np.array([at.get(where, -1) for where in place], int)
    return np.where(is_control, -1, rows)


def _against_controls(
    both: pd.DataFrame, d: np.ndarray, own: _Errors, of_place: np.ndarray
) -> tuple[np.ndarray, _Errors]:
    """Change of each case's ratio to the control of its place; NaN where that is nobody else.

    Turn by turn where both runs took turns and say so, else of the medians.
    """
    none = turns.Ratio(np.nan, np.nan, np.nan)
    ratios = []
    for when in _WHEN:
        rows = _of(both, when).to_dict("records")
        found = (
            turns.ratio(row, rows[j]) if j >= 0 else None
            for row, j in zip(rows, of_place, strict=True)
        )
        ratios.append(pd.DataFrame([ratio or none for ratio in found]))
    before, after = ratios
    turned = (after["log"] - before["log"]).to_numpy()
    errors = _sums_of_errors(before, after)
    by_turns = np.isfinite(turned)
    of_medians = np.where(of_place >= 0, d - d[of_place], np.nan)
    a, b = own.variance, own.variance[of_place]
    freedom = (a + b) ** 2 / (a**2 / own.freedom + b**2 / own.freedom[of_place])
    return np.where(by_turns, turned, of_medians), _Errors(
        np.where(by_turns, errors.variance, a + b), np.where(by_turns, errors.freedom, freedom)
    )


def _usable_control(
    both: pd.DataFrame, control: str | None, differ: Sequence[str], notes: list[str]
) -> str | None:
    """The control's name if both runs have it, and with the same PyTorch; else None and a note."""
    if control is None:
        return None
    if differ:
        notes.append("of different environments no backend is a control")
        return None
    timed = set(both["backend"])
    if control not in timed:
        if control != DEFAULT_CONTROL:
            raise NoRuns(f"no common case of the control {control!r}; there are {sorted(timed)}")
        notes.append(
            f"no common case of a control ({control}): a drift of the machine between the runs "
            "counts as a change"
        )
        return None
    if timed == {control}:
        notes.append(f"nothing but {control} in common, so that it is compared and no control")
        return None
    return control


def _shares(
    d: np.ndarray,
    variance: np.ndarray,
    is_control: np.ndarray,
    of_place: np.ndarray,
    relative: np.ndarray,
    against: _Errors,
) -> tuple[np.ndarray, float, np.ndarray]:
    """How much of a case's change is that against its own control, and the rest's drift.

    Returns:
        Per case the share of ``relative``; the drift of the whole run, which the rest is free of
        when it is taken off; per case the variance of that.
    """
    if not is_control.any():
        return np.zeros(len(d)), 0.0, np.zeros(len(d))
    shifts, noise = d[is_control], variance[is_control]
    centre = float(np.median(shifts))
    excess = _excess(shifts, noise)
    # Too few controls to tell drift from their noise: each is all drift for its own place.
    spread = np.inf if excess is None else excess**2
    of_control = variance[of_place]
    share = np.ones(len(d)) if np.isinf(spread) else spread / (spread + of_control)
    # Medians that differ by more than they may are of a machine of several speeds.
    steady = np.abs(d[of_place] - centre) <= _STEADY * np.sqrt(of_control)
    steady &= np.abs(d - d[of_place] - relative) <= _STEADY * np.sqrt(against.variance)
    share = np.where(steady, share, 1.0)
    of_centre = np.median(noise) / len(shifts)
    # A case with no control of its place: the run's, give or take how much controls differ.
    apart = np.var(shifts) + np.median(noise) if excess is None else spread
    alone = np.isnan(relative)
    return np.where(alone, 0.0, share), centre, np.where(alone, apart + of_centre, of_centre)


def _excess(values: np.ndarray, variance: np.ndarray) -> float | None:
    """Standard deviation of the values beyond their own errors; None of too few."""
    if len(values) < _FEWEST_FOR_SCATTER:
        return None
    deviation = _SIGMA_PER_MAD * np.median(np.abs(values - np.median(values)))
    return float(np.sqrt(max(0.0, deviation**2 - np.median(variance))))
