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

_PLACE = ["machine", "sweep", "total_tokens", "operation", "pass", "dtype", "setting"]
_GROUP = [*_PLACE, "backend"]
_NORMAL_95 = 1.96


def speedups(runs: Runs, baseline: str, backends: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per case that the baseline has, too.

    Args:
        runs: saved runs.
        baseline: the backend to divide by.
        backends: those to compare; None takes every other one.

    Returns:
        Columns of ``_GROUP``, ``N``, ``median_s``, ``baseline_s``, ``speedup``, ``low``, ``high``.

    Raises:
        NoRuns: none is of both backends.
        OptionError: no case is of one of them.
    """
    frame = runs.kernels
    there = sorted(frame["backend"].unique()) if not frame.empty else []
    options.known("baseline", [baseline], there)
    backends = options.known("backends", backends, there)
    others = [name for name in backends if name != baseline]
    case = [*_PLACE, "N"]
    base = frame[frame["backend"] == baseline]
    base = base[[*case, "file", *turns.OF_A_CASE]]
    # Of one run: medians of different runs were not taken by turns.
    both = frame[frame["backend"].isin(others)].merge(
        base, on=[*case, "file"], suffixes=("", "_base")
    )
    if both.empty:
        raise NoRuns(f"no run has a case of {baseline!r} and of another backend, too")
    both["baseline_s"] = both["median_s_base"]
    found = turns.speedups(both)
    both["speedup"] = np.exp(found["log"])
    for name, side in (("low", -1), ("high", 1)):
        both[name] = np.exp(found["log"] + side * _NORMAL_95 * found["error"])
    columns = [*_GROUP, "N", "median_s", "baseline_s", "speedup", "low", "high"]
    return both[columns].sort_values([*_GROUP, "N"], kind="stable").reset_index(drop=True)


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """A row per group: lengths, geometric mean, and the worst with its N."""
    rows = []
    for key, part in cases.groupby(_GROUP, sort=False):
        worst = part.sort_values("speedup").iloc[0]
        rows.append(
            {
                **dict(zip(_GROUP, key, strict=True)),
                "lengths": len(part),
                "geometric_mean": float(np.exp(np.log(part["speedup"]).mean())),
                "worst": float(worst["speedup"]),
                "worst_N": int(worst["N"]),
            }
        )
    return pd.DataFrame(rows)


def render(cases: pd.DataFrame, baseline: str, words: Words) -> str:
    """The comparison as text, a block per operation, pass, dtype and backend."""
    lines: list[str] = []
    several = cases.groupby("operation")["setting"].nunique() > 1
    for summary in summarise(cases).to_dict("records"):
        part = cases
        for name in _GROUP:
            part = part[part[name] == summary[name]]
        total = f"{summary['total_tokens']:,} tokens a call, " if summary["total_tokens"] else ""
        if several[summary["operation"]]:
            total += f"{summary['setting']}, "
        if summary["sweep"]:
            total += f"{summary['sweep']} sweep, "
        lines.append(
            f"{words.operation(summary['operation'])}, {summary['pass']}, {summary['dtype']}, "
            f"{total}{summary['machine']}: {summary['backend']} over {baseline}"
        )
        for row in part.to_dict("records"):
            interval = f"({row['low']:.2f} to {row['high']:.2f})"
            lines.append(
                f"  N = {row['N']:>9,}  {units.duration(row['median_s']):>8} against "
                f"{units.duration(row['baseline_s']):>8}  {row['speedup']:6.2f}× "
                f"{interval if np.isfinite(row['low']) else '(its rounds were not kept)'}"
            )
        lines.append(
            f"  geometric mean {summary['geometric_mean']:.2f}×, worst {summary['worst']:.2f}× "
            f"at N = {summary['worst_N']:,}"
        )
    return "\n".join(lines)
