"""All lengths of a backend in one verdict: right as often as it says, with a machine's noise."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from linear_vit.reports.__main__ import main
from linear_vit.reports.changes import FASTER, SAME, SLOWER, changes
from linear_vit.reports.saved.runs import load
from linear_vit.reports.statistics.pools import mean_change
from tests.reports import saved, synthetic

DRAWS = 40
CHANGED = "compiled"


def whole(factor: float) -> dict[str, float]:
    """Every length of one backend takes so many times the time."""
    return {f"linear_attention-forward-float32-N{n}-{CHANGED}": factor for n in synthetic.LENGTHS}


def compared(folder: Path, seed: int, noise: str, factor: float = 1.0, **options):
    rng = np.random.default_rng(seed)
    documents = (synthetic.run(rng, noise), synthetic.run(rng, noise, whole(factor)))
    paths = [
        saved.save(folder / f"{name}.json", document)
        for name, document in zip(("before", "after"), documents, strict=True)
    ]
    return changes(load(paths[:1]), load(paths[1:]), **options)


def most(share: float, draws: int) -> float:
    """A share of draws in the long run, and two standard deviations for there being so few."""
    return share * draws + 2 * (share * (1 - share) * draws) ** 0.5


@pytest.mark.parametrize("lengths", [3, 6, 12])
@pytest.mark.parametrize("apart", [0.0, 0.01, 0.04], ids=["alike", "by 1 %", "by 4 %"])
def test_the_interval_covers_the_change(lengths: int, apart: float) -> None:
    """However much lengths differ from each other, and where some are known better than others."""
    rng = np.random.default_rng(lengths)
    draws, covered = 1000, 0
    for _ in range(draws):
        errors = 0.01 * np.exp(0.7 * rng.standard_normal(lengths))
        x = 0.1 + np.hypot(errors, apart) * rng.standard_normal(lengths)
        change, error, freedom = mean_change(x, errors**2)
        covered += abs(change - 0.1) <= stats.t.isf(0.025, freedom) * error
    assert draws - covered <= most(0.05, draws)


def test_equal_estimates_are_as_uncertain_as_they_were() -> None:
    """That five lengths agree by luck makes none of them better known."""
    change, error, freedom = mean_change(np.full(5, 0.1), np.full(5, 0.02**2))
    assert (change, freedom) == (pytest.approx(0.1), 4)
    assert error == pytest.approx(0.02 / 5**0.5)


@pytest.mark.parametrize("noise", ["process", "machine"])
def test_10_percent_is_called(tmp_path: Path, noise: str) -> None:
    """Of one backend, and of that alone. (That the same code gives no alarm: test_changes.)"""
    called = 0
    for seed in range(DRAWS):
        verdicts = compared(tmp_path, seed, noise, 1.1).pools.set_index("backend")["verdict"]
        called += verdicts[CHANGED] == SLOWER
        assert verdicts["reference"] != SLOWER
    assert called >= 0.9 * DRAWS


def test_a_pool_is_what_its_cases_say_against_the_control(tmp_path: Path) -> None:
    """By hand, from medians that are exact: all lengths 20 % slower, less the control's 5 %."""
    before, after = saved.run(), saved.run()
    for document in (before, after):
        for case in document["benchmarks"]:
            case["stats"]["rounds"] = 10_000
    for case in after["benchmarks"]:
        factor = {"torch": 1.05, "compiled": 1.2}.get(case["extra_info"]["backend"], 1.0)
        saved.slow_down(case, factor)
    paths = [saved.save(tmp_path / f"{i}.json", run) for i, run in enumerate((before, after))]
    loaded = load(paths[:1]), load(paths[1:])
    found = changes(*loaded)
    assert len(found.pools) == 3 * 2 * 2  # operations, passes, and the backends but the control
    assert set(found.pools["cases"]) == {7}
    for row in found.pools.to_dict("records"):
        truth = {"compiled": 1.2 / 1.05, "reference": 1 / 1.05}[row["backend"]]
        assert row["ratio"] == pytest.approx(truth)
        assert row["low"] < truth < row["high"]
        assert row["verdict"] == {"compiled": SLOWER, "reference": FASTER}[row["backend"]]
    bare = changes(*loaded, control=None).pools.groupby("backend")
    assert bare["ratio"].mean().to_dict() == pytest.approx(
        {"compiled": 1.2, "reference": 1.0, "torch": 1.05}
    )
    assert set(bare.get_group("reference")["verdict"]) == {SAME}


def test_what_has_no_control_at_its_place_is_not_pooled(tmp_path: Path) -> None:
    after = saved.run()
    lacking = [
        case
        for case in after["benchmarks"]
        if case["extra_info"]["backend"] == "torch"
        and case["extra_info"]["operation"] == "ripple_pool"
        and case["extra_info"]["N"] > 128
    ]
    for case in lacking:
        after["benchmarks"].remove(case)
    paths = [saved.save(tmp_path / f"{i}.json", run) for i, run in enumerate((saved.run(), after))]
    found = changes(load(paths[:1]), load(paths[1:]))
    assert set(found.pools["operation"]) == {"linear_attention", "softmax_attention"}


def test_a_pool_fails_a_gate_that_no_case_does(tmp_path: Path, capsys) -> None:
    found = compared(tmp_path, 0, "machine", 1.1)
    assert SLOWER not in set(found.cases["verdict"])
    paths = [str(tmp_path / f"{name}.json") for name in ("before", "after")]
    assert main(["compare", *paths, "--fail-on", "slower"]) == 1
    said = capsys.readouterr().out
    assert "6 cases together" in said.splitlines()[0]
    assert "all lengths together: 1 slower, 0 faster" in said
    assert "cases: 0 slower" in said
    assert main(["compare", *paths, "--fail-on", "faster"]) == 0
