"""The results table on synthetic run records whose truth is known."""

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit.bench.instruments.clock import Timing
from linear_vit.training import ablation, results, speed
from linear_vit.training.config import MODELS, Config, model_settings, resolve
from linear_vit.training.errors import UserError
from linear_vit.training.record import SCHEMA, read_runs, write_json

MACHINE = {
    "device": "cpu",
    "cpu": "Example 1",
    "torch": "9.9",
    "threads": 2,
    "cores": 2,
    "processes": 1,
}


def run(model: str, seed: int, accuracy: float, rate: float, **changes: Any) -> dict[str, Any]:
    curve = changes.pop("curve", (0.5, accuracy))
    changes_of_time = changes.pop("epoch_seconds", None)
    given = {"preset": "small", "dataset": "digits", "seed": seed, **model_settings(model)}
    return {
        "schema": SCHEMA,
        "status": changes.pop("status", "finished"),
        "environment": {**MACHINE, **changes.pop("environment", {})},
        "started": changes.pop("started", "2026-01-01T00:00:00+00:00"),
        "config": asdict(resolve({**given, **changes})),
        "model": model,
        "parameters": 1000 + len(model),
        "images_per_second": rate,
        "test_accuracy": accuracy,
        "peak_memory": None,
        "epochs": epochs(changes_of_time or 10.0, *curve),
    }


def epochs(seconds: float, *accuracies: float) -> list[dict[str, Any]]:
    return [{"val_accuracy": accuracy, "seconds": seconds} for accuracy in accuracies]


def rows(table: dict[str, Any], dataset: str = "digits") -> dict[str, dict[str, Any]]:
    [found] = [entry for entry in table["datasets"] if entry["dataset"] == dataset]
    return {row["model"]: row for row in found["rows"]}


def three_seeds() -> list[dict[str, Any]]:
    # The machine slows down from seed to seed; ripple is 1.5 times as fast throughout.
    runs = []
    for seed, rate in enumerate((1000.0, 800.0, 400.0)):
        runs.append(run("baseline", seed, 0.90 + 0.01 * seed, rate))
        runs.append(run("ripple", seed, 0.95, 1.5 * rate))
    return runs


def test_statistics() -> None:
    found = rows(results.make_table(three_seeds()))
    baseline, ripple = found["baseline"], found["ripple"]
    assert baseline["seeds"] == [0, 1, 2]
    assert baseline["accuracy"]["mean"] == pytest.approx(91.0)
    assert baseline["accuracy"]["half_width"] == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert ripple["accuracy"]["half_width"] == pytest.approx(0, abs=1e-9)
    assert baseline["images_per_second"]["median"] == 800
    assert ripple["speedup"]["values"] == pytest.approx([1.5, 1.5, 1.5])
    assert baseline["speedup"]["median"] == 1
    assert ripple["parameters"] == 1006


def test_speedup_is_paired_by_seed() -> None:
    runs = [
        run("baseline", 0, 0.9, 100),
        run("baseline", 1, 0.9, 200),
        run("hydra", 1, 0.9, 300),
        run("hydra", 2, 0.9, 900),  # no baseline of this seed
    ]
    hydra = rows(results.make_table(runs))["hydra"]
    assert hydra["speedup"]["values"] == [1.5]
    assert hydra["images_per_second"]["median"] == 600
    no_pair = rows(results.make_table(runs[3:]))["hydra"]
    assert no_pair["speedup"] is None


def test_speeds_by_turns_come_before_those_of_the_runs() -> None:
    """Of the same setting and machine only; epochs are then counted at that rate, too."""
    runs = three_seeds()
    for record in runs:
        for entry in record["epochs"]:
            entry |= {"images": 1000, "images_per_second": 1.0}
    models = {
        "baseline": {"images_per_second": 500.0, "low": 495.0, "high": 505.0},
        "ripple": {"images_per_second": 1000.0, "low": 980.0, "high": 1020.0},
    }
    known = {
        "created": "2026-01-01",
        "environment": runs[0]["environment"],
        "config": runs[0]["config"],
        "models": models,
    }
    found = rows(results.make_table(runs, speeds=[known]))
    ripple, baseline = found["ripple"], found["baseline"]
    assert ripple["speedup"]["how"] == ripple["images_per_second"]["how"] == "by turns"
    assert ripple["images_per_second"]["median"] == 1000
    assert ripple["speedup"]["median"] == 2
    half = (math.log(1020 / 980) ** 2 + math.log(505 / 495) ** 2) ** 0.5 / 2
    assert ripple["speedup"]["low"] == pytest.approx(2 * math.exp(-half))
    assert ripple["speedup"]["high"] == pytest.approx(2 * math.exp(half))
    assert (baseline["speedup"]["low"], baseline["speedup"]["high"]) == (1, 1)
    assert baseline["time_to_baseline"]["seconds"] == pytest.approx(
        len(runs[0]["epochs"]) * 1000 / 500
    )
    for changes in ({"environment": {"threads": 99}}, {"config": {"epochs": 99}}):
        other = {**known, **{key: {**known[key], **new} for key, new in changes.items()}}
        kept = rows(results.make_table(runs, speeds=[other]))["ripple"]["speedup"]
        assert (kept["how"], kept["median"]) == ("in the runs", 1.5)


