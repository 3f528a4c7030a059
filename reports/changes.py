"""``python -m reports compare BEFORE AFTER``: what became faster or slower between two versions.

Of one run a side :mod:`reports.statistics.pair` estimates every case's change, and
:mod:`reports.statistics.pools` that of all lengths of an operation on a backend together. Of
several runs a side, each a process of its own, :mod:`reports.statistics.repeats` does both. One
pair can't show what a process does to all cases of a backend alike, so that its change counts only
where it is surely past a third of the margin, and that of all lengths only past the whole of it.

Intervals are simultaneous: cases and pools have half of the chances of a false alarm each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from linear_vit.reports import units
from linear_vit.reports.saved.runs import PLACE, Asked, Runs, only
from linear_vit.reports.saved.versions import DEFAULT_CONTROL, Versions, pair_up
from linear_vit.reports.statistics import pair, pools, repeats, turns
from linear_vit.screen import counted

SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "same", "undecided"
MISSING = "missing"  # in the later run
VERDICTS = (MISSING, SLOWER, FASTER, UNDECIDED, SAME)
MARGIN = 0.03  # a change that is surely smaller is called none


@dataclass
class Changes:
    """What the runs of two versions say about each other.

    ``cases``: a row per case of the earlier version, with ``case`` (words), the columns of a place,
    ``backend``, ``before_s``, ``after_s``, ``ratio`` (of times, drift taken off), ``low``, ``high``
    and ``verdict``; one that the later version lacks has the first of these times alone.
    ``pools``: a row per operation, pass, dtype and backend of at least three cases, with those
    columns, ``cases`` (how many), and ``ratio`` to ``verdict``. ``drift``: ratio of times of the
    control between the versions, None without one. ``scatter``: standard deviation from run to run
    that the rounds do not explain, None where there are too few cases to tell, or several runs a
    side. ``luck``: of these, how much processes differ, in words. ``notes``: what a reader has to
    know besides.
    """

    cases: pd.DataFrame
    pools: pd.DataFrame
    control: str | None
    drift: float | None
    scatter: float | None
    luck: str = ""
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

    def fails(self, on: Sequence[str]) -> bool:
        """Whether one of these verdicts was given; a case that is gone is no better than slower."""
        return bool(self.verdicts & {*on, *([MISSING] if SLOWER in on else [])})


def changes(
    before: Runs,
    after: Runs,
    *,
    control: str | None = DEFAULT_CONTROL,
    margin: float = MARGIN,
    anyway: bool = False,
) -> Changes:
    """Compare every case that both versions have.

    Args:
        before, after: saved runs; of several machines in ``before`` those that match are taken.
        control: the backend whose code is taken to be the same in both; None takes no drift off.
        margin: the relative change that is too small to matter.
        anyway: compare although the machines' fingerprints differ.

    Raises:
        NoRuns: the runs may not be compared, or have no case in common; the message says why.
    """
    edge = float(np.log1p(margin))
    versions = pair_up(before, after, control, anyway)
    found = (_of_several if versions.several else _of_two)(versions, edge)
    both, is_control, notes = versions.both, versions.is_control, versions.notes
    if not versions.several:
        notes.append("one run a side does not show the luck of a process; several do (--with)")
        if found.scatter is None and not is_control.all():
            notes.append("too few cases to see how much runs of the same code differ")
    judged = found.cases[~is_control]
    if once := int(judged["verdict"].isna().sum()):
        notes.append(
            f"{counted(once, 'case')} left out: of one run a side, where others are of several"
        )
    drift = (both["median_s_after"] / both["median_s_before"])[is_control].median()
    lost = versions.missing.assign(before_s=versions.missing["median_s"], verdict=MISSING)
    lost = lost[["case", *PLACE, "backend", "before_s", "verdict"]]
    kept = judged[judged["verdict"].notna()]
    return replace(
        found,
        cases=pd.concat([kept, lost] if len(lost) else [kept], ignore_index=True),
        control=versions.control,
        drift=float(drift) if is_control.any() else None,
        notes=notes,
    )


# ---- judged --------------------------------------------------------------------------------------


def _of_two(versions: Versions, edge: float) -> Changes:
    """Of one run a side."""
    both, is_control = versions.both, versions.is_control
    before, after = (versions.newest(when) for when in ("before", "after"))
    found = pair.compare(before, after, versions.of_place, is_control)
    cases = _judged(_described(both), found.change, found.half, edge, sure_of=edge / 3)
    with_control = is_control.any()
    pooled = pools.pooled(
        both,
        found.relative if with_control else found.raw,
        found.against.variance if with_control else found.own.variance,
    )
    change, error, freedom = (pooled[c].to_numpy(float) for c in ("change", "error", "freedom"))
    half = stats.t.isf(repeats.tail(len(pooled)), freedom) * error
    pooled = _judged(pooled[[*pools.KEY, "cases"]], change, half, edge, sure_of=edge)
    return Changes(cases, pooled, None, None, found.scatter)


def _of_several(versions: Versions, edge: float) -> Changes:
    """Of several runs a side, each a process."""
    both, is_control, of_place = versions.both, versions.is_control, versions.of_place
    x, variance = zip(*(_by_process(side, both, of_place) for side in versions.sides), strict=True)
    backends = both["backend"][~is_control].nunique()
    counts = [np.isfinite(one).sum(axis=1) for one in x]
    with np.errstate(invalid="ignore", divide="ignore"):
        within = sum(np.nansum(v, axis=1) / n**2 for v, n in zip(variance, counts, strict=True))
    tests = int((~is_control).sum())
    found = repeats.estimates(x[0], x[1], within, backends)
    cases = _judged(_described(both), found.change, _half(found, tests), edge, sure_of=0)
    cases["verdict"] = cases["verdict"].where(found.freedom > 0, None)

    rows, errors = [], []
    means: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for key, part in both[~is_control].groupby(pools.KEY, sort=False):
        cells = [one[part.index] for one in x]
        ran = [np.isfinite(one).any(axis=0) for one in cells]
        whole = [np.isfinite(one[:, of]).all(axis=1) for one, of in zip(cells, ran, strict=True)]
        kept = np.logical_and(*whole)
        if kept.sum() < pools.FEWEST or not all(map(np.any, ran)):
            continue
        rows.append((*key, int(kept.sum())))
        for side, one, of in zip(means, cells, ran, strict=True):
            side.append(np.where(of, stats.trim_mean(one[kept], 0.1), np.nan))
        errors.append(float(np.mean(within[part.index][kept])) / kept.sum())
    pooled = pd.DataFrame(rows, columns=[*pools.KEY, "cases"])
    if not rows:
        return Changes(cases, _judged(pooled, np.empty(0), np.empty(0), edge, 0), None, None, None)
    of_pools = repeats.estimates(np.array(means[0]), np.array(means[1]), np.array(errors), backends)
    pooled = _judged(pooled, of_pools.change, _half(of_pools, len(rows)), edge, sure_of=0)
    pooled = pooled[of_pools.freedom > 0]
    luck = repeats.advice(of_pools.luck, len(rows))
    return Changes(cases, pooled, None, None, None, luck)


def _half(found: repeats.Estimates, tests: int) -> np.ndarray:
    freedom = np.maximum(found.freedom, 1.0)
    return np.asarray(stats.t.isf(repeats.tail(tests), freedom) * found.error)


def _by_process(
    side: pd.DataFrame, both: pd.DataFrame, of_place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log times and their variances, a row per case and a column per run.

    Of a case that has a control, of the ratio to it in the same run, turn by turn.
    """
    files = {file: column for column, file in enumerate(side["file"].unique())}
    at = {(row["case"], row["file"]): row for row in side.to_dict("records")}
    x, variance = np.full((2, len(both), len(files)), np.nan)
    names = both["case"].tolist()
    for i, name in enumerate(names):
        for file, column in files.items():
            case = at.get((name, file))
            base = at.get((names[of_place[i]], file)) if of_place[i] >= 0 else None
            if case is None or (base is None and of_place[i] >= 0):
                continue
            log, error = np.log(case["median_s"]), case["error"]
            if base is not None:
                log, error = turns.speedup(base, case)
            x[i, column], variance[i, column] = log, np.nan_to_num(error) ** 2
    return x, variance


