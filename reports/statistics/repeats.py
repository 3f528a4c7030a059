"""A change between two versions that were each measured in several processes.

A process has luck of its own (where its memory lies, how busy the machine was while it lived). All
of its rounds share it, and no count of rounds averages it out. So the process is the unit: of n
before and m after, x = log(time) each, the change is the difference of the two means, and its
variance s²·(1/n + 1/m), with s² that of processes about the mean of their side, and Student's t.

Of few processes s² is a guess, but several backends have theirs. Each is drawn towards what is
usual of all, as far as they agree among themselves (Smyth, "Linear models and empirical Bayes
methods", 2004); Student's t has as many degrees of freedom more. What a process does to all cases
of a backend alike makes their s² agree without their being known the better for it, so that a
backend counts once, however many its cases.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

_POWER = 0.9  # of 10 true changes so many are to be seen
MOST_REPEATS = 100
_LEAST_VARIANCE = 1e-12  # of times that are alike to the last digit


@dataclass(frozen=True)
class Estimates:
    """Per case: the change, its standard error and degrees of freedom (0: processes are missing).

    ``luck``: standard deviation of processes about the mean of their side, of all cases together.
    """

    change: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    luck: float


def estimates(
    before: np.ndarray, after: np.ndarray, within: np.ndarray, backends: int
) -> Estimates:
    """The change of every case.

    Args:
        before, after: log times, a row per case and a column per process; NaN where a process does
            not have the case.
        within: per case the variance of the change by the rounds alone; it is at least that.
        backends: how many there are among the cases.
    """
    counts = [np.isfinite(side).sum(axis=1) for side in (before, after)]
    freedom = np.where(np.minimum(*counts) > 0, counts[0] + counts[1] - 2, 0)
    there = freedom > 0
    change, variance = np.full(len(before), np.nan), np.full(len(before), np.nan)
    change[there] = np.nanmean(after[there], axis=1) - np.nanmean(before[there], axis=1)
    squares = sum(np.nansum(_centred(side[there]) ** 2, axis=1) for side in (before, after))
    variance[there] = np.maximum(squares / freedom[there], _LEAST_VARIANCE)
    luck = (
        float(np.sqrt(np.average(variance[there], weights=freedom[there]))) if any(there) else 0.0
    )
    variance[there], total = _moderated(variance[there], freedom[there], backends)
    with np.errstate(divide="ignore"):
        error = np.sqrt(np.maximum(variance * (1 / counts[0] + 1 / counts[1]), within))
    moderated = freedom.astype(float)
    moderated[there] = total
    return Estimates(change, error, moderated, luck)


def _centred(side: np.ndarray) -> np.ndarray:
    return np.asarray(side - np.nanmean(side, axis=1, keepdims=True))


def _moderated(
    variance: np.ndarray, freedom: np.ndarray, backends: int
) -> tuple[np.ndarray, np.ndarray]:
    """Variances drawn towards one another, and their degrees of freedom, the usual one's included.

    The usual one, s₀² of d₀ degrees, has the mean and the variance of log s² right.
    """
    if backends < 2 or len(variance) < 2:
        return variance, freedom.astype(float)
    half = freedom / 2
    logs = np.log(variance) - special.digamma(half) + np.log(half)
    beyond = logs.var(ddof=1) - special.polygamma(1, half).mean()
    prior = most = float(freedom.mean()) * (backends - 1)
    if beyond > special.polygamma(1, most / 2):
        prior = 2 * optimize.brentq(lambda x: special.polygamma(1, x) - beyond, 1e-6, most / 2)
    usual = np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2))
    return (prior * usual + freedom * variance) / (prior + freedom), prior + freedom


def tail(tests: int, level: float = 0.95, families: int = 2) -> float:
    """What an interval leaves out at either end, so that all of several ``tests`` hold (Šidák).

    Args:
        tests: of one of the families, which share the chances of a false alarm.
    """
    return float((1 - level ** (1 / (families * max(1, tests)))) / 2)


def needed(luck: float, change: float, tests: int = 1) -> int | None:
    """Processes a side with which a change is seen 9 times in 10; None of more than a hundred.

    Args:
        luck: standard deviation of processes, of log times.
        change: relative, as 0.05.
        tests: how many are made at once.
    """
    for count in range(2, MOST_REPEATS + 1):
        freedom = 2 * count - 2
        shift = np.log1p(change) / (max(luck, 1e-6) * (2 / count) ** 0.5)
        if stats.nct.sf(stats.t.isf(tail(tests), freedom), freedom, shift) >= _POWER:
            return count
    return None


def advice(luck: float, tests: int = 1) -> str:
    """The luck in words, and how many repeats a change of 2, 5 and 10 % needs."""
    counts = {change: needed(luck, change, tests) for change in (0.02, 0.05, 0.10)}
    shown = ", ".join(
        f"{change:.0%} takes {count or f'over {MOST_REPEATS}'}" for change, count in counts.items()
    )
    said = f"luck of a process: {luck:.1%} (standard deviation)"
    return f"{said}; to be seen 9 times in 10, a change of {shown} runs a side"