def test_what_was_not_run_says_so() -> None:
    table = results.make_table(three_seeds())
    assert [entry["dataset"] for entry in table["datasets"]] == [
        "digits",
        "cifar100",
        "tiny-imagenet",
    ]
    hydra = rows(table)["hydra"]
    assert hydra["status"] == "not run"
    assert hydra["accuracy"] is None
    cifar = rows(table, "cifar100")
    assert all(row["status"] == "not run" for row in cifar.values())
    assert cifar["ripple"]["claim"] == {"accuracy": 85.3, "speedup": 2.1}
    assert cifar["hydra-local"]["claim"] is None
    markdown = results.to_markdown(table)
    [line, _] = [line for line in markdown.splitlines() if "| RippleViT | not run" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "RippleViT",
        *("not run", "85.3 %", "not run", "not run", "O(N)"),
        *("not run", "2.1×", "not run", "not run", "not run"),
    ]
    assert results.make_table([])["datasets"][0]["status"] == "not run"


def test_claims_are_those_of_the_original() -> None:
    assert results.CLAIMS["accuracy"]["tiny-imagenet"] == {
        "baseline": 65.2,
        "ripple": 75.2,
        "hydra": 74.6,
    }
    assert results.CLAIMS["speedup"]["tiny-imagenet"] == {
        "baseline": 1.0,
        "ripple": 2.0,
        "hydra": 1.9,
    }


def test_runs_that_differ_share_no_table() -> None:
    runs = [
        run("baseline", 0, 0.9, 100),
        run("ripple", 0, 0.9, 100, epochs=99),
        run("hydra", 0, 0.9, 100, environment={"device": "Big GPU"}),
        run("hydra", 1, 0.9, 100, status="failed"),
    ]
    digits = [e for e in results.make_table(runs)["datasets"] if e["dataset"] == "digits"]
    assert len(digits) == 3
    for entry in digits:
        assert sum(row["status"] == "measured" for row in entry["rows"]) == 1


def test_a_repeated_run_counts_once_the_latest() -> None:
    runs = [
        run("baseline", 0, 0.5, 100, started="2026-01-02T00:00:00+00:00"),
        run("baseline", 0, 0.9, 100, started="2026-01-01T00:00:00+00:00"),
    ]
    assert rows(results.make_table(runs))["baseline"]["accuracy"]["values"] == [50.0]


def test_markdown_and_csv() -> None:
    table = results.make_table([*three_seeds(), run("hydra", 0, 0.8, 500)])
    markdown = results.to_markdown(table)
    assert "| Baseline ViT | 1,008 | – | 91.0 ± 2.5 % | – | O(N²) | 800 | – | 1.00× |" in markdown
    assert "| RippleViT | 1,006 | – | 95.0 ± 0.0 % | +4.0 ± 2.5 | O(N) | 1,200 | – |" in markdown
    assert "80.0 % (one seed)" in markdown
    assert "3 seeds; on Example 1, 2 threads, torch 9.9" in markdown
    assert results.CLAIMS["source"] in markdown
    lines = list(csv.DictReader(io.StringIO(results.to_csv(table))))
    assert len(lines) == 3 * len(results.ROWS)
    ripple = next(line for line in lines if line["model"] == "ripple")
    assert float(ripple["accuracy_mean_percent"]) == pytest.approx(95)
    assert float(ripple["speedup_median"]) == pytest.approx(1.5)
    assert ripple["speedup_claimed"] == ""
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_time_to_the_baselines_final_accuracy() -> None:
    """Interpolated between epochs, paired by seed, the baseline timed by its own first crossing."""
    runs = []
    for seed in (0, 1):
        # Final 0.8; first reached half way between its epochs of 0.7 and 0.9.
        curve = (0.6, 0.7, 0.9, 0.8)
        runs.append(run("baseline", seed, 0.8, 100, curve=curve, epoch_seconds=10.0))
        runs.append(run("hydra", seed, 0.8, 100, curve=(0.7, 0.75, 0.79), epoch_seconds=1.0))
    runs.append(run("ripple", 0, 0.8, 100, curve=(0.6, 1.0), epoch_seconds=8.0))
    runs.append(run("ripple", 1, 0.8, 100, curve=(0.85, 0.6), epoch_seconds=8.0))
    found = {
        model: row["time_to_baseline"] for model, row in rows(results.make_table(runs)).items()
    }
    assert found["baseline"]["seconds"] == pytest.approx(25)
    assert found["baseline"]["speedup"]["values"] == pytest.approx([1, 1])
    assert found["baseline"]["target_percent"] == pytest.approx(80)
    assert found["ripple"]["speedup"]["values"] == pytest.approx([25 / 12, 25 / 8])
    assert found["ripple"]["seconds"] == pytest.approx(10)
    assert (found["hydra"]["reached"], found["hydra"]["speedup"]) == (0, None)
    markdown = results.to_markdown(results.make_table(runs))
    assert "not reached" in markdown
    assert results.seconds_to(epochs(1.0, 0.1, 0.2), 0.3) is None


