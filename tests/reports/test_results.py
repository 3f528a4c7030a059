"""The results table and its kin, on synthetic records whose truth is known."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports import tables
from linear_vit.reports.__main__ import main
from linear_vit.reports.claims import CLAIMS, MODELS, ROWS
from linear_vit.reports.saved import machines, records, runs
from linear_vit.reports.saved.runs import NoRuns
from linear_vit.reports.tables import ablation, results, results_text
from linear_vit.reports.tables.results import Exponents
from linear_vit.reports.tables.table import join
from tests.reports import saved

MACHINE = {
    "device": "cpu",
    "cpu": "Example 1",
    "torch": "9.9",
    "threads": 2,
    "cores": 2,
    "processes": 1,
}
LABEL = machines.label(MACHINE)
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 128, "patch_size": 1, "epochs": 12,
              "batch_size": 32, "lr": 0.005, "recipe": "light"},
    "full": {"dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536, "patch_size": 4, "epochs": 200,
             "batch_size": 128, "lr": 3e-4, "recipe": "seed"},
}  # fmt: skip


def config(model: str, seed: int, **given: Any) -> dict[str, Any]:
    """A record's configuration, of the small preset on digits unless it is said otherwise."""
    attention, _, local = model.partition("-")
    preset = given.pop("preset", "small")
    made = {"preset": preset, "dataset": "digits", "attention_type": attention, "seed": seed}
    made |= {"local_branch": bool(local), "amp": "off", "compile": False, "backend": None}
    made |= {"ripple_stages": 3, "hydra_branches": 2}
    return made | PRESETS[preset] | given


