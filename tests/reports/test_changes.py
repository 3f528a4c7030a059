"""Two runs against each other: true changes are called, and noise is not."""

import json
from pathlib import Path

import numpy as np
import pytest

from linear_vit.reports.__main__ import main
from linear_vit.reports.changes import FASTER, MISSING, SAME, SLOWER, UNDECIDED, changes, render
from linear_vit.reports.saved.runs import NoRuns, load, measured
from tests.reports import saved, synthetic

HIT = "linear_attention-forward-float32-N512-compiled"
DRAWS = 24


def pair(folder: Path, before: dict, after: dict) -> tuple[Path, Path]:
    return saved.save(folder / "before.json", before), saved.save(folder / "after.json", after)


@pytest.mark.parametrize(
    ("noise", "turns"),
    [
        pytest.param(noise, True, marks=() if noise == "process" else pytest.mark.slow)
        for noise in synthetic.NOISES
    ]
    + [("independent", False), pytest.param("machine", False, marks=pytest.mark.slow)],
)
def test_two_draws_of_the_same_give_no_alarm(tmp_path: Path, noise: str, turns: bool) -> None:
    """No case and no pool of a comparison is called changed, in 95 % of comparisons."""
    alarms = 0
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        runs = [synthetic.run(rng, noise, turns=turns) for _ in range(2)]
        before, after = (load([path]) for path in pair(tmp_path, *runs))
        alarms += bool(changes(before, after).verdicts & {SLOWER, FASTER})
    # 5 % of draws in the long run, and two standard deviations for there being so few.
    assert alarms <= 0.05 * DRAWS + 2 * (0.05 * 0.95 * DRAWS) ** 0.5


