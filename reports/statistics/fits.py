"""How time grows with length, and from which length on one curve is below another.

Both answers come with an interval, or with the reason why the data gives none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy import interpolate, stats

from linear_vit.screen import counted

# An exponent less certain than ±0.25 does not tell linear from N^1.5.
_WIDEST_INTERVAL = 0.5
_FEWEST_LENGTHS = 5
_LARGEST_RESIDUAL = 0.25
_EXPONENTS = np.linspace(0.0, 3.5, 71)
_LEAST_RSS = 1e-12  # of times that lie on a curve to the last digit
# The constant a over the growing part at the shortest length, as log(a + _FLOOR_UNIT): the first is
# a pure power law. Each of a few looks nearer is three times as fine.
_FLOOR_UNIT = 1e-3
_FLOORS = np.linspace(np.log(_FLOOR_UNIT), np.log(1e4), 25)
_LOOKS = 8
# The exponents whose interval is read off: so many within it, unless it is narrower than what the
# times can tell apart.
_INSIDE, _FINE = 10, 41


@dataclass(frozen=True)
class Fit:
    """T = a + b·N^p by least squares of log T.

    ``exponent`` is p with its 95 % interval ``low`` to ``high``; ``floor`` is a, in seconds;
    ``residual`` the rms of log T about the fit; ``local_slope`` the log-log slope between the two
    longest lengths. Where ``reason`` is set the data does not support the fit: no number is to be
    quoted.
    """

    exponent: float
    low: float
    high: float
    floor: float
    scale: float
    residual: float
    local_slope: float
    lengths: int
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason:
            return f"no fit: {self.reason}"
        return f"N^{self.exponent:.2f} ({self.low:.2f} to {self.high:.2f})"


def fit_scaling(lengths: ArrayLike, seconds: ArrayLike) -> Fit:
    """Fit T = a + b·N^p with a ≥ 0, b > 0 over all lengths; p's interval from its profile.

    The interval holds every p whose best fit is not worse than the best of all by more than
    Student's t allows, RSS(p) ≤ RSS·(1 + t²/(n − 3)), so that it stays honest where a launch floor
    and the exponent can stand in for each other.
    """
    n = np.asarray(lengths, float)
    order = np.argsort(n)
    n, y = n[order], np.log(np.asarray(seconds, float)[order])
    count = len(n)
    nan = float("nan")
    if count < _FEWEST_LENGTHS:
        few = f"{counted(count, 'length')}, at least {_FEWEST_LENGTHS} are needed"
        return Fit(nan, nan, nan, nan, nan, nan, nan, count, few)
    slope = float((y[-1] - y[-2]) / np.log(n[-1] / n[-2]))

    # RSS(p) on a coarse grid of exponents, then on finer ones around those within the interval.
    allowed = 1 + float(stats.t.ppf(0.975, count - 3)) ** 2 / (count - 3)
    exponents = _EXPONENTS
    while True:
        profile, floors, offsets = _profile(n, y, exponents)
        best = int(profile.argmin())
        least = max(float(profile[best]), _LEAST_RSS)
        inside = np.flatnonzero(profile <= least * allowed)
        if len(inside) >= _INSIDE or exponents[1] - exponents[0] < 1e-5:
            break
        first, last = max(0, inside[0] - 1), min(len(exponents) - 1, inside[-1] + 1)
        exponents = np.linspace(exponents[first], exponents[last], _FINE)
    low = _edge(exponents, profile, least * allowed, inside[0], -1)
    high = _edge(exponents, profile, least * allowed, inside[-1], 1)

    p, floor = float(exponents[best]), float(floors[best])
    unit = float(np.exp(offsets[best]))
    residual = float(np.sqrt(least / count))
    reason: str | None = None
    if floor > (n[-1] / n[0]) ** p:
        reason = f"mostly a constant up to N = {n[-1]:.0f}"
    elif high - low > _WIDEST_INTERVAL or high >= _EXPONENTS[-1]:
        reason = f"the exponent is anywhere from {low:.2f} to {high:.2f}"
    elif residual > _LARGEST_RESIDUAL:
        reason = f"the times scatter by {residual:.0%} about a + b·N^p"
    scale = unit / n[0] ** p
    return Fit(p, low, high, floor * unit, scale, residual, slope, count, reason)


def _edge(exponents: np.ndarray, profile: np.ndarray, level: float, last: int, step: int) -> float:
    """Where RSS(p) passes the level, between the last exponent below it and the next."""
    beyond = last + step
    if not 0 <= beyond < len(exponents):
        return float(exponents[last])
    share = (level - profile[last]) / (profile[beyond] - profile[last])
    return float(exponents[last] + np.clip(share, 0, 1) * (exponents[beyond] - exponents[last]))


def _profile(
    n: np.ndarray, y: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per exponent: the least RSS of y = offset + log(floor + (n/n₀)^p), its floor and offset."""
    growth = ((n / n[0])[None, :] ** exponents[:, None])[:, None, :]
    rows = np.arange(len(exponents))
    candidates = np.broadcast_to(_FLOORS, (len(exponents), len(_FLOORS)))
    step = float(_FLOORS[1] - _FLOORS[0])
    for _ in range(_LOOKS + 1):
        floors = np.maximum(np.exp(candidates) - _FLOOR_UNIT, 0)
        residuals = y - np.log(floors[..., None] + growth)
        offsets = residuals.mean(axis=2)
        rss = ((residuals - offsets[..., None]) ** 2).sum(axis=2)
        best = rss.argmin(axis=1)
        centre = candidates[rows, best]
        step /= 3
        candidates = np.maximum(centre[:, None] + step * np.arange(-3, 4), _FLOORS[0])
    return rss[rows, best], floors[rows, best], offsets[rows, best]


