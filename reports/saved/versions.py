"""The cases of two versions, each measured in one run or in several, side by side."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.runs import PLACE, TRAINING_STEP, NoRuns, Runs
from linear_vit.screen import counted

DEFAULT_CONTROL = PYTORCH
_OF_A_MEDIAN = ["median_s", "error", "independent_rounds", "seconds", "turns"]
# What two cases of one name have alike if they are the same thing.
_METHOD = {
    "clock": "timed by different clocks",
    "least_bytes": "of different shapes",
    "settings": "of different settings",
}
_COLUMNS = ["case", *PLACE, "backend", "file", *_OF_A_MEDIAN, *_METHOD]
_COLUMNS += ["disturbed", "name", "ratios", "datetime"]


@dataclass
class Versions:
    """What two versions have in common.

    ``sides``: of each a row per case and run, undisturbed. ``both``: the newest of each case, with
    its name in words as ``case``, and what differs ending in ``_before`` and ``_after``.
    ``missing``: the cases of the earlier version that the later one lacks. ``control``: the backend
    whose code is the same in both, if there is one; ``is_control`` and ``of_place``: per case of
    ``both`` whether it is of that, and the row of the control at its place, −1 without one.
    """

    sides: tuple[pd.DataFrame, pd.DataFrame]
    both: pd.DataFrame
    missing: pd.DataFrame
    control: str | None
    is_control: np.ndarray
    of_place: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether a side has several runs of a case."""
        return any(bool(side["case"].duplicated().any()) for side in self.sides)

    def newest(self, when: str) -> pd.DataFrame:
        """The medians of a side, ``before`` or ``after``."""
        return pd.DataFrame({name: self.both[f"{name}_{when}"] for name in _OF_A_MEDIAN})


def pair_up(before: Runs, after: Runs, control: str | None, anyway: bool) -> Versions:
    """The cases of either version, and which of them are the same thing.

    Args:
        before, after: saved runs, all cases of each.
        control: the backend that shall be it; None for none.
        anyway: whether runs of different environments are paired, too.

    Raises:
        NoRuns: the runs may not be compared, or have no case in common; the message says why.
    """
    notes: list[str] = []
    kept, why = _comparable(before, after)
    if not kept and not anyway:
        obstacles = "; ".join(why)
        hint = "(--anyway compares them all the same)"
        raise NoRuns(f"these runs may not be compared: {obstacles} {hint}")
    heads = [*before.heads, *after.heads]
    if not kept:
        notes.append("compared although they differ in " + "; ".join(why))
        kept = {head["file"] for head in heads}
    elif len(kept) < len({head["file"] for head in heads}):
        notes.append(f"of {counted(len(heads), 'run')}, the {len(kept)} of the same environment")
    # Whether length and backend alone do not tell the cases of an operation apart.
    place = [name for name in (*PLACE, "backend", "file") if name != "setting"]
    kernels = [run.kernels for run in (before, after) if not run.kernels.empty]
    ambiguous = any(bool(frame.duplicated(place).any()) for frame in kernels)
    one, other = (_cases(run, kept, with_setting=ambiguous) for run in (before, after))
    lost = _newest(one[~one["case"].isin(other["case"])])
    new = _newest(other[~other["case"].isin(one["case"])])
    for frame, where in ((lost, "earlier"), (new, "later")):
        if len(frame):
            notes.append(f"{counted(len(frame), 'case')} only in the {where} run")
    one, other = _undisturbed(one, notes), _undisturbed(other, notes)
    both = _same_method(_newest(one).merge(_newest(other), on="case", suffixes=SUFFIXES), notes)
    if both.empty:
        raise NoRuns("the two runs have no case in common")
    control = _usable(control, both, bool(why), notes)
    is_control = (both["backend"] == control).to_numpy()
    at = dict(zip(_places(both[is_control]), np.flatnonzero(is_control), strict=True))
    of_place = np.array([at.get(where, -1) for where in _places(both)], int)
    of_place = np.where(is_control, -1, of_place)
    return Versions((one, other), both, lost, control, is_control, of_place, notes)