@pytest.mark.parametrize(("noise", "least"), [("independent", 0.95), ("spikes", 0.95)])
@pytest.mark.parametrize(("factor", "verdict"), [(1.05, SLOWER), (1 / 1.05, FASTER)])
def test_a_true_change_of_5_percent_is_called(
    tmp_path: Path, noise: str, least: float, factor: float, verdict: str
) -> None:
    called = 0
    for seed in range(DRAWS // 2):
        rng = np.random.default_rng(seed)
        runs = (synthetic.run(rng, noise), synthetic.run(rng, noise, {HIT: factor}))
        before, after = (load([path]) for path in pair(tmp_path, *runs))
        cases = changes(before, after).cases
        row = cases[(cases["backend"] == "compiled") & (cases["N"] == 512)].iloc[0]
        called += row["verdict"] == verdict
    assert called >= least * DRAWS / 2


def test_a_change_of_10_percent_is_called_on_a_drifting_machine(tmp_path: Path) -> None:
    """The drift is larger than what is to be seen, and differs from length to length."""
    called = 0
    for seed in range(DRAWS // 2):
        rng = np.random.default_rng(seed)
        runs = (synthetic.run(rng, "drift"), synthetic.run(rng, "drift", {HIT: 1.1}))
        before, after = (load([path]) for path in pair(tmp_path, *runs))
        cases = changes(before, after).cases
        row = cases[(cases["backend"] == "compiled") & (cases["N"] == 512)].iloc[0]
        called += row["verdict"] == SLOWER
    assert called >= 0.9 * DRAWS / 2


def test_a_planted_10_percent_is_seen_on_a_machine_of_several_speeds(tmp_path: Path) -> None:
    """Three times as often as by medians, of which one may be of each speed."""
    called = {True: 0, False: 0}
    for turns in called:
        for seed in range(DRAWS // 2):
            rng = np.random.default_rng(seed)
            changed = {
                f"linear_attention-forward-float32-N{n}-compiled": 1.1 for n in synthetic.LENGTHS
            }
            runs = (
                synthetic.run(rng, "speeds", turns=turns),
                synthetic.run(rng, "speeds", changed, turns=turns),
            )
            before, after = (load([path]) for path in pair(tmp_path, *runs))
            pools = changes(before, after).pools.set_index("backend")["verdict"]
            called[turns] += pools["compiled"] == SLOWER
    assert called[True] >= 0.9 * DRAWS / 2
    assert called[False] <= called[True] / 3


def test_drift_of_the_machine_is_told_from_a_change_only_by_a_control(tmp_path: Path) -> None:
    """All of the second run is 20 % slower: with a control nothing changed, without one all did."""
    slower = {
        f"linear_attention-forward-float32-N{n}-{b}": 1.2
        for n in synthetic.LENGTHS
        for b in synthetic.BACKENDS
    }
    rng = np.random.default_rng(1)
    runs = (synthetic.run(rng, "independent"), synthetic.run(rng, "independent", slower))
    before, after = (load([path]) for path in pair(tmp_path, *runs))
    found = changes(before, after)
    assert found.drift == pytest.approx(1.2, rel=0.02)
    assert not found.cases["verdict"].isin([SLOWER, FASTER]).any()
    bare = changes(before, after, control=None)
    assert set(bare.cases["verdict"]) == {SLOWER}
    assert len(bare.cases) == len(found.cases) + len(synthetic.LENGTHS)  # the control is a case


def test_few_rounds_decide_nothing(tmp_path: Path) -> None:
    """Three rounds whose quartiles happen to be close together are no proof of 10 %."""
    before, after = saved.run(), saved.run()
    for document, factor in ((before, 1.0), (after, 1.1)):
        for case in document["benchmarks"]:
            case["stats"]["rounds"] = 3
            if case["param"].endswith("compiled"):
                saved.slow_down(case, factor)
    loaded = [load([path]) for path in pair(tmp_path, before, after)]
    found = changes(*loaded)
    cases = found.cases
    assert set(cases[cases["backend"] == "compiled"]["verdict"]) == {UNDECIDED}
    found.cases.loc[0, ["low", "high"]] = 0.0, 1e100
    assert "(under 0.001 to over 1,000)" in render(found)


def test_a_change_below_the_margin_is_none(tmp_path: Path) -> None:
    before, after = saved.run(), saved.run()
    for document in (before, after):
        for case in document["benchmarks"]:
            case["stats"]["rounds"] = 10_000
    for case in after["benchmarks"]:
        if case["param"].endswith("compiled"):
            saved.slow_down(case, 1.01)
    loaded = [load([path]) for path in pair(tmp_path, before, after)]
    assert set(changes(*loaded).cases["verdict"]) == {SAME}
    fine = changes(*loaded, margin=0.001).cases
    assert set(fine[fine["backend"] == "compiled"]["verdict"]) == {SLOWER}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cpu", "Another CPU", "CPU: Test CPU <3 GHz> against Another CPU"),
        ("threads", 1, "threads: 2 against 1"),
        ("torch", "3.0", "PyTorch: 2.99 against 3.0"),
    ],
)
def test_other_environments_are_not_compared_unasked(
    tmp_path: Path, capsys, key: str, value: object, words: str
) -> None:
    after = saved.run()
    after["kernel_suite"]["machine"] = saved.MACHINE | {key: value}
    one, other = map(str, pair(tmp_path, saved.run(), after))
    assert main(["compare", one, other]) == 2
    assert words in capsys.readouterr().err
    assert main(["compare", one, other, "--anyway"]) == 0
    said = capsys.readouterr().out
    assert words in said
    assert "no backend is a control" in said


def test_what_is_not_the_same_thing_is_left_out(tmp_path: Path) -> None:
    after = saved.run()
    clock, shape, gone = (
        next(case for case in after["benchmarks"] if case["param"].startswith(name))
        for name in (
            "linear_attention-forward-float32-N64-compiled",
            "linear_attention-forward-float32-N128-compiled",
            "linear_attention-forward-float32-N256-compiled",
        )
    )
    clock["extra_info"]["clock"] = "another"
    shape["extra_info"]["least_bytes"] += 1
    after["benchmarks"].remove(gone)
    step = next(c for c in after["benchmarks"] if c["extra_info"]["operation"] == "training_step")
    step["extra_info"]["settings"]["heads"] = 99
    loaded = [load([path]) for path in pair(tmp_path, saved.run(), after)]
    found = changes(*loaded)
    words = "; ".join(found.notes)
    assert "1 case left out: timed by different clocks" in words
    assert "1 case left out: of different shapes" in words
    assert "1 case left out: of different settings" in words
    assert "1 case only in the earlier run" in words
    lost = found.cases["verdict"] == MISSING
    assert found.cases["case"][lost].tolist() == [
        "linear_attention forward float32 N = 256 compiled"
    ]
    assert (~lost).sum() == 3 * 2 * 2 * 7 - 3 + 1


def test_command_gates(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    runs = (synthetic.run(rng, "independent"), synthetic.run(rng, "independent", {HIT: 1.3}))
    one, other = map(str, pair(tmp_path, *runs))
    assert main(["compare", one, other, "--fail-on", "slower"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("slower ")
    assert "1 slower, 0 faster" in said
    assert main(["compare", one, one, "--fail-on", "slower", "--fail-on", "faster"]) == 0
    assert main(["compare", one, other, "--control", "cudnn"]) == 2
    assert "control 'cudnn'; there are ['compiled'" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "BEFORE and AFTER" in capsys.readouterr().err


def test_a_backend_that_vanished_passes_no_gate(tmp_path: Path, capsys) -> None:
    after = saved.run()
    kept = [b for b in after["benchmarks"] if b["extra_info"]["backend"] != "compiled"]
    one, other = map(str, pair(tmp_path, saved.run(), after | {"benchmarks": kept}))
    assert main(["compare", one, other, "--fail-on", "faster"]) == 0
    said = capsys.readouterr().out
    assert "missing    compiled: 42 cases, as linear_attention forward float32 N = 64 com" in said
    assert "cases: 42 missing, 0 slower" in said
    for gate in ("missing", "slower"):
        assert main(["compare", one, other, "--fail-on", gate]) == 1
        # Not where nothing is asked of it, nor where the later run has more.
        assert main(["compare", one, other, "--fail-on", gate, "--backends", "reference"]) == 0
        assert main(["compare", other, one, "--fail-on", gate]) == 0
        assert main(["compare", one, other, "--fail-on", gate, "--backends", "compiled"]) == 1


def test_one_run_is_held_against_the_repositorys(tmp_path: Path, capsys) -> None:
    (old,) = measured()
    copy = saved.save(tmp_path / "mine.json", json.loads(old.read_text()))
    assert main(["compare", str(copy), "--fail-on", "slower"]) == 0
    assert " same" in capsys.readouterr().out
    foreign = saved.save(tmp_path / "foreign.json", saved.run())
    assert main(["compare", str(foreign)]) == 2
    assert "may not be compared" in capsys.readouterr().err


def test_runs_without_a_common_case_say_so(tmp_path: Path) -> None:
    after = saved.run()
    for case in after["benchmarks"]:
        case["extra_info"]["dtype"] = "bfloat16"
    loaded = [load([path]) for path in pair(tmp_path, saved.run(), after)]
    with pytest.raises(NoRuns, match="no case in common"):
        changes(*loaded)
