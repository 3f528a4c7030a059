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
from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.runs import PLACE, TRAINING_STEP, Asked, NoRuns, Runs, only
from linear_vit.reports.statistics import pair, pools, repeats, turns

SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "same", "undecided"
MISSING = "missing"  # in the later run
VERDICTS = (MISSING, SLOWER, FASTER, UNDECIDED, SAME)
DEFAULT_CONTROL = PYTORCH
MARGIN = 0.03  # a change that is surely smaller is called none
_WHEN = ("before", "after")
_OF_A_MEDIAN = ["median_s", "error", "independent_rounds", "seconds", "turns"]


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
    notes: list[str] = []
    sides, why = _sides(before, after, anyway, notes)
    missing = _newest(sides[0])
    missing = missing[~missing["case"].isin(sides[1]["case"])]
    sides = [_steady(side, notes) for side in sides]
    both = _in_both(sides, notes)
    control = _usable_control(both, control, why, notes)
    is_control = (both["backend"] == control).to_numpy()
    of_place = _controls(both, is_control)
    edge = float(np.log1p(margin))
    several = any(side["case"].duplicated().any() for side in sides)
    judge = _of_several if several else _of_two
    found = judge(both, sides, of_place, is_control, edge)
    if not several:
        notes.append("one run a side does not show the luck of a process; several do (--with)")
        if found.scatter is None and not is_control.all():
            notes.append("too few cases to see how much runs of the same code differ")
    drift = (both["median_s_after"] / both["median_s_before"])[is_control].median()
    lost = missing.assign(before_s=missing["median_s"], verdict=MISSING)
    lost = lost[["case", *PLACE, "backend", "before_s", "verdict"]]
    if once := int(found.cases["verdict"].isna().sum()):
        notes.append(f"{once} cases left out: of one run a side, where others are of several")
    kept = found.cases[~is_control & found.cases["verdict"].notna().to_numpy()]
    return replace(
        found,
        cases=pd.concat([kept, lost], ignore_index=True),
        control=control,
        drift=float(drift) if is_control.any() else None,
        notes=notes,
    )


# ---- judged --------------------------------------------------------------------------------------


def _of_two(
    both: pd.DataFrame,
    sides: Sequence[pd.DataFrame],
    of_place: np.ndarray,
    is_control: np.ndarray,
    edge: float,
) -> Changes:
    """Of one run a side."""
    before, after = (_of(both, when) for when in _WHEN)
    found = pair.compare(before, after, of_place, is_control)
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


def _of_several(
    both: pd.DataFrame,
    sides: Sequence[pd.DataFrame],
    of_place: np.ndarray,
    is_control: np.ndarray,
    edge: float,
) -> Changes:
    """Of several runs a side, each a process."""
    x, variance = zip(*(_by_process(side, both, of_place) for side in sides), strict=True)
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
    """With intervals of log ratios as ratios; a change has to be surely past ``sure_of``."""
    low, high = change - half, change + half
    verdict = np.full(len(low), UNDECIDED, dtype=object)
    verdict[(low > sure_of) & (high > edge)] = SLOWER
    verdict[(high < -sure_of) & (low < -edge)] = FASTER
    verdict[(low >= -edge) & (high <= edge)] = SAME
    ratio = np.exp(change)
    return frame.assign(ratio=ratio, low=np.exp(low), high=np.exp(high), verdict=verdict)


# ---- in words ------------------------------------------------------------------------------------


def render(found: Changes) -> str:
    """The comparison as text: verdicts that matter first, pools before cases; the count of each."""
    lines = []
    for row in found.pools.to_dict("records"):
        what = f"{row['operation']} {row['pass']} {row['dtype']} {row['backend']}"
        lines.append((row, f"{what:64} {row['cases']:4} cases together"))
    is_gone = found.cases["verdict"] == MISSING
    for row in found.cases[~is_gone].to_dict("records"):
        times = f"{units.duration(row['before_s']):>8} → {units.duration(row['after_s']):>8}"
        lines.append((row, f"{row['case']:64} {times}"))
    lines.sort(key=lambda line: VERDICTS.index(line[0]["verdict"]))
    text = [
        f"{MISSING:9}  {backend}: {len(part)} cases, as {part['case'].iloc[0]}"
        for backend, part in found.cases[is_gone].groupby("backend", sort=False)
    ]
    text += [
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
    text += [found.luck] * bool(found.luck) + [f"note: {note}" for note in found.notes]
    for words, frame in (("all lengths together", found.pools), ("cases", found.cases)):
        if not frame.empty:
            counts = frame["verdict"].value_counts()
            shown = [v for v in VERDICTS if v != MISSING or counts.get(v, 0)]
            counted = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in shown)
            text.append(f"{words}: {counted}")
    return "\n".join(text)


def _bound(ratio: float) -> str:
    """Of three rounds an interval may reach anywhere; how far past 1,000 is no matter."""
    if ratio > 1000:
        return "over 1,000"
    return f"{ratio:.3f}" if ratio >= 0.001 else "under 0.001"


# ---- read ----------------------------------------------------------------------------------------


def _sides(
    before: Runs, after: Runs, anyway: bool, notes: list[str]
) -> tuple[list[pd.DataFrame], list[str]]:
    """Every case of either side that may be compared, and what the environments differ in.

    Raises:
        NoRuns: they may not be compared.
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
    place = [name for name in (*PLACE, "backend", "file") if name != "setting"]
    kernels = [run.kernels for run in (before, after) if not run.kernels.empty]
    ambiguous = any(frame.duplicated(place).any() for frame in kernels)
    one, other = (_cases(run, with_setting=ambiguous) for run in (before, after))
    return [one[one["file"].isin(kept)], other], why


def _newest(side: pd.DataFrame) -> pd.DataFrame:
    return side.drop_duplicates("case", keep="last")


def _steady(side: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Without measurements that something disturbed."""
    disturbed = side[side["disturbed"].notna()]
    if len(disturbed):
        first = disturbed.iloc[0]
        notes.append(
            f"{len(disturbed)} disturbed cases left out, as {first['case']} ({first['disturbed']})"
        )
    return side[side["disturbed"].isna()]


def _in_both(sides: Sequence[pd.DataFrame], notes: list[str]) -> pd.DataFrame:
    """The newest of each case that both have.

    Raises:
        NoRuns: they have none in common.
    """
    one, other = map(_newest, sides)
    both = one.merge(other, on="case", suffixes=("_before", "_after"))
    for frame, where in ((one, "earlier"), (other, "later")):
        if alone := len(set(frame["case"]) - set(both["case"])):
            notes.append(f"{alone} cases only in the {where} run")
    both = _same_method(both, notes)
    if both.empty:
        raise NoRuns("the two runs have no case in common")
    return both


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
    columns += ["settings", "disturbed", "name", "ratios", "datetime"]
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
    table = table.sort_values("datetime", kind="stable", ignore_index=True)
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


def _of(both: pd.DataFrame, when: str) -> pd.DataFrame:
    return pd.DataFrame({name: both[f"{name}_{when}"] for name in _OF_A_MEDIAN})


def _controls(both: pd.DataFrame, is_control: np.ndarray) -> np.ndarray:
    """Per case the row of the control at its place, −1 where that is none or the case itself."""
    place = pd.MultiIndex.from_frame(both[PLACE])
    at = dict(zip(place[is_control], np.flatnonzero(is_control), strict=True))
    rows = np.array([at.get(where, -1) for where in place], int)
    return np.where(is_control, -1, rows)


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