def run(model: str, seed: int, accuracy: float, rate: float, **changes: Any) -> dict[str, Any]:
    curve = changes.pop("curve", (0.5, accuracy))
    changes_of_time = changes.pop("epoch_seconds", None)
    return {
        "schema": "linear-vit-run/2",
        "status": changes.pop("status", "finished"),
        "environment": {**MACHINE, **changes.pop("environment", {})},
        "started": changes.pop("started", "2026-01-01T00:00:00+00:00"),
        **changes.pop("said", {}),
        "config": config(model, seed, **changes),
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


def markdown(table: dict[str, Any]) -> str:
    return join(results_text.document(table))


def flat(text: str) -> str:
    """Prose without its line breaks."""
    return " ".join(text.split())


def three_seeds() -> list[dict[str, Any]]:
    # The machine slows down from seed to seed; ripple is 1.5 times as fast throughout.
    runs = []
    for seed, rate in enumerate((1000.0, 800.0, 400.0)):
        runs.append(run("baseline", seed, 0.90 + 0.01 * seed, rate))
        runs.append(run("ripple", seed, 0.95, 1.5 * rate))
    return runs


def test_statistics() -> None:
    found = rows(results.make(three_seeds()))
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
    hydra = rows(results.make(runs))["hydra"]
    assert hydra["speedup"]["values"] == [1.5]
    assert hydra["images_per_second"]["median"] == 600
    no_pair = rows(results.make(runs[3:]))["hydra"]
    assert no_pair["speedup"] is None


def steps(folder: Path, document: dict[str, Any]) -> Any:
    """The training steps of a saved run, of this schema or an older one."""
    return runs.load([saved.save(folder / "speed.json", document)]).training


def test_speeds_by_turns_come_before_those_of_the_runs(tmp_path: Path) -> None:
    """Of the same setting and machine only; epochs are then counted at that rate, too."""
    found = three_seeds()
    for record in found:
        for entry in record["epochs"]:
            entry |= {"images": 1000, "images_per_second": 1.0}
    models = {
        "baseline": {"images_per_second": 500.0, "low": 495.0, "high": 505.0},
        "ripple": {"images_per_second": 1000.0, "low": 980.0, "high": 1020.0},
    }
    known: dict[str, Any] = {
        "schema": "linear-vit-model-speed/1",
        "created": "2026-01-01",
        "environment": found[0]["environment"],
        "config": found[0]["config"],
        "models": models,
    }
    table = results.make(found, steps=steps(tmp_path, known))
    ripple, baseline = (rows(table)[model] for model in ("ripple", "baseline"))
    assert ripple["speedup"]["how"] == ripple["images_per_second"]["how"] == "by turns"
    assert ripple["images_per_second"]["median"] == 1000
    assert ripple["speedup"]["median"] == pytest.approx(2)
    half = (math.log(1020 / 980) ** 2 + math.log(505 / 495) ** 2) ** 0.5 / 2
    assert ripple["speedup"]["low"] == pytest.approx(2 * math.exp(-half), rel=1e-3)
    assert ripple["speedup"]["high"] == pytest.approx(2 * math.exp(half), rel=1e-3)
    assert (baseline["speedup"]["low"], baseline["speedup"]["high"]) == (1, 1)
    assert baseline["time_to_baseline"]["seconds"] == pytest.approx(
        len(found[0]["epochs"]) * 1000 / 500
    )
    assert table["speeds"] == [str(tmp_path / "speed.json")]
    assert "Speed-ups by turns: " in " ".join(markdown(table).split())
    for changes in ({"environment": {"threads": 99}}, {"config": {"epochs": 99}}):
        other = {**known, **{key: {**known[key], **new} for key, new in changes.items()}}
        kept = results.make(found, steps=steps(tmp_path, other))
        assert kept["speeds"] == []
        speedup = rows(kept)["ripple"]["speedup"]
        assert (speedup["how"], speedup["median"]) == ("in the runs", 1.5)


def steps_by_turns(models: dict[str, float], backend: str = "default") -> dict[str, Any]:
    """A run of today: rounds of every model's step, whose machine slows down half way."""
    document = saved.run("2026-01-02T00:00:00+00:00")
    document["kernel_suite"] |= {"machine": MACHINE, "sweep": "steps"}
    setting = {k: v for k, v in config("baseline", 0).items() if k not in results.pairs.OF_A_RUN}
    document["benchmarks"] = []
    for number, (model, factor) in enumerate(models.items()):
        case = saved.step(model, 1000 / factor, backend)
        case["extra_info"] |= {"settings": setting, "turns": "one"}
        speeds = [1.0] * 4 + [3.0] * 5 + [1.0] * 2 * number  # they stop at different times
        data = [factor * speed * (1 + 0.001 * i) for i, speed in enumerate(speeds)]
        median = sorted(data)[len(data) // 2]
        case["stats"] = saved.stats(median, len(data)) | {"data": data}
        document["benchmarks"].append(case)
    return document


def test_a_speed_up_of_today_is_turn_by_turn(tmp_path: Path) -> None:
    """Twice as fast in every turn, though one median is of the slow machine and one is not."""
    document = steps_by_turns({"baseline": 2.0, "ripple": 1.0})
    found = rows(results.make(three_seeds(), steps=steps(tmp_path, document)))
    assert found["ripple"]["speedup"]["median"] == pytest.approx(2, rel=1e-6)
    assert found["ripple"]["speedup"]["low"] == pytest.approx(2, rel=1e-3)
    medians = [case["stats"]["median"] for case in document["benchmarks"]]
    assert medians[0] / medians[1] > 4
    # With another backend than that of the runs it says nothing of them.
    other = steps_by_turns({"baseline": 2.0, "ripple": 1.0}, backend="torch")
    found = rows(results.make(three_seeds(), steps=steps(tmp_path, other)))
    assert found["ripple"]["speedup"]["how"] == "in the runs"


def test_what_was_not_run_says_so() -> None:
    table = results.make(three_seeds())
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
    text = markdown(table)
    [line, _] = [line for line in text.splitlines() if "| RippleViT | not run" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # What says nothing of any model has no column.
    assert cells == ["RippleViT", "not run", "85.3 %", "O(N)", "2.1×", "not run"]
    assert results.make([])["datasets"][0]["status"] == "not run"


def test_claims_are_those_of_the_original() -> None:
    assert CLAIMS["accuracy"]["tiny-imagenet"] == {
        "baseline": 65.2,
        "ripple": 75.2,
        "hydra": 74.6,
    }
    assert CLAIMS["speedup"]["tiny-imagenet"] == {
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
    digits = [e for e in results.make(runs)["datasets"] if e["dataset"] == "digits"]
    assert len(digits) == 3
    for entry in digits:
        assert sum(row["status"] == "measured" for row in entry["rows"]) == 1


def test_a_repeated_run_counts_once_the_latest() -> None:
    runs = [
        run("baseline", 0, 0.5, 100, started="2026-01-02T00:00:00+00:00"),
        run("baseline", 0, 0.9, 100, started="2026-01-01T00:00:00+00:00"),
    ]
    assert rows(results.make(runs))["baseline"]["accuracy"]["values"] == [50.0]


def test_markdown_and_csv() -> None:
    table = results.make([*three_seeds(), run("hydra", 0, 0.8, 500)])
    text = markdown(table)
    assert "| Baseline ViT | 1,008 | 91.0 ± 2.5 % | – | O(N²) | 800 | 1.00× |" in text
    assert "| RippleViT | 1,006 | 95.0 ± 0.0 % | +4.0 ± 2.5 | O(N) | 1,200 | 1.50× |" in text
    assert "80.0 % (one seed)" in text
    assert "3 seeds; on Example 1, 2 threads, torch 9.9" in flat(text)
    assert CLAIMS["source"] in flat(text)
    lines = list(csv.DictReader(io.StringIO(results_text.to_csv(table))))
    assert len(lines) == 3 * len(ROWS)
    ripple = next(line for line in lines if line["model"] == "ripple")
    assert float(ripple["accuracy_mean_percent"]) == pytest.approx(95)
    assert float(ripple["speedup_median"]) == pytest.approx(1.5)
    assert ripple["speedup_claimed"] == ""
    assert (ripple["machine"], ripple["exponent_machine"]) == (LABEL, "")
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
    found = {model: row["time_to_baseline"] for model, row in rows(results.make(runs)).items()}
    assert found["baseline"]["seconds"] == pytest.approx(25)
    assert found["baseline"]["speedup"]["values"] == pytest.approx([1, 1])
    assert found["baseline"]["target_percent"] == pytest.approx(80)
    assert found["ripple"]["speedup"]["values"] == pytest.approx([25 / 12, 25 / 8])
    assert found["ripple"]["seconds"] == pytest.approx(10)
    assert (found["hydra"]["reached"], found["hydra"]["speedup"]) == (0, None)
    text = markdown(results.make(runs))
    assert "not reached" in text
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
    ripple = rows(results.make(runs), dataset)["ripple"]
    assert ripple["verdict"] == verdict
    assert reason in ripple["verdict_reason"]
    if dataset == "cifar100":
        assert rows(results.make(runs), dataset)["hydra"]["verdict"] == "not run"


def test_an_interval_that_holds_the_claim_reproduces_it() -> None:
    runs = [run("baseline", seed, 0.7, 100.0, **FULL) for seed in range(3)]
    runs += [run("ripple", s, a, 220.0, **FULL) for s, a in enumerate((0.80, 0.84, 0.88))]
    assert rows(results.make(runs), "cifar100")["ripple"]["verdict"] == "reproduced"


def test_arithmetic() -> None:
    """The figures worked out by hand for the claimed backbone: 64 tokens, dim 384."""
    a = results.arithmetic(32, 4, 384, 1536)
    assert a["tokens"] == 64
    assert a["core_share"] == pytest.approx(64 / (6 * 384 + 64))
    assert a["free_core"] == pytest.approx(1.03, abs=0.005)
    assert a["pooled"] == pytest.approx(1.45, abs=0.01)
    assert a["no_attention"] == pytest.approx(1.54, abs=0.005)


HEADER = "machine,operation,pass,dtype,backend,exponent,low,high,reason\n"
NOT_MEASURED = dict.fromkeys(("exponent", "low", "high", "pass", "backend", "dtype", "machine"))


def test_exponents(tmp_path: Path) -> None:
    """Of the runs' own machine, both passes, rows without a fit left out."""
    path = tmp_path / "exponents.csv"
    here = f'"{LABEL}"'
    other = here.replace("2 threads", "1 thread")
    path.write_text(
        HEADER
        + f"{other},softmax_attention,forward+backward,float32,torch,1.5,1.4,1.6,\n"
        + f"{here},softmax_attention,forward,float32,torch,1.7,1.6,1.8,\n"
        + f"{here},softmax_attention,forward+backward,float32,torch,1.9,1.8,2.0,\n"
        + f"{here},linear_attention,forward+backward,float32,torch,,,,too few lengths\n"
    )
    table = results.make(three_seeds(), exponents=tables.read_exponents(path))
    found = {model: row["complexity"] for model, row in rows(table).items()}
    assert (found["baseline"]["exponent"], found["baseline"]["machine"]) == (1.9, LABEL)
    assert found["ripple"] == {"order": "O(N)", **NOT_MEASURED}
    assert "O(N²), measured N^1.90 (1.80 to 2.00) |" in markdown(table)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(NoRuns, match=r"exponents\.csv: line 2: machine: missing"):
        tables.read_exponents(path)
    with pytest.raises(NoRuns, match=r"nowhere\.csv"):
        tables.read_exponents(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    "change",
    [{"threads": 1}, {"torch": "9.10"}, {"cpu": "Example 12"}, {"device": "Example 1"}],
    ids=["threads", "build", "another CPU whose name begins alike", "device"],
)
def test_exponents_of_another_machine_are_not_shown(change: dict[str, Any]) -> None:
    fit = {"operation": "softmax_attention", "pass": "forward", "dtype": "float32"}
    fit |= {"backend": "torch", "exponent": 1.9, "low": 1.8, "high": 2.0}
    for where, measured in ((MACHINE, True), (MACHINE | change, False)):
        exponents = Exponents("a file", [fit | {"machine": machines.label(where)}])
        table = results.make(three_seeds(), exponents=exponents)
        assert (rows(table)["baseline"]["complexity"]["exponent"] is not None) is measured
        assert table["exponents"] == ("a file" if measured else None)
        assert ("measured N^" in markdown(table)) is measured


def test_an_old_table_that_mixed_machines_shows_the_order_alone() -> None:
    table = results.make(three_seeds())
    complexity = {"exponent": 1.5, "low": 1.4, "high": 1.6, "pass": "forward", "backend": "torch"}
    complexity |= {"order": "O(N²)", "dtype": "float32", "machine": "Another CPU"}
    table["datasets"][0]["rows"][0]["complexity"] = complexity
    assert "| O(N²) |" in markdown(table)
    assert "N^1.50" not in markdown(table)
    table["datasets"][0]["rows"][0]["complexity"]["machine"] = LABEL
    assert "O(N²), measured N^1.50 (1.40 to 1.60) |" in markdown(table)


def benchmark(folder: Path, name: str, machine: dict[str, Any], when: str) -> None:
    document = saved.run(when)
    document["kernel_suite"]["machine"] = machine
    saved.save(folder / name, document)


def test_the_exponents_beside_a_table_are_those_of_its_own_run(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As make demo lays them out; a newer run of another machine does not count."""
    monkeypatch.setenv("COLUMNS", "400")
    for number, record in enumerate(three_seeds()):
        saved.save(tmp_path / "runs" / str(number) / "run.json", record)
    benchmark(tmp_path, "benchmark.json", MACHINE, "2026-01-01T00:00:00+00:00")
    newer = "2026-02-01T00:00:00+00:00"
    benchmark(tmp_path, "newer.json", MACHINE | {"threads": 1}, newer)
    command = ["table", str(tmp_path / "runs"), "--out", str(tmp_path / "training")]
    assert main(command) == 0
    assert "O(N²), measured N^2.00 (2.00 to 2.00)" in flat(capsys.readouterr().out)
    written = (tmp_path / "training" / "table.md").read_text()
    assert "O(N²), measured N^2.00 (2.00 to 2.00) |" in written
    assert f"Exponents: {tmp_path / 'benchmark.json'}." in flat(written)
    table = json.loads((tmp_path / "training" / "table.json").read_text())
    assert rows(table)["ripple"]["complexity"]["machine"] == LABEL
    assert len((tmp_path / "training" / "table.csv").read_text().splitlines()) == 1 + 15
    # One that is asked for and of another machine: the order alone.
    assert main([*command, "--exponents", str(tmp_path / "newer.json")]) == 0
    assert "measured N^" not in capsys.readouterr().out
    assert main(["table", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs_", "source"),
    [
        # Name, when it was recorded, and what its machine says besides.
        ([("a", "2026-02-01", {}), ("b", "2026-01-01", {})], "a"),
        ([("a", "2026-01-01", {}), ("b", "2026-02-01", {})], "b"),
        ([("a", "2026-01-01", {"git": "one"}), ("b", "2026-02-01", {"git": "two"})], "a"),
        ([("a", "2026-01-01", {}), ("b", "2026-02-01", {"cpu_capability": "AVX2"})], "a"),
        ([("a", "2026-01-01", {}), ("b", "2026-02-01", {"cpu": "Example 12"})], "a"),
        ([("a", "2026-01-01", {"torch": "9.8"}), ("b", "2026-02-01", {"threads": 1})], None),
    ],
    ids=["newest first", "newest last", "revision", "instructions", "name begins alike", "none"],
)
def test_exponents_are_of_the_machine_the_build_and_the_newest_run(
    tmp_path: Path, runs_: list[tuple[str, str, dict[str, Any]]], source: str | None
) -> None:
    for number, record in enumerate(three_seeds()):
        record["environment"] |= {"cpu_capability": "AVX512", "revision": "one"}
        saved.save(tmp_path / "runs" / str(number) / "run.json", record)
    for name, when, said in runs_:
        benchmark(tmp_path, f"{name}.json", MACHINE | said, f"{when}T00:00:00+00:00")
    assert main(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "training")]) == 0
    table = json.loads((tmp_path / "training" / "table.json").read_text())
    assert table["exponents"] == (str(tmp_path / f"{source}.json") if source else None)
    assert (rows(table)["ripple"]["complexity"]["exponent"] is not None) is bool(source)


def test_speeds_are_those_in_the_folder_of_the_records(tmp_path: Path, capsys) -> None:
    for number, record in enumerate(three_seeds()):
        saved.save(tmp_path / "runs" / str(number) / "run.json", record)
    document = steps_by_turns({"baseline": 2.0, "ripple": 1.0})
    saved.save(tmp_path / "runs" / "speed-1234.json", document)
    assert main(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "| 2.00× |" in (tmp_path / "out" / "table.md").read_text()
    assert " 2.00× " in capsys.readouterr().out


def test_records_say_what_models_and_data_are_called() -> None:
    said = {"model_title": "My ViT", "dataset_title": "My images", "image_size": 16}
    found = [run("mine", 0, 0.9, 100, dataset="mine", said=said)]
    found.append(run("baseline", 0, 0.8, 100, dataset="mine", said=said | {"model_title": None}))
    table = results.make(found)
    entry = table["datasets"][0]
    assert (entry["title"], entry["arithmetic"]["tokens"]) == ("My images", 256)
    assert [row["title"] for row in entry["rows"]][-1] == "My ViT"
    assert "| My ViT | 1,004 | 90.0 % (one seed) | +10.0 | – | 100 | 1.00× |" in (markdown(table))


def varied() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Configurations and records of two values of a setting."""
    configs, found = [], []
    for seed in (0, 1):
        for value, val, test, rate in ((1, 0.6, 0.9, 100.0), (2, 0.8, 0.7, 150.0)):
            found.append(
                run("ripple", seed, test, rate * (seed + 1), ripple_stages=value, curve=(val, 0.1))
            )
            configs.append(found[-1]["config"])
    return configs, found


def test_ablation_chooses_by_validation_accuracy(tmp_path: Path) -> None:
    configs, records_ = varied()
    other = run("ripple", 0, 0.1, 1.0, ripple_stages=1, environment={"threads": 9})
    older = other | {"started": "2025-01-01T00:00:00+00:00"}
    found = ablation.make("ripple_stages", configs, [*records_, older, run("hydra", 0, 1, 1)])
    assert found["best"] == 2
    assert found["claimed_best"] == 3
    assert [row["value"] for row in found["rows"]] == [1, 2]
    assert found["rows"][1]["speedup"]["values"] == pytest.approx([1.5, 1.5])
    assert found["rows"][0]["accuracy"]["mean"] == pytest.approx(90)
    assert found["rows"][0]["accuracy"]["values"] == [90.0, 90.0]  # none of another machine
    assert len(ablation.to_csv(found).splitlines()) == 3
    assert "same seed; median and range" in ablation.as_table(found).note
    with pytest.raises(ValueError, match="no finished run of ripple_stages"):
        ablation.make("ripple_stages", configs, [])


def test_ablation_by_turns(tmp_path: Path) -> None:
    """From a saved run with the steps of every value."""
    configs, records_ = varied()
    document = saved.run()
    document["kernel_suite"] |= {"machine": MACHINE, "sweep": "steps"}
    document["benchmarks"] = []
    for value, rate in ((1, 100.0), (2, 90.0)):
        case = saved.step("ripple", rate)
        setting = {k: v for k, v in configs[0].items() if k not in ("seed", "attention_type")}
        case["extra_info"] |= {"settings": setting | {"ripple_stages": value}}
        half = 0.1 / 1.96 * 1.96 / rate  # of a 95 % interval of 10 % either side
        case["extra_info"]["median_interval_s"] = [64 / rate - 64 * half, 64 / rate + 64 * half]
        document["benchmarks"].append(case)
    found = ablation.make("ripple_stages", configs, records_, steps=steps(tmp_path, document))
    assert found["rows"][0]["speedup"]["low"] == 1
    speedup = found["rows"][1]["speedup"]
    assert speedup["median"] == pytest.approx(0.9)
    assert speedup["high"] == pytest.approx(0.9 * math.exp(0.1 * 2**0.5), rel=1e-3)
    assert "by turns in one process" in ablation.as_table(found).note
    assert found["rows"][1]["images_per_second"]["median"] == 90


def test_ablation_is_written(tmp_path: Path) -> None:
    configs, records_ = varied()
    for number, record in enumerate(records_):
        saved.save(tmp_path / "runs" / str(number) / "run.json", record)
    shown = tables.write_ablation("ripple_stages", configs, tmp_path / "runs", tmp_path / "out")
    row = "| 2 | 1,006 | 80.0 ± 0.0 % | 70.0 ± 0.0 % | 225 | 1.50× | 2 |"
    assert re.search(r"80.0 ± 0.0 % +70.0 ± 0.0 % +225 +1.50×", shown)
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {f"ablation-ripple_stages.{x}" for x in ("md", "csv", "json", "svg")}
    assert row in written["ablation-ripple_stages.md"].read_text()
    assert "</svg>" in written["ablation-ripple_stages.svg"].read_text()
    (tmp_path / "out" / "ablation-cut.json").write_text('{"schema":')
    [read], [damaged] = records.read_ablations(tmp_path / "out")
    assert "ablation-cut.json: " in damaged
    text = markdown(results.make(records_, ablations=[read]))
    assert "best 2 by validation accuracy" in text
    assert "claimed: 3" in flat(text)
    with pytest.raises(NoRuns):
        tables.write_ablation("ripple_stages", configs, tmp_path / "empty", tmp_path / "out")


def test_step_speed_table(tmp_path: Path) -> None:
    run_file = saved.save(tmp_path / "step-speed.json", saved.step_speed())
    tables.write_steps(run_file, tmp_path / "out")
    shown = (tmp_path / "out" / "step-speed.md").read_text()
    assert "| Model | PyTorch | C++ | Speed-up | Images/s, PyTorch | Images/s, own |" in shown
    assert "| Hydra | 20.0 ms | 18.0 ms | 1.11× | 3,200 | 3,556 |" in shown
    assert "Not timed (hydra-cuda): no device." in flat(shown)
    assert LABEL.replace("Example 1", "Test CPU <3 GHz>").replace("9.9", "2.99") in flat(shown)
    lines = list(csv.DictReader((tmp_path / "out" / "step-speed.csv").open()))
    assert [line["backend"] for line in lines] == ["torch", "cpu"]
    assert float(lines[1]["speedup_over_pytorch"]) == pytest.approx(saved.STEP_SPEEDUP)
    document = saved.run()
    document["benchmarks"] = document["benchmarks"][:1]
    kernels = saved.save(tmp_path / "kernels.json", document)
    with pytest.raises(NoRuns, match="no timed training step"):
        tables.write_steps(kernels, tmp_path)


def test_breakdown_table(tmp_path: Path) -> None:
    record = saved.save(tmp_path / "step-breakdown.json", saved.step_breakdown())
    tables.write_breakdown(record, tmp_path)
    shown = (tmp_path / "step-breakdown.md").read_text()
    assert "| Hydra | 10.0% | 10.0% | 10.0% | 10.0% | 10.0% | 25.0% | 25.0% | 20.0 ms |" in shown
    assert (tmp_path / "step-breakdown.csv").read_text().splitlines()[0].endswith("attention,other")
    with pytest.raises(NoRuns, match="schema"):
        tables.write_breakdown(saved.save(tmp_path / "other.json", {}), tmp_path)


def test_rows_are_models() -> None:
    assert set(ROWS) <= set(MODELS)


def test_damaged_records_are_named_and_left_out(tmp_path: Path) -> None:
    saved.save(tmp_path / "good" / "run.json", run("baseline", 0, 0.9, 100))
    saved.save(tmp_path / "failed" / "run.json", run("baseline", 1, 0.9, 100, status="failed"))
    for name, content in {
        "cut": '{"schema": "linear-vit-run/2", "sta',
        "foreign": '{"schema": "something else"}',
        "list": "[]",
        "empty": '{"schema": "linear-vit-run/2"}',
        "binary": "\0\1",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    found, skipped = records.read_runs(tmp_path)
    assert [(entry["model"], entry["config"]["seed"]) for entry in found] == [("baseline", 0)]
    assert len(skipped) == 5
    assert all("run.json" in line for line in skipped)
    assert records.read_runs(tmp_path / "nowhere") == ([], [])


def test_a_part_of_a_data_set_is_never_the_data_set() -> None:
    """As good as the claim, at the claimed size, and still no verdict; the whole is "not run"."""
    title = "Tiny ImageNet, 2 of its 200 classes"
    said = {"dataset_title": title, "dataset_subset": True}
    full = FULL | {"dataset": "tiny-imagenet"}
    part = [run("baseline", 0, 0.7, 100.0, said=said, **full)]
    part += [run("ripple", 0, 0.99, 300.0, said=said, **full)]
    table = results.make(part)
    shown, whole = (e for e in table["datasets"] if e["dataset"] == "tiny-imagenet")
    assert (shown["title"], shown["subset"], shown["status"]) == (title, True, "measured")
    assert (whole["title"], whole["subset"], whole["status"]) == ("Tiny ImageNet", False, "not run")
    assert {row["verdict"] for row in shown["rows"]} == {"no claim"}
    assert {row["claim"] for row in shown["rows"]} == {None}
    text = markdown(table)
    assert f"## {title}\n" in text
    assert "about 12 h" not in text
    lines = list(csv.DictReader(io.StringIO(results_text.to_csv(table))))
    assert {line["dataset"] for line in lines if line["status"] == "measured"} == {title}
    # Of a record that does not say which part, and beside runs of all classes.
    part[1] |= {"dataset_title": "Tiny ImageNet"}
    both = results.make([*part, run("ripple", 0, 0.80, 220.0, **full)])
    found = [e for e in both["datasets"] if e["dataset"] == "tiny-imagenet"]
    assert sorted(e["title"] for e in found) == [
        "Tiny ImageNet", title, "Tiny ImageNet, a part of its classes"
    ]  # fmt: skip
    (whole,) = (e for e in found if not e["subset"])
    (ripple,) = (row for row in whole["rows"] if row["status"] == "measured")
    assert (ripple["accuracy"]["values"], ripple["claim"]["accuracy"]) == ([80.0], 75.2)


def test_an_ablation_mixes_no_part_with_the_whole() -> None:
    configs, records_ = varied()
    said = {"dataset_title": "scikit-learn digits, 2 of its 10 classes", "dataset_subset": True}
    newer = {"started": "2027-01-01T00:00:00+00:00"}
    parts = [record | said | newer | {"test_accuracy": 1.0} for record in records_]
    whole = ablation.make("ripple_stages", configs, records_)
    assert whole["claimed_best"] == 3
    found = ablation.make("ripple_stages", configs, [*records_, *parts])
    assert found["rows"][0]["accuracy"]["values"] == [100.0, 100.0]
    assert found["claimed_best"] is None
    assert "2 of its 10 classes" in ablation.as_table(found).title
