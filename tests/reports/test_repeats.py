"""Several processes a side: their luck is told from a change, as often as is said."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from linear_vit.reports.__main__ import main
from linear_vit.reports.changes import FASTER, SLOWER, Changes, changes
from linear_vit.reports.saved.runs import load
from linear_vit.reports.statistics import repeats
from tests.reports import saved, synthetic

DRAWS = 400
LUCK = 0.02


def most(share: float, draws: int) -> float:
    """A share of draws in the long run, and two standard deviations for there being so few."""
    return share * draws + 2 * (share * (1 - share) * draws) ** 0.5


def called(
    runs: int, change: float, apart: float, backends: int, cases: int = 6
) -> tuple[int, int]:
    """Draws in which one backend's change is called, and in which any other's is.

    Of backends whose luck differs by a factor of exp(apart), and is alike in all cases of each.
    """
    rng = np.random.default_rng(0)
    seen = alarms = 0
    for _ in range(DRAWS):
        size = LUCK * np.exp(apart * rng.standard_normal((backends, 1, 1)))
        luck = size * rng.standard_normal((2, backends, 1, runs))
        before, after = (luck + 0.002 * rng.standard_normal((2, backends, cases, runs))).reshape(
            2, backends * cases, runs
        )
        after[:cases] += np.log1p(change)
        found = repeats.estimates(before, after, np.zeros(len(before)), backends)
        half = stats.t.isf(repeats.tail(len(before)), found.freedom) * found.error
        seen += bool((found.change[:cases] > half[:cases]).all())
        alarms += bool((np.abs(found.change[cases:]) > half[cases:]).any())
    return seen, alarms


@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize("backends", [2, 5])
@pytest.mark.parametrize("runs", [2, 3, 6])
def test_luck_gives_no_alarm(runs: int, backends: int, apart: float) -> None:
    assert called(runs, 0.0, apart, backends)[1] <= most(0.05, DRAWS)


@pytest.mark.parametrize("change", [0.02, 0.05, 0.10])
def test_so_many_repeats_as_are_said_show_a_change(change: float) -> None:
    count = repeats.needed(LUCK, change)
    assert count is not None
    rng = np.random.default_rng(1)
    for runs, least, greatest in ((count, 0.85, 1.0), (max(2, count // 3), 0.0, 0.85)):
        before, after = LUCK * rng.standard_normal((2, DRAWS, 1, runs))
        seen = 0
        for one, other in zip(before, after + np.log1p(change), strict=True):
            found = repeats.estimates(one, other, np.zeros(1), 1)
            seen += bool(found.change > stats.t.isf(repeats.tail(1), found.freedom) * found.error)
        assert least <= seen / DRAWS <= greatest


def test_the_luck_is_measured_and_said() -> None:
    rng = np.random.default_rng(2)
    before, after = LUCK * rng.standard_normal((2, 50, 6))
    found = repeats.estimates(before, after, np.zeros(50), 50)
    assert found.luck == pytest.approx(LUCK, rel=0.1)
    assert repeats.advice(0.02, 10) == (
        "luck of a process: 2.0% (standard deviation); to be seen 9 times in 10, a change of 2% "
        "takes 40, 5% takes 9, 10% takes 5 runs a side"
    )
    assert "2% takes over 100" in repeats.advice(0.2)


def test_rounds_count_where_processes_agree_by_luck() -> None:
    alike = np.zeros((1, 3))
    found = repeats.estimates(alike, alike + 0.01, np.array([0.02**2]), 1)
    assert found.error[0] == pytest.approx(0.02)


def test_a_process_that_lacks_a_case_is_left_out() -> None:
    gap = np.array([[0.0, np.nan, 0.01], [0.0, np.nan, np.nan]])
    found = repeats.estimates(gap, gap[:, :1], np.zeros(2), 1)
    assert found.freedom.tolist() == [1, 0]
    assert found.change[0] == pytest.approx(-0.005)


# ---- on saved runs -------------------------------------------------------------------------------


def compared(folder: Path, seed: int, runs: int, factor: float) -> Changes:
    """So many runs a side of a machine whose processes are lucky, slower in all of one backend."""
    rng = np.random.default_rng(seed)
    slower = {f"linear_attention-forward-float32-N{n}-compiled": factor for n in synthetic.LENGTHS}
    sides = []
    for name, planted in (("before", {}), ("after", slower)):
        for number in range(runs):
            document = synthetic.run(rng, "luck", planted)
            saved.save(folder / name / f"{number}.json", document)
        sides.append(load([folder / name], every=True))
    return changes(*sides)


def test_what_one_pair_calls_a_change_is_luck(tmp_path: Path) -> None:
    """Processes differ by 3 % in all lengths of a backend: a pair raises alarms, four runs none."""
    draws, alarms = 12, {1: 0, 4: 0}
    for runs in alarms:
        for seed in range(draws):
            found = compared(tmp_path / f"{runs}-{seed}", seed, runs, 1.0)
            alarms[runs] += bool(found.verdicts & {SLOWER, FASTER})
    assert alarms[4] <= most(0.05, draws)
    assert alarms[1] > alarms[4] + 2


def test_a_change_is_seen_through_the_luck(tmp_path: Path) -> None:
    draws, seen = 10, 0
    for seed in range(draws):
        found = compared(tmp_path / str(seed), seed, 5, 1.2)
        seen += found.pools.set_index("backend")["verdict"]["compiled"] == SLOWER
        assert "runs a side" in found.luck
        assert found.scatter is None
    assert seen >= 0.8 * draws


def test_command(tmp_path: Path, capsys) -> None:
    compared(tmp_path, 0, 4, 1.3)
    files = {name: sorted(map(str, (tmp_path / name).iterdir())) for name in ("before", "after")}
    command = ["compare", *files["before"], "--with", *files["after"], "--fail-on", "slower"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "luck of a process: " in said
    assert "slower     linear_attention forward float32 compiled" in said
    # How large the luck is, before anything has changed.
    assert main(["compare", *files["before"]]) == 0
    said_before = capsys.readouterr().out
    assert said_before.startswith("luck of a process: ")
    assert said_before.count("\n") == 1
    # As folders, too; one run a side says what it can't tell.
    assert main(["compare", str(tmp_path / "before"), "--with", str(tmp_path / "after")]) == 0
    assert capsys.readouterr().out == said
    assert main(["compare", files["before"][0], files["after"][0]]) == 0
    assert "one run a side does not show the luck of a process" in capsys.readouterr().out


def test_cases_of_one_run_a_side_are_left_out_where_others_have_several(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        document = synthetic.run(rng, "independent")
        if number:
            document["benchmarks"] = [
                case for case in document["benchmarks"] if case["extra_info"]["N"] != 512
            ]
        saved.save(tmp_path / f"{number}.json", document)
    whole = load([tmp_path], every=True)
    first = load([tmp_path / "0.json"], every=True)
    found = changes(first, whole)
    assert "2 cases left out: of one run a side, where others are of several" in found.notes
    assert 512 not in set(found.cases["N"])
    assert len(found.cases) == 2 * (len(synthetic.LENGTHS) - 1)