_Interpolator = Callable[..., Callable[[np.ndarray], np.ndarray]]
_INTERPOLATORS: tuple[_Interpolator, ...] = (
    interpolate.PchipInterpolator,
    interpolate.CubicSpline,
)


@dataclass(frozen=True)
class Crossover:
    """The length from which the challenger stays below the incumbent, with a 95 % interval.

    ``estimate``, ``low`` and ``high`` are 0 where that is below the shortest length measured, and
    infinite where it is beyond the longest. ``brief`` says the estimate in words, ``text`` the
    interval as well.
    """

    estimate: float
    low: float
    high: float
    brief: str
    text: str


def overtaken(speedups: Mapping[int, tuple[float, float]], *, of: str = "N") -> Crossover | None:
    """Where speed-ups by length, as log and standard error, pass 1 for good.

    None without any, or where an error is not known.
    """
    if not speedups or not np.isfinite(list(speedups.values())).all():
        return None
    logs, errors = np.array(list(speedups.values())).T
    return crossover(list(speedups), np.exp(logs), np.ones(len(logs)), errors, of=of)


def crossover(
    lengths: ArrayLike,
    incumbent: ArrayLike,
    challenger: ArrayLike,
    relative_error: ArrayLike,
    *,
    draws: int = 4000,
    seed: int = 0,
    of: str = "N",
) -> Crossover:
    """Where the ratio of two measured curves passes 1 for good.

    The log of the ratio is interpolated between measured lengths (monotone cubics in log N); the
    interval comes from redrawing it with the given error. Since what lies between two lengths is
    not known either, the draws are interpolated by splines, too, and the interval covers those of
    both. Nothing is extrapolated.

    Args:
        lengths: where both were measured.
        incumbent: seconds of the curve to beat.
        challenger: seconds of the other.
        relative_error: standard error of the ratio, one or one per length.
        of: what a length is called.
    """
    n = np.asarray(lengths, float)
    order = np.argsort(n)
    x = np.log(n[order])
    d = (np.log(np.asarray(incumbent, float)) - np.log(np.asarray(challenger, float)))[order]
    error = np.broadcast_to(np.asarray(relative_error, float), d.shape)
    if len(n) < 2:
        why = "too few common lengths"
        return Crossover(float("nan"), float("nan"), float("nan"), why, why)
    noise = np.random.default_rng(seed).standard_normal((draws, len(n)))
    estimate = float(_crossings(x, d[None], _INTERPOLATORS[0])[0])
    drawn = [np.sort(_crossings(x, d + noise * error, between)) for between in _INTERPOLATORS]
    low = float(min(crossings[int(0.025 * (draws - 1))] for crossings in drawn))
    high = float(max(crossings[int(np.ceil(0.975 * (draws - 1)))] for crossings in drawn))
    shortest, longest = f"{np.exp(x[0]):.0f}", f"{np.exp(x[-1]):.0f}"
    least, most = (_length(value, shortest, longest) for value in (low, high))
    if low == 0 and high == np.inf:
        brief, more = "not to be told", f": {least} to {most}"
    elif estimate == 0:
        brief, more = f"below {of} = {shortest}", ", the shortest measured"
        more += f" (or up to {most})" if high > 0 else ""
    elif estimate == np.inf:
        brief, more = (
            f"none up to {of} = {longest}",
            f" (or from {least} on)" if low < np.inf else "",
        )
    else:
        brief, more = f"{of} ≈ {_length(estimate, shortest, longest)}", f" ({least} to {most})"
    return Crossover(estimate, low, high, brief, brief + more)


def _crossings(x: np.ndarray, d: np.ndarray, between: _Interpolator) -> np.ndarray:
    """Per row, the last zero crossing of the log ratio: 0 if all is above, inf if it ends below."""
    # Between lengths a factor of two apart the ratio is curved: straight lines would be biased.
    fine = np.unique(np.concatenate([np.linspace(a, b, 17) for a, b in pairwise(x)]))
    x, d = fine, between(x, d, axis=1)(fine)
    below = d < 0
    last = np.where(below.any(axis=1), d.shape[1] - 1 - below[:, ::-1].argmax(axis=1), -1)
    left = np.clip(last, 0, d.shape[1] - 2)
    rows = np.arange(len(d))
    rise = d[rows, left + 1] - d[rows, left]
    crosses = (d[rows, left] < 0) & (d[rows, left + 1] >= 0)
    share = np.divide(-d[rows, left], rise, out=np.zeros_like(rise), where=crosses)
    found = np.exp(x[left] + share * (x[left + 1] - x[left]))
    found = np.where(last == -1, 0.0, found)
    return np.where(last == d.shape[1] - 1, np.inf, found)


def _length(value: float, shortest: str, longest: str) -> str:
    if value == 0:
        return f"under {shortest}"
    if value == np.inf:
        return f"over {longest}"
    return f"{value:.3g}" if value < 1000 else f"{round(value, 2 - len(str(int(value)))):,.0f}"