def _described(both: pd.DataFrame) -> pd.DataFrame:
    return both[["case", *PLACE, "backend"]].assign(
        before_s=both["median_s_before"], after_s=both["median_s_after"]
    )


def _judged(
    frame: pd.DataFrame, change: np.ndarray, half: np.ndarray, edge: float, sure_of: float
) -> pd.DataFrame:
    """With intervals of log ratios as ratios, and what the changes are called."""
    said = verdicts(change, half, edge, sure_of)
    low, high = np.exp(change - half), np.exp(change + half)
    return frame.assign(ratio=np.exp(change), low=low, high=high, verdict=said)


def verdicts(change: np.ndarray, half: np.ndarray, edge: float, sure_of: float) -> np.ndarray:
    """What changes of log times are called, each known within ``half``.

    Args:
        edge: the change that is too small to matter.
        sure_of: a change has to be surely larger.
    """
    low, high = change - half, change + half
    verdict = np.full(len(low), UNDECIDED, dtype=object)
    verdict[(low > sure_of) & (high > edge)] = SLOWER
    verdict[(high < -sure_of) & (low < -edge)] = FASTER
    verdict[(low >= -edge) & (high <= edge)] = SAME
    return verdict


# ---- in words ------------------------------------------------------------------------------------


def render(found: Changes) -> str:
    """The comparison as text: verdicts that matter first, pools before cases; the count of each."""
    lines = []
    for row in found.pools.to_dict("records"):
        what = f"{row['operation']} {row['pass']} {row['dtype']} {row['backend']}"
        lines.append((row, what, f"{counted(row['cases'], 'case')} together"))
    is_gone = found.cases["verdict"] == MISSING
    for row in found.cases[~is_gone].to_dict("records"):
        times = f"{units.duration(row['before_s']):>8} → {units.duration(row['after_s']):>8}"
        lines.append((row, row["case"], times))
    lines.sort(key=lambda line: VERDICTS.index(line[0]["verdict"]))
    longest = max((len(what) for _, what, _ in lines), default=0)
    text = [
        f"{MISSING:9}  {backend}: {counted(len(part), 'case')}, as {part['case'].iloc[0]}"
        for backend, part in found.cases[is_gone].groupby("backend", sort=False)
    ]
    text += [
        f"{row['verdict']:9}  {what:{longest}}  {times:>19}  {row['ratio']:.3f}× the time "
        f"({_bound(row['low'])} to {_bound(row['high'])})"
        for row, what, times in lines
    ]
    if found.drift is not None:
        text.append(
            f"control {found.control}: {found.drift:.3f}× the time between the runs, taken off"
        )
    if found.scatter is not None:
        text.append(f"scatter from run to run beyond that of the rounds: {found.scatter:.1%}")
    text += [found.luck] * bool(found.luck) + [f"note: {note}" for note in found.notes]
    for words, frame in (("all lengths together", found.pools), ("cases", found.cases)):
        if not frame.empty:
            counts = frame["verdict"].value_counts()
            shown = [v for v in VERDICTS if v != MISSING or counts.get(v, 0)]
            of_each = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in shown)
            text.append(f"{words}: {of_each}")
    return "\n".join(text)


def _bound(ratio: float) -> str:
    """Of three rounds an interval may reach anywhere; how far past 1,000 is no matter."""
    if ratio > 1000:
        return "over 1,000"
    return f"{ratio:.3f}" if ratio >= 0.001 else "under 0.001"
