"""Two backends of one case, whose rounds took turns: the ratio of their times, turn by turn.

A machine that others use has several speeds, and keeps one for seconds. A median of rounds is then
that of whichever speed had more than half of them, and two backends that did not stop after the
same number of rounds may be judged at different speeds: the ratio of their medians is off by as
much as the speeds differ. Within a turn both ran at one speed, so the median of the ratios of
single turns is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

OF_A_CASE = ["name", "median_s", "error", "seconds", "turns", "ratios", "disturbed"]
# Of fewer turns a median is luck, and its error too.
_FEWEST = 5
_FEWEST_FOR_DEPENDENCE = 8
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Ratio:
    """Natural logarithm of a ratio of times, its standard error, and what these are known from."""

    log: float
    error: float
    independent_rounds: float


def ratio(own: Mapping[Any, Any], base: Mapping[Any, Any]) -> Ratio | None:
    """log(own time / base's), the median over turns; None where the two did not take turns.

    Args:
        own, base: rows of :attr:`reports.saved.runs.Runs.kernels`, of which ``turns`` (None, or
            what all cases that took turns have alike) and ``seconds`` (a round a turn) are used.
    """
    n = min(len(own["seconds"]), len(base["seconds"]))
    if own["turns"] is None or own["turns"] != base["turns"] or n < _FEWEST:
        return None
    logs = np.log(np.asarray(own["seconds"][:n]) / np.asarray(base["seconds"][:n]))
    q1, median, q3 = (float(x) for x in np.quantile(logs, (0.25, 0.5, 0.75)))
    widened = dependence(logs)
    return Ratio(median, widened * error_of_median(q1, q3, n), n / widened**2)


def speedup(own: Mapping[Any, Any], base: Mapping[Any, Any]) -> tuple[float, float]:
    """log(base's time / own) and its standard error.

    Turn by turn; where a file kept that ratio and no rounds, that, of unknown error; and of the
    medians where the two did not take turns.

    Args:
        own, base: rows of :attr:`reports.saved.runs.Runs.kernels`, with the columns ``OF_A_CASE``.
    """
    found = ratio(base, own)
    if found is not None:
        return found.log, found.error
    for one, other, sign in ((own, base, 1), (base, own, -1)):
        kept = one["ratios"].get(other["name"])
        if kept is not None:
            return sign * float(np.log(kept)), float("nan")
    log = np.log(base["median_s"] / own["median_s"])
    return float(log), float(np.hypot(own["error"], base["error"]))


def against(frame: pd.DataFrame, base: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """The cases that have their like in ``base``, with ``speedup`` over it, ``low`` and ``high``.

    Those are of a 95 % interval. What the base has of a turn is there, too, ``_base`` at the end of
    its names; where the base was disturbed, so is the ratio.

    Args:
        frame, base: rows of :attr:`reports.saved.runs.Runs.kernels`.
        on: the columns that two have to have in common.
    """
    both = frame.merge(base[[*on, *OF_A_CASE]], on=on, suffixes=("", "_base"))
    found = [
        interval(*speedup(row, {name: row[f"{name}_base"] for name in OF_A_CASE}))
        for row in both.to_dict("records")
    ]
    both["disturbed"] = both["disturbed"].where(both["disturbed"].notna(), both["disturbed_base"])
    both[["speedup", "low", "high"]] = np.array(found, float).reshape(-1, 3)
    return both


def interval(log: float, error: float) -> tuple[float, float, float]:
    """A ratio with its 95 % interval, of its logarithm and the standard error of that."""
    ratio, low, high = np.exp([log, log - _NORMAL_95 * error, log + _NORMAL_95 * error])
    return float(ratio), float(low), float(high)


def error_of_median(q1: float, q3: float, rounds: int) -> float:
    """Standard error of a median, from quartiles: 1.2533 σ / √n with σ = IQR / 1.349."""
    return 1.2533 / 1.349 * (q3 - q1) / rounds**0.5


def dependence(rounds: Sequence[float] | np.ndarray) -> float:
    """By how much rounds that follow one another in drift widen the error of their median, ≥ 1.

    The variance of a median is that of independent rounds times 1 + 2·Σ ρₖ, with ρₖ the
    autocorrelation of the signs of their deviations; here of an AR(1) process, whose φ follows from
    ρ₁ (Gaussian: ρₖ = 2/π·asin φᵏ) and is corrected for the bias (1 + 4φ)/n of few rounds.
    """
    n = len(rounds)
    if n < _FEWEST_FOR_DEPENDENCE:
        return 1.0
    values = np.asarray(rounds, float)
    signs = np.sign(values - np.median(values))
    power = float(signs @ signs)
    if power == 0:
        return 1.0
    phi = np.sin(np.pi / 2 * float(signs[1:] @ signs[:-1]) / power)
    phi = np.clip(phi + (1 + 4 * max(phi, 0.0)) / n, 0.0, 0.95)
    return float(np.sqrt(1 + 4 / np.pi * np.arcsin(phi ** np.arange(1, n)).sum()))