SUFFIXES = ("_before", "_after")


def _places(cases: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(cases[PLACE].itertuples(index=False, name=None))


def _comparable(before: Runs, after: Runs) -> tuple[set[str], list[str]]:
    """Files that match a run of the other side; if none, what the nearest differ in."""
    matches: set[str] = set()
    differ: list[list[str]] = []
    for old in before.heads:
        for new in after.heads:
            differ.append(machines.obstacles(old["facts"], new["facts"]))
            if not differ[-1]:
                matches |= {old["file"], new["file"]}
    return matches, [] if matches else min(differ, key=len, default=[])


def _cases(runs: Runs, files: set[str], *, with_setting: bool) -> pd.DataFrame:
    """Kernels and training steps in one table, the oldest first, each named in words."""
    rows: list[dict[Any, Any]] = []
    for frame in (runs.kernels, runs.training):
        for row in frame.to_dict("records"):
            if row["file"] in files:
                rows.append(_step(row) if "model" in row else _kernel(row, with_setting))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table.sort_values("datetime", kind="stable", ignore_index=True)


def _kernel(row: dict[Any, Any], with_setting: bool) -> dict[Any, Any]:
    words = [row["operation"], row["pass"], row["dtype"]]
    words += [f"{row['sweep']} sweep"] if row["sweep"] else []
    words += [counted(row["total_tokens"], "token")] if row["total_tokens"] else []
    words += [f"{row['setting']},"] if with_setting else []
    return row | {"case": " ".join([*words, f"N = {row['N']:,}", row["backend"]])}


def _step(row: dict[Any, Any]) -> dict[Any, Any]:
    """The settings are part of what a step is: two presets are two cases."""
    s = row["settings"]
    return row | {
        "case": f"{TRAINING_STEP} {row['model']} ({row['backend']}), dim {s['dim']}, "
        f"depth {s['depth']}, batch {s['batch_size']}, {s['dataset']}, {row['dtype']}",
        # A model's step has no control of its own; its backend names no control either.
        "backend": f"{row['model']} with {row['backend']}",
        **{"total_tokens": 0, "N": 0, "clock": "", "setting": ""},
    }


def _newest(side: pd.DataFrame) -> pd.DataFrame:
    return side.drop_duplicates("case", keep="last")


def _undisturbed(side: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    lost = side[side["disturbed"].notna()]
    if len(lost):
        first = f"as {lost['case'].iloc[0]} ({lost['disturbed'].iloc[0]})"
        notes.append(f"{counted(len(lost), 'disturbed case')} left out, {first}")
    return side[side["disturbed"].isna()]


def _same_method(both: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Without the cases that are of the same name and not of the same thing."""
    for column, words in _METHOD.items():
        one, other = (both[column + when] for when in SUFFIXES)
        alike = (one == other) | (one.isna() & other.isna())
        if not alike.all():
            notes.append(f"{counted(int((~alike).sum()), 'case')} left out: {words}")
        both = both[alike]
    known = both[["error_before", "error_after"]].notna().all(axis=1)
    if not known.all():
        notes.append(f"{counted(int((~known).sum()), 'case')} left out: their rounds were not kept")
    renamed = {f"{name}_after": name for name in (*PLACE, "backend")}
    return both[known].reset_index(drop=True).rename(columns=renamed)


def _usable(control: str | None, both: pd.DataFrame, differ: bool, notes: list[str]) -> str | None:
    """The control's name if both runs have it, and with the same PyTorch; else None and a note."""
    timed = set(both["backend"])
    if control is None:
        return None
    if differ:
        notes.append("of different environments no backend is a control")
    elif control not in timed:
        if control != DEFAULT_CONTROL:
            raise NoRuns(f"no common case of the control {control!r}; there are {sorted(timed)}")
        notes.append(
            f"no common case of a control ({control}): a drift of the machine between the runs "
            "counts as a change"
        )
    elif timed == {control}:
        notes.append(f"nothing but {control} in common, so that it is compared and no control")
    else:
        return control
    return None
