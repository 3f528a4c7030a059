"""``python -m reports compare --baseline NAME``: every backend against one, case by case.

A case's speed-up is the ratio of two backends' times turn by turn
(:mod:`reports.statistics.turns`); in a run that does not say which rounds were of one turn, the
ratio of two medians. Its interval is 95 %, from the standard error of that, or of both medians.
Over the lengths of a group stand the geometric mean and the worst.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from linear_vit import options
from linear_vit.reports import units
from linear_vit.reports.saved.runs import NoRuns, Runs, Words
from linear_vit.reports.statistics import turns
from linear_vit.screen import counted

_PLACE = ["machine", "sweep", "total_tokens", "operation", "pass", "dtype", "setting"]
_GROUP = [*_PLACE, "backend"]


def speedups(runs: Runs, baseline: str, backends: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per case that the baseline has, too.

    Args:
        runs: saved runs.
        baseline: the backend to divide by.
        backends: those to compare; None takes every other one.

    Returns:
        Columns of ``_GROUP``, ``N``, ``median_s``, ``baseline_s``, ``speedup``, ``low``, ``high``,
        ``disturbed``.

    Raises:
        NoRuns: none is of both backends.
        OptionError: no case is of one of them.
    """
    frame = runs.kernels
    there = sorted(frame["backend"].unique()) if not frame.empty else []
    options.known("baseline", [baseline], there)
    others = set(options.known("backends", backends, there)) - {baseline}
    # Of one run: medians of different runs were not taken by turns.
    both = turns.against(
        frame[frame["backend"].isin(others)],
        frame[frame["backend"] == baseline],
        [*_PLACE, "N", "file"],
    ).rename(columns={"median_s_base": "baseline_s"})
    if both.empty:
        raise NoRuns(f"no run has a case of {baseline!r} and of another backend, too")
    if both["disturbed"].notna().all():
        raise NoRuns(f"every case was disturbed ({both['disturbed'].iloc[0]}): nothing to compare")
    columns = [*_GROUP, "N", "median_s", "baseline_s", "speedup", "low", "high", "disturbed"]
    return both[columns].sort_values([*_GROUP, "N"], kind="stable").reset_index(drop=True)


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """A row per group: lengths, geometric mean, and the worst with its N.

    Of the cases that nothing disturbed.
    """
    steady = cases[cases["disturbed"].isna()].sort_values("speedup", kind="stable")
    of_groups = steady.groupby(_GROUP, sort=False)
    found = of_groups.agg(
        lengths=("N", "size"),
        geometric_mean=("speedup", lambda ratios: float(np.exp(np.log(ratios).mean()))),
        worst=("speedup", "first"),
        worst_N=("N", "first"),
    )
    return found.reset_index().sort_values(_GROUP, kind="stable", ignore_index=True)


def render(cases: pd.DataFrame, baseline: str, words: Words) -> str:
    """The comparison as text, a block per operation, pass, dtype and backend."""
    lines: list[str] = []
    several = cases.groupby("operation")["setting"].nunique() > 1
    parts = dict(list(cases.groupby(_GROUP)))
    for summary in summarise(cases).to_dict("records"):
        where = (
            [f"{counted(summary['total_tokens'], 'token')} a call"]
            if summary["total_tokens"]
            else []
        )
        where += [summary["setting"]] if several[summary["operation"]] else []
        where += [f"{summary['sweep']} sweep"] if summary["sweep"] else []
        what = [words.operation(summary["operation"]), summary["pass"], summary["dtype"], *where]
        lines.append(
            f"{', '.join([*what, summary['machine']])}: {summary['backend']} over {baseline}"
        )
        for row in parts[tuple(summary[name] for name in _GROUP)].to_dict("records"):
            after = f"({row['low']:.2f} to {row['high']:.2f})"
            if not np.isfinite(row["low"]):
                after = "(its rounds were not kept)"
            if isinstance(row["disturbed"], str):
                after += f", disturbed: {row['disturbed']}"
            lines.append(
                f"  N = {row['N']:>9,}  {units.duration(row['median_s']):>8} against "
                f"{units.duration(row['baseline_s']):>8}  {row['speedup']:6.2f}× {after}"
            )
        lines.append(
            f"  geometric mean {summary['geometric_mean']:.2f}×, worst {summary['worst']:.2f}× "
            f"at N = {summary['worst_N']:,}"
        )
    return "\n".join(lines)
