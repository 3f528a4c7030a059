"""Exponents and crossovers on timings whose truth is known."""

import numpy as np
import pytest
from scipy.optimize import brentq

from reports.fits import crossover, fit_scaling

LENGTHS = 2.0 ** np.arange(6, 17)
DRAWS = 40


@pytest.mark.parametrize("floor", [0.0, 2e-5, 2e-4], ids=["none", "small", "large"])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_exponent_is_in_its_interval(exponent: float, floor: float) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(DRAWS):
        noise = np.exp(0.05 * rng.standard_normal(len(LENGTHS)))
        fit = fit_scaling(LENGTHS, (floor + 1e-8 * LENGTHS**exponent) * noise)
        covered += fit.reason is None and fit.low <= exponent <= fit.high
    # 95 % of draws in the long run; a fixed seed keeps 40 draws from failing by chance.
    assert covered >= 0.85 * DRAWS


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


@pytest.mark.parametrize("noise", [0.02, 0.06])
def test_crossover_interval_covers_the_truth(noise: float) -> None:
    lengths = 2.0 ** np.arange(6, 14)

    def softmax(n):
        return 1e-5 + 1e-9 * n**2

    def linear(n):
        return 4e-5 + 1e-7 * n

    truth = brentq(lambda n: softmax(n) - linear(n), 64, 8192)
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(DRAWS):
        a, b = np.exp(noise * rng.standard_normal((2, len(lengths))))
        answer = crossover(
            lengths, softmax(lengths) * a, linear(lengths) * b, noise * 2**0.5, seed=seed
        )
        assert answer.low <= answer.estimate <= answer.high
        covered += answer.low <= truth <= answer.high
    assert covered >= 0.85 * DRAWS


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
