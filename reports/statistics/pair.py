"""What changed between two processes, each of which timed every case once.

A case's change is d = log(median after / median before); its standard error follows from the
rounds of both medians. Four things other than the code mislead:

- *Drift of the machine*, common to all backends of a case since their rounds took turns. It is read
  off the control, a backend whose code is the same in both. Drifts of single cases scatter about
  that of the whole run, and a control's own d is noisy; the two are weighed as their variances say
  (the best linear prediction of a random effect).
- *A machine of several speeds*, which a median of rounds may be at either of. Where both runs say
  which rounds were of one turn, the part of a case's own control in that weighing is the change of
  the ratio to it, turn by turn (:mod:`reports.statistics.turns`), and it is all of it where the
  medians of case and control, or of control and run, differ from each other by more than they may.
- *Luck of a process* (where its memory lies): the scatter of the changes beyond what their rounds
  explain, by their median absolute deviation, so that a few true changes do not count as scatter.
- *Many chances*: the intervals are simultaneous (Šidák), so that of two runs of the same code 95 %
  have no false alarm at all, however many cases there are.

What a process does to all cases of a backend alike can't be seen in one pair of them:
:mod:`reports.statistics.repeats` sees it in several.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.repeats import tail

LEAST_VARIANCE = 1e-8  # of a median of rounds that are alike to the clock's last digit
# Medians of a machine that kept one speed differ by less than so many of their standard errors.
_STEADY = 3
# Of fewer values a scatter is a guess.
_FEWEST_FOR_SCATTER = 6
_SIGMA_PER_MAD = 1.4826
_MAD_EFFICIENCY = 0.37  # of a scatter from n values, against their standard deviation
_ANYTHING = 100.0  # half an interval of logarithms: exp of more may overflow


@dataclass
class Errors:
    """Per case the variance of an estimate and its degrees of freedom."""

    variance: np.ndarray
    freedom: np.ndarray

    @classmethod
    def of_sums(cls, one: "Errors", other: "Errors") -> "Errors":
        """Of differences of two independent estimates (Welch and Satterthwaite)."""
        a, b = one.variance, other.variance
        return cls(a + b, (a + b) ** 2 / (a**2 / one.freedom + b**2 / other.freedom))

    @classmethod
    def of_medians(cls, cases: pd.DataFrame) -> "Errors":
        freedom = np.maximum(cases["independent_rounds"].to_numpy(float) - 1, 1.0)
        return cls(np.maximum(cases["error"].to_numpy(float) ** 2, LEAST_VARIANCE), freedom)


@dataclass
class Pair:
    """Logarithms of time after / before, per case.

    ``change`` has the machine's drift taken off, and is known within ``half``, of an interval that
    all cases have together. ``relative`` is that of the ratio to the case's own control, NaN
    without one; ``own`` and ``against`` are the errors of ``raw`` and ``relative`` by the rounds.
    ``scatter``: what the rounds do not explain, None of too few cases.
    """

    raw: np.ndarray
    own: Errors
    relative: np.ndarray
    against: Errors
    change: np.ndarray
    half: np.ndarray
    scatter: float | None


def compare(
    before: pd.DataFrame, after: pd.DataFrame, of_place: np.ndarray, is_control: np.ndarray
) -> Pair:
    """What changed.

    Args:
        before, after: the same cases, a row each, with ``median_s``, ``error``,
            ``independent_rounds``, ``seconds`` and ``turns`` as :class:`reports.saved.runs.Runs`.
        of_place: per case the row of the control at its place, −1 without one.
        is_control: which cases are of the control.
    """
    raw = np.log(after["median_s"].to_numpy() / before["median_s"].to_numpy())
    own = Errors.of_sums(Errors.of_medians(before), Errors.of_medians(after))
    relative, against = _against_controls(before, after, raw, own, of_place)
    share, drift, of_drift = _shares(raw, own.variance, is_control, of_place, relative, against)
    mixed = share > 0
    change = np.where(mixed, share * relative, 0) + (1 - share) * (raw - drift)
    from_own = (1 - share) * own.variance
    from_control = np.where(mixed, share * against.variance, 0)
    from_drift = (1 - share) * of_drift
    variance = from_own + from_control + from_drift
    scatter = _excess(change[~is_control], variance[~is_control])
    tests = max(1, int((~is_control).sum()))
    between = (scatter or 0.0) ** 2
    total = variance + between
    # Welch and Satterthwaite: each variance counts with what it is known from.
    unsure = from_own**2 / own.freedom + np.where(mixed, from_control**2 / against.freedom, 0)
    unsure += (from_drift**2 + between**2) / (_MAD_EFFICIENCY * tests)
    half = stats.t.isf(tail(tests), total**2 / unsure) * np.sqrt(total)
    return Pair(raw, own, relative, against, change, np.minimum(half, _ANYTHING), scatter)


def _against_controls(
    before: pd.DataFrame, after: pd.DataFrame, raw: np.ndarray, own: Errors, of_place: np.ndarray
) -> tuple[np.ndarray, Errors]:
    """Change of each case's ratio to the control of its place; NaN where that is nobody else.

    Turn by turn where both runs took turns and say so, else of the medians.
    """
    none = turns.Ratio(np.nan, np.nan, np.nan)
    ratios = []
    for side in (before, after):
        rows = side.to_dict("records")
        found = [turns.ratio(rows[i], rows[j]) if j >= 0 else None for i, j in enumerate(of_place)]
        ratios.append(pd.DataFrame([ratio or none for ratio in found]))
    turned = (ratios[1]["log"] - ratios[0]["log"]).to_numpy()
    of_turns = Errors.of_sums(*(Errors.of_medians(ratio) for ratio in ratios))
    of_medians = Errors.of_sums(own, Errors(own.variance[of_place], own.freedom[of_place]))
    by_turns = np.isfinite(turned)
    relative = np.where(of_place >= 0, raw - raw[of_place], np.nan)
    return np.where(by_turns, turned, relative), Errors(
        np.where(by_turns, of_turns.variance, of_medians.variance),
        np.where(by_turns, of_turns.freedom, of_medians.freedom),
    )


def _shares(
    raw: np.ndarray,
    variance: np.ndarray,
    is_control: np.ndarray,
    of_place: np.ndarray,
    relative: np.ndarray,
    against: Errors,
) -> tuple[np.ndarray, float, np.ndarray]:
    """How much of a case's change is that against its own control, and the rest's drift.

    Returns:
        Per case the share of ``relative``; the drift of the whole run, which the rest is free of
        when it is taken off; per case the variance of that.
    """
    if not is_control.any():
        return np.zeros(len(raw)), 0.0, np.zeros(len(raw))
    shifts, noise = raw[is_control], variance[is_control]
    centre = float(np.median(shifts))
    excess = _excess(shifts, noise)
    # Too few controls to tell drift from their noise: each is all drift for its own place.
    spread = np.inf if excess is None else excess**2
    of_control = variance[of_place]
    share = np.ones(len(raw)) if np.isinf(spread) else spread / (spread + of_control)
    # Medians that differ by more than they may are of a machine of several speeds.
    steady = np.abs(raw[of_place] - centre) <= _STEADY * np.sqrt(of_control)
    steady &= np.abs(raw - raw[of_place] - relative) <= _STEADY * np.sqrt(against.variance)
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
    deviation = _SIGMA_PER_MAD * stats.median_abs_deviation(values)
    return float(np.sqrt(max(0.0, deviation**2 - np.median(variance))))
