"""The ratio of two backends that took turns: of known times, and where medians mislead."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.reports.compare import speedups
from linear_vit.reports.saved.runs import load
from linear_vit.reports.statistics import turns
from tests.reports import saved, synthetic

DRAWS = 400


def row(seconds: Any, of: str | None = "one") -> dict[str, Any]:
    return {"seconds": np.asarray(seconds, float), "turns": of}


def test_ratio_of_known_times() -> None:
    """By hand: of ratios 2, 2, 4, 2, 1 the median is 2; the machine's speed is not in it."""
    machine = np.array([1.0, 1.0, 5.0, 5.0, 5.0])
    found = turns.ratio(row(machine * [2, 2, 4, 2, 1]), row([*machine, 9.0, 9.0]))
    assert found is not None
    assert found.log == pytest.approx(math.log(2))
    assert found.error == 0  # both quartiles are 2, too
    assert found.independent_rounds == 5


@pytest.mark.parametrize(
    ("own", "base"),
    [
        (row([1.0] * 9, None), row([1.0] * 9, None)),
        (row([1.0] * 9, "one"), row([1.0] * 9, "other")),
        (row([1.0] * 4), row([1.0] * 9)),
    ],
    ids=["it is not said", "other turns", "too few"],
)
def test_none_where_there_were_no_turns(own: dict[str, Any], base: dict[str, Any]) -> None:
    assert turns.ratio(own, base) is None


@pytest.mark.parametrize("speeds", [1.0, 1.6], ids=["one speed", "two speeds"])
def test_interval_covers_the_ratio(speeds: float) -> None:
    """However the machine's speed changes, and where it makes medians useless."""
    rng, n = np.random.default_rng(0), 60
    covered, off = 0, []
    for _ in range(DRAWS):
        slow = (np.cumsum(rng.random(n) < 1 / 15) + rng.integers(2)) % 2
        one, other = np.exp(0.02 * rng.standard_normal((2, n)) + np.log(speeds) * slow)
        other = other[: rng.integers(20, n + 1)]
        found = turns.ratio(row(1.25 * one), row(other))
        assert found is not None
        covered += abs(found.log - math.log(1.25)) <= 1.96 * found.error
        off.append(abs(math.log(np.median(one) / np.median(other))))
    assert DRAWS - covered <= 0.05 * DRAWS + 3 * (0.05 * 0.95 * DRAWS) ** 0.5
    assert (np.mean(np.array(off) > 0.1) > 0.1) == (speeds > 1)


def test_a_speed_up_is_of_turns(tmp_path: Path) -> None:
    """Half and twice, on a machine of two speeds; the ratios of medians are not."""
    rng = np.random.default_rng(3)
    found = {}
    for said in (True, False):
        path = saved.save(tmp_path / f"{said}.json", synthetic.run(rng, "speeds", turns=said))
        cases = speedups(load([path]), "torch")
        truth = cases["backend"].map({"compiled": 2.0, "reference": 0.5})
        found[said] = np.abs(np.log(cases["speedup"] / truth))
        assert (cases["low"] < cases["speedup"]).all()
        assert (cases["speedup"] < cases["high"]).all()
    assert found[True].max() < 0.05
    assert found[False].max() > 0.2
