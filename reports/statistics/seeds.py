"""The statistics of a handful of seeds: intervals, and ratios paired by seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Interval = dict[str, Any]  # mean, half_width (None of a single value), values
Ratio = dict[str, Any]  # median, low, high, values


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and half width t·s / √n of the two-sided Student interval, n − 1 degrees."""
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, got none")
    half_width = None
    if n > 1:
        from scipy import stats

        quantile = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
        half_width = quantile * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.fmean(values), "half_width": half_width, "values": list(values)}


def paired_ratios(
    runs: Mapping[int, Any], others: Mapping[int, Any], value: Callable[[Any], float | None]
) -> Ratio | None:
    """value(run) / value(other) of the same seed; None without a pair.

    Pairs where either value is None are left out.
    """
    pairs = [(value(runs[seed]), value(others[seed])) for seed in sorted(runs) if seed in others]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    if not ratios:
        return None
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "values": ratios,
    }


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """A speed-up in words, with its range where it has one."""
    if ratio is None:
        return "–"
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}×"
    return f"{ratio['median']:.2f}× [{ratio['low']:.2f} – {ratio['high']:.2f}]"


def percent_text(interval: Mapping[str, Any]) -> str:
    """A mean in percent, in words, with the half width of its interval where it has one."""
    if interval["half_width"] is None:
        return f"{interval['mean']:.1f} % (one seed)"
    return f"{interval['mean']:.1f} ± {interval['half_width']:.1f} %"


def points_text(gain: Mapping[str, Any] | None) -> str:
    """A gain in percentage points, in words."""
    if gain is None:
        return "–"
    half = f" ± {gain['half_width']:.1f}" if gain["half_width"] is not None else ""
    return f"{gain['mean']:+.1f}{half}"
