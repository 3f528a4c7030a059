"""Cases that something disturbed: drawn hollow, named, and in no fit, mean or verdict."""

from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports import groups, plots
from linear_vit.reports.__main__ import main
from linear_vit.reports.changes import changes
from linear_vit.reports.compare import speedups, summarise
from linear_vit.reports.saved.runs import NoRuns, load
from linear_vit.reports.targets import CPU, GPU, verdicts
from tests.reports import saved
from tests.reports.test_targets import gpu_run, turn_by_turn

WHY = "threads waited 12 % of the time"


def disturb(document: dict[str, Any], *names: str, factor: float = 50.0) -> dict[str, Any]:
    """Cases whose names have this in them take much longer, for that reason."""
    for case in document["benchmarks"]:
        if not names or any(name in case["name"] for name in names):
            saved.slow_down(case, factor)
            case["extra_info"]["disturbed"] = WHY
    return document


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = disturb(saved.run(), "linear_attention-forward-float32-N512-compiled")
    return saved.save(tmp_path / "run.json", made)


def test_fits_and_crossovers_are_without_it(run: Path) -> None:
    (group, _) = groups.groups(load([run]))
    fit = group.fits["linear_attention", "forward", "compiled"]
    assert (fit.lengths, fit.exponent) == (6, pytest.approx(1, abs=0.02))
    crossings = {(mode, b): c.estimate for _, mode, b, c in groups.crossovers([group])}
    assert crossings["forward", "compiled"] == pytest.approx(200, rel=0.03)


def test_means_are_without_it_and_the_case_says_why(run: Path, capsys) -> None:
    rows = summarise(speedups(load([run]), "torch", ["compiled"])).to_dict("records")
    row = next(r for r in rows if (r["operation"], r["pass"]) == ("linear_attention", "forward"))
    assert (row["lengths"], row["geometric_mean"]) == (6, pytest.approx(2))
    assert main(["compare", "--baseline", "torch", str(run)]) == 0
    shown = capsys.readouterr()
    (line,) = [line for line in shown.out.splitlines() if "disturbed" in line]
    assert line.startswith("  N =       512")
    assert line.endswith(f", disturbed: {WHY}")
    assert f"{run}: 1 case disturbed ({WHY}), as test_kernel[linear_attention-f" in shown.err


def test_a_ratio_to_a_disturbed_case_is_disturbed(tmp_path: Path) -> None:
    made = disturb(saved.run(), "linear_attention-forward-float32-N512-torch")
    cases = speedups(load([saved.save(tmp_path / "run.json", made)]), "torch")
    lost = cases[cases["disturbed"].notna()]
    assert sorted(lost["backend"]) == ["compiled", "reference"]
    assert set(lost["N"]) == {512}


def test_verdicts_are_without_it(tmp_path: Path, run: Path) -> None:
    before = load([saved.save(tmp_path / "before.json", saved.run())])
    for one, other in ((before, load([run])), (load([run]), before)):
        found = changes(one, other)
        assert "1 disturbed case left out, as linear_attention forward float32 N = 512 " in (
            " ".join(found.notes)
        )
        assert found.verdicts <= {"same", "undecided"}  # and it is not missing
    made = turn_by_turn()
    made["benchmarks"][0]["extra_info"]["disturbed"] = WHY
    found = verdicts(load([saved.save(tmp_path / "cpu.json", made)]), CPU)
    assert found[0].found == ("mean 6.00×, worst 6.00×", True)


def test_disturbed_limits_are_no_limits(tmp_path: Path) -> None:
    for why in (None, WHY):
        made = gpu_run()
        made["kernel_suite"]["limits"]["disturbed"] = why
        loaded = load([saved.save(tmp_path / "gpu.json", made)])
        holds = [verdict.holds for verdict in verdicts(loaded, GPU)]
        assert holds[1:4] == [None if why else True] * 3
        assert holds[4:] == [True] * 4
        lines = [f"{tmp_path / 'gpu.json'}: the machine's limits ({WHY})"]
        assert loaded.disturbed() == (lines if why else [])


def test_a_newer_measurement_that_was_disturbed_replaces_none(tmp_path: Path) -> None:
    saved.save(tmp_path / "old.json", saved.run("2030-01-01T00:00:00+00:00"))
    newer = disturb(saved.run("2030-06-01T00:00:00+00:00"), "N512-compiled")
    saved.save(tmp_path / "newer.json", newer)
    loaded = load([tmp_path])
    assert loaded.disturbed() == []
    (case,) = loaded.kernels.query(
        "backend == 'compiled' and N == 512 and operation == 'ripple_pool' and `pass` == 'forward'"
    ).to_dict("records")
    assert case["file"].endswith("old.json")


def test_it_is_drawn_hollow_and_off_the_line(run: Path) -> None:
    (group, _) = groups.groups(load([run]))
    picture, frame = groups.pictures(group)[0]
    figure = plots.draw(group, picture, frame, ["forward"])
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    hollow = [line for line in curves if line.get_linewidth() == 0]
    assert [list(line.get_xdata()) for line in hollow] == [[512]]
    assert hollow[0].get_markerfacecolor() == "none"
    assert sorted(len(line.get_xdata()) for line in curves) == [1, 6, *[7] * 5]
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels[-1] == "hollow, off the line: disturbed"


def test_a_run_of_nothing_else_ends_with_a_message(tmp_path: Path, capsys) -> None:
    path = str(saved.save(tmp_path / "run.json", disturb(saved.run())))
    good = str(saved.save(tmp_path / "good.json", saved.run()))
    assert main(["compare", "--baseline", "torch", path]) == 2
    assert f"every case was disturbed ({WHY})" in capsys.readouterr().err
    assert main(["compare", good, path]) == 2
    assert "have no case in common" in capsys.readouterr().err
    assert main(["targets", path]) == 2
    with pytest.raises(NoRuns, match="none of the targets"):
        verdicts(load([Path(path)]), CPU)
    assert main(["scaling", path, "--out", str(tmp_path), "--ops", "ripple-pool"]) == 0
    assert "time ~" not in capsys.readouterr().out
