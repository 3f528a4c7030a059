"""Exponents and crossovers on timings whose truth is known."""

import numpy as np
import pytest
from scipy.optimize import brentq

from linear_vit.reports.statistics.fits import crossover, fit_scaling

LENGTHS = 2.0 ** np.arange(6, 17)
DRAWS = 300


def is_nominal(covered: int, draws: int) -> bool:
    """Between 90 and 99 % of draws, of intervals that say 95 %: 300 draws tell no more."""
    return 0.9 * draws <= covered <= 0.99 * draws


@pytest.mark.parametrize(
    ("lengths", "exponent", "floor", "noise"),
    [
        (LENGTHS, 1.0, 0.0, 0.05),
        (LENGTHS, 1.0, 2e-5, 0.05),
        (LENGTHS, 1.0, 2e-5, 0.002),
        (LENGTHS, 1.5, 2e-4, 0.02),
        (LENGTHS[:8], 2.0, 2e-5, 0.03),
        (LENGTHS[3:8], 1.0, 0.0, 0.02),
    ],
    ids=["no floor", "floor", "hardly any noise", "N^1.5 above a large floor", "N²", "5 lengths"],
)
def test_exponent_is_in_its_interval(
    lengths: np.ndarray, exponent: float, floor: float, noise: float
) -> None:
    """As often as stated, and as often as a fit is made at all."""
    rng = np.random.default_rng(7)
    truth = floor + 1e-8 * lengths**exponent
    fits = [
        fit_scaling(lengths, truth * np.exp(noise * rng.standard_normal(len(lengths))))
        for _ in range(DRAWS)
    ]
    made = [fit for fit in fits if fit.reason is None]
    assert len(made) >= 0.9 * DRAWS
    assert is_nominal(sum(fit.low <= exponent <= fit.high for fit in made), len(made))


def test_exact_data_gives_the_exponent_floor_and_scale() -> None:
    fit = fit_scaling(LENGTHS, 3e-5 + 2e-8 * LENGTHS**1.5)
    assert fit.reason is None
    assert fit.exponent == pytest.approx(1.5, abs=0.02)
    assert fit.floor == pytest.approx(3e-5, rel=0.1)
    assert fit.scale * 65536**1.5 == pytest.approx(2e-8 * 65536**1.5, rel=0.1)
    assert fit.local_slope == pytest.approx(1.5, abs=0.02)


def test_order_of_the_lengths_does_not_matter() -> None:
    seconds = 1e-5 + 1e-8 * LENGTHS
    shuffled = np.random.default_rng(0).permutation(len(LENGTHS))
    assert fit_scaling(LENGTHS, seconds) == fit_scaling(LENGTHS[shuffled], seconds[shuffled])


@pytest.mark.parametrize(
    ("lengths", "seconds", "reason"),
    [
        (LENGTHS[:4], 1e-8 * LENGTHS[:4], "4 lengths"),
        (LENGTHS, 1e-3 + 1e-12 * LENGTHS, "constant|anywhere"),
        (LENGTHS, 1e-6 * 2.0 ** np.array([6, 9, 7, 11, 8, 12, 9, 15, 11, 16, 13]), "scatter|any"),
    ],
    ids=["too few", "launch floor", "scatter"],
)
def test_unsupported_fit_says_so(lengths, seconds, reason) -> None:
    fit = fit_scaling(lengths, seconds)
    assert fit.reason is not None
    assert any(part in fit.reason for part in reason.split("|"))
    assert str(fit).startswith("no fit: ")


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.06])
@pytest.mark.parametrize(
    ("lengths", "quadratic", "slope"),
    [
        (LENGTHS[:8], 1e-9, 1e-7),
        (LENGTHS[:8], 1e-9, 4.4e-7),
        (np.arange(256.0, 4097, 256), 1e-9, 5e-7),
    ],
    ids=["between lengths", "at a length", "lengths close together"],
)
def test_crossover_is_in_its_interval(
    lengths: np.ndarray, quadratic: float, slope: float, noise: float
) -> None:
    def softmax(n):
        return 1e-5 + quadratic * n**2

    def linear(n):
        return 4e-5 + slope * n

    truth = brentq(lambda n: softmax(n) - linear(n), lengths[0], lengths[-1])
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(DRAWS):
        a, b = np.exp(noise * rng.standard_normal((2, len(lengths))))
        times = softmax(lengths) * a, linear(lengths) * b
        answer = crossover(lengths, *times, noise * 2**0.5, draws=500, seed=seed)
        assert answer.low <= answer.estimate <= answer.high
        covered += answer.low <= truth <= answer.high
    assert is_nominal(covered, DRAWS)


def test_no_crossover_in_the_measured_range() -> None:
    lengths = np.array([64.0, 128, 256, 512])
    slow, fast = np.full(4, 2e-3), np.full(4, 1e-3)
    assert crossover(lengths, fast, slow, 0.02).text == "none up to N = 512"
    assert crossover(lengths, slow, fast, 0.02).text == "below N = 64, the shortest measured"


def test_an_unclear_crossover_is_an_open_interval() -> None:
    lengths = np.array([64.0, 128, 256, 512])
    softmax = np.array([1.0, 1.0, 1.0, 1.02])
    answer = crossover(lengths, softmax, np.ones(4), 0.1)
    assert answer.low == 0
    assert answer.high == np.inf
    assert "under 64 to over 512" in answer.text
    first = crossover(lengths, [1.01, 1.3, 2.0, 4.0], np.ones(4), 0.02)
    assert first.estimate == 0 < first.high < np.inf
    assert first.text.startswith("below N = 64, the shortest measured (or up to ")
    last = crossover(lengths, np.ones(4), [4.0, 2.0, 1.3, 1.01], 0.02)
    assert last.estimate == np.inf > last.low > 0
    assert last.text.startswith("none up to N = 512 (or from ")
