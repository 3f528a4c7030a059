"""Backends against one of them: known ratios in, the same ratios out."""

import csv
import json
import math
from pathlib import Path

import pytest

from linear_vit.reports.__main__ import main
from linear_vit.reports.compare import speedups, summarise
from linear_vit.reports.saved.runs import NoRuns, load
from tests.reports import saved


def test_speedups_are_the_ratios_of_one_run(tmp_path: Path) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    cases = speedups(load([run]), "torch")
    # By construction reference is half and compiled twice as fast as torch, at every length.
    for backend, truth in (("reference", 0.5), ("compiled", 2.0)):
        part = cases[cases["backend"] == backend]
        assert len(part) == 3 * 2 * 7
        assert part["speedup"].tolist() == pytest.approx([truth] * len(part))
        assert ((part["low"] < truth) & (truth < part["high"])).all()
    assert "torch" not in set(cases["backend"])


def test_interval_is_that_of_both_medians(tmp_path: Path) -> None:
    document = saved.run()
    run = saved.save(tmp_path / "run.json", document)
    (row,) = (
        speedups(load([run]), "torch", ["compiled"])
        .query("operation == 'ripple_pool' and N == 64 and `pass` == 'forward'")
        .to_dict("records")
    )
    # 9 rounds whose quartiles are 1 % either side.
    one = 1.2533 / 1.349 * 0.02 / math.sqrt(9)
    assert math.log(row["high"] / row["speedup"]) == pytest.approx(1.96 * one * math.sqrt(2))
    assert math.log(row["speedup"] / row["low"]) == pytest.approx(1.96 * one * math.sqrt(2))


def test_interval_is_the_bootstraps_where_the_run_has_it(tmp_path: Path) -> None:
    document = saved.run()
    for case in document["benchmarks"]:
        median = case["stats"]["median"]
        case["extra_info"]["median_interval_s"] = [0.97 * median, 1.03 * median]
    run = saved.save(tmp_path / "run.json", document)
    row = speedups(load([run]), "torch", ["compiled"]).iloc[0]
    assert math.log(row["high"] / row["speedup"]) == pytest.approx(0.03 * math.sqrt(2))


def test_mean_and_worst(tmp_path: Path) -> None:
    document = saved.run()
    for case in document["benchmarks"]:
        if case["param"] == "linear_attention-forward-float32-N64-compiled":
            case["stats"] = {key: value * 4 for key, value in case["stats"].items()}
    run = saved.save(tmp_path / "run.json", document)
    summary = summarise(speedups(load([run]), "torch", ["compiled"]))
    row = summary[(summary["operation"] == "linear_attention") & (summary["pass"] == "forward")]
    (row,) = row.to_dict("records")
    assert (row["worst"], row["worst_N"]) == (pytest.approx(0.5), 64)
    assert row["geometric_mean"] == pytest.approx((2.0**6 * 0.5) ** (1 / 7))
    assert row["lengths"] == 7


def test_medians_of_two_runs_are_not_divided(tmp_path: Path) -> None:
    for name, backend in (("a", "torch"), ("b", "compiled")):
        document = saved.run()
        document["benchmarks"] = [
            case for case in document["benchmarks"] if case["extra_info"]["backend"] == backend
        ]
        saved.save(tmp_path / f"{name}.json", document)
    with pytest.raises(NoRuns, match="no run has a case of 'torch' and of another"):
        speedups(load([tmp_path]), "torch")


def test_calls_of_many_sequences_stand_apart(tmp_path: Path) -> None:
    document = saved.run()
    batched = json.loads(json.dumps(document["benchmarks"]))
    for case in batched:
        case["extra_info"]["total_tokens"] = 65_536
    document["benchmarks"] += batched
    run = saved.save(tmp_path / "run.json", document)
    cases = speedups(load([run]), "torch", ["compiled"])
    assert sorted(set(cases["total_tokens"])) == [0, 65_536]
    assert len(cases) == 2 * 3 * 2 * 7


def test_command(tmp_path: Path, capsys) -> None:
    run = saved.save(tmp_path / "run.json", saved.run())
    table = tmp_path / "cases.csv"
    command = ["compare", "--baseline", "torch", "--backend", "compiled", str(run)]
    assert main([*command, "--csv", str(table)]) == 0
    said = capsys.readouterr().out
    assert "compiled over torch" in said
    assert "geometric mean 2.00×, worst 2.00×" in said
    assert len(list(csv.DictReader(table.open()))) == 3 * 2 * 7
    assert main(["compare", "--baseline", "cudnn", str(run)]) == 2
    assert "unknown baseline 'cudnn'; there are compiled" in capsys.readouterr().err