def test_a_pause_of_the_machine_counts_for_no_model():
    # 1000 images at 100/s by the median step are 10 s, whatever the steps of one epoch sum up to.
    paused = [
        {"val_accuracy": 0.2, "seconds": 500.0, "images": 1000, "images_per_second": 100.0},
        {"val_accuracy": 0.4, "seconds": 10.1, "images": 1000, "images_per_second": 100.0},
    ]
    assert results.seconds_to(paused, 0.3) == pytest.approx(15)


FULL = {"preset": "full", "dataset": "cifar100"}


@pytest.mark.parametrize(
    ("accuracy", "rate", "changes", "verdict", "reason"),
    [
        (0.86, 220.0, FULL, "reproduced", "reach the claim"),
        (0.80, 220.0, FULL, "not reproduced", "accuracy 80.0 % of 85.3 %"),
        (0.86, 120.0, FULL, "not reproduced", "speed-up 1.20× of 2.1×"),
        (0.86, 220.0, {**FULL, "epochs": 20}, "not run", "epochs 200 (here 20)"),
        (0.86, 220.0, {"dataset": "fashion-mnist"}, "no claim", "states nothing"),
    ],
)
def test_verdicts(
    accuracy: float, rate: float, changes: dict[str, Any], verdict: str, reason: str
) -> None:
    runs = []
    for seed, wobble in enumerate((0.999, 1.0, 1.001)):
        runs.append(run("baseline", seed, 0.7, 100.0, **changes))
        runs.append(run("ripple", seed, accuracy * wobble, rate * wobble, **changes))
    dataset = changes["dataset"]
    ripple = rows(results.make_table(runs), dataset)["ripple"]
    assert ripple["verdict"] == verdict
    assert reason in ripple["verdict_reason"]
    if dataset == "cifar100":
        assert rows(results.make_table(runs), dataset)["hydra"]["verdict"] == "not run"


def test_an_interval_that_holds_the_claim_reproduces_it() -> None:
    runs = [run("baseline", seed, 0.7, 100.0, **FULL) for seed in range(3)]
    runs += [run("ripple", s, a, 220.0, **FULL) for s, a in enumerate((0.80, 0.84, 0.88))]
    assert rows(results.make_table(runs), "cifar100")["ripple"]["verdict"] == "reproduced"


def test_arithmetic() -> None:
    """The figures worked out by hand for the claimed backbone: 64 tokens, dim 384."""
    a = results.arithmetic(32, 4, 384, 1536)
    assert a["tokens"] == 64
    assert a["core_share"] == pytest.approx(64 / (6 * 384 + 64))
    assert a["free_core"] == pytest.approx(1.03, abs=0.005)
    assert a["pooled"] == pytest.approx(1.45, abs=0.01)
    assert a["no_attention"] == pytest.approx(1.54, abs=0.005)


HEADER = "machine,operation,pass,dtype,backend,exponent,low,high,reason\n"


def test_exponents(tmp_path: Path) -> None:
    """Of the runs' own processor, both passes, rows without a fit left out."""
    path = tmp_path / "exponents.csv"
    path.write_text(
        HEADER
        + "Other CPU,softmax_attention,forward+backward,float32,torch,1.5,1.4,1.6,\n"
        + "Example 1,softmax_attention,forward,float32,torch,1.7,1.6,1.8,\n"
        + "Example 1,softmax_attention,forward+backward,float32,torch,1.9,1.8,2.0,\n"
        + "Example 1,linear_attention,forward+backward,float32,torch,,,,too few lengths\n"
    )
    table = results.make_table(three_seeds(), exponents=results.read_exponents(path))
    found = {model: row["complexity"] for model, row in rows(table).items()}
    assert found["baseline"]["exponent"] == 1.9
    assert found["ripple"] == {
        "order": "O(N)",
        **dict.fromkeys(("exponent", "low", "high", "pass", "backend", "dtype", "machine")),
    }
    assert "O(N²), measured N^1.90 (1.80 to 2.00)" in results.to_markdown(table)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"exponents\.csv .* lacks backend"):
        results.read_exponents(path)
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        results.read_exponents(tmp_path / "nowhere.csv")


def test_ablation_chooses_by_validation_accuracy(tmp_path: Path) -> None:
    configs, runs = [], []
    for seed in (0, 1):
        for value, val, test, rate in ((1, 0.6, 0.9, 100.0), (2, 0.8, 0.7, 150.0)):
            runs.append(
                run("ripple", seed, test, rate * (seed + 1), ripple_stages=value, curve=(val, 0.1))
            )
            configs.append(Config(**runs[-1]["config"]))
    found = ablation.summarise("ripple_stages", configs, runs, MACHINE)
    assert found["best"] == 2
    assert found["claimed_best"] == 3
    assert [row["value"] for row in found["rows"]] == [1, 2]
    assert found["rows"][1]["speedup"]["values"] == pytest.approx([1.5, 1.5])
    assert found["rows"][0]["accuracy"]["mean"] == pytest.approx(90)
    assert "| 2 | 1,006 | 80.0 ± 0.0 % | 70.0 ± 0.0 % | 225 | 1.50× | 2 |" in ablation.to_markdown(
        found
    )
    assert len(ablation.to_csv(found).splitlines()) == 3
    assert "same seed; median and range" in ablation.to_markdown(found)
    turns = {
        value: {"images_per_second": rate, "low": rate / 1.1, "high": rate * 1.1}
        for value, rate in ((1, 100.0), (2, 90.0))
    }
    by_turns = ablation.summarise("ripple_stages", configs, runs, MACHINE, turns)
    assert "| 90 | 0.90× [0.79 – 1.03] | 2 |" in ablation.to_markdown(by_turns)
    assert "by turns in one process" in ablation.to_markdown(by_turns)
    assert by_turns["rows"][0]["speedup"]["low"] == 1
    write_json(tmp_path / "ablation-ripple_stages.json", found)
    (tmp_path / "ablation-cut.json").write_text('{"schema":')
    [read] = ablation.read(tmp_path)
    text = results.to_markdown(results.make_table(runs, ablations=[read]))
    assert "best 2 by validation accuracy" in text
    assert "claimed: 3" in text
    ablation.plot(found, tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_step_speed_table() -> None:
    def timed(*seconds: float) -> Timing:
        return Timing(seconds, 1, "made up", turns="the same")

    configs = [resolve({"preset": "small", "dataset": "digits", **model_settings("hydra")})]
    # Turn by turn: that the machine slows down in the third turn is not in the ratio.
    timings = {("hydra", "torch"): timed(0.012, 0.012, 0.024, 0.012, 0.012)}
    timings["hydra", "cpu"] = timed(0.008, 0.008, 0.016)
    reasons = {("hydra", "cuda"): "no CUDA device"}
    found = speed.summarise(configs, timings, reasons, torch.device("cpu"))
    [row] = found["rows"]
    assert row["own"] == "cpu"
    assert row["speedup"] == pytest.approx(1.5)
    assert row["backends"]["torch"]["images_per_second"] == pytest.approx(32 / 0.012)
    markdown = speed.to_markdown(found)
    assert "| Model | PyTorch time | C++ time | CUDA time | Speed-up |" in markdown
    assert "| HydraViT | 12 ms | 8 ms | – | 1.50× | 2,667 | 4,000 |" in markdown
    assert "cuda: no CUDA device (hydra)" in markdown


def test_rows_are_models() -> None:
    assert set(results.ROWS) <= set(MODELS)


def test_damaged_records_are_named_and_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "good" / "run.json", run("baseline", 0, 0.9, 100))
    for name, content in {
        "cut": '{"schema": "linear-vit-run/2", "sta',
        "foreign": '{"schema": "something else"}',
        "list": "[]",
        "empty": '{"schema": "linear-vit-run/2"}',
        "binary": "\0\1",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    runs, skipped = read_runs(tmp_path)
    assert [entry["model"] for entry in runs.values()] == ["baseline"]
    assert len(skipped) == 5
    assert all("run.json" in line for line in skipped)
    assert read_runs(tmp_path / "nowhere") == ({}, [])
