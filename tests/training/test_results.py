"""The results table on synthetic run records whose truth is known."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from training import results
from training.config import MODELS, model_settings, resolve
from training.record import SCHEMA, read_runs, write_json

MACHINE = {"device": "cpu", "cpu": "Example 1", "torch": "9.9", "threads": 2, "cores": 2}


def run(model: str, seed: int, accuracy: float, rate: float, **changes: Any) -> dict[str, Any]:
    from dataclasses import asdict

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
    }


def rows(table: dict[str, Any], dataset: str = "digits") -> dict[str, dict[str, Any]]:
    [found] = [entry for entry in table["datasets"] if entry["dataset"] == dataset]
    return {row["model"]: row for row in found["rows"]}


def three_seeds() -> list[dict[str, Any]]:
    # The machine slows down from seed to seed; ripple is 1.5 times as fast throughout.
    runs = []
    for seed, speed in enumerate((1000.0, 800.0, 400.0)):
        runs.append(run("baseline", seed, 0.90 + 0.01 * seed, speed))
        runs.append(run("ripple", seed, 0.95, 1.5 * speed))
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
    [line] = [line for line in markdown.splitlines() if "| RippleViT | not run" in line][:1]
    assert line == "| RippleViT | not run | 85.3 % | not run | not run | 2.1× | not run |"
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
    assert "| Baseline ViT | 1,008 | – | 91.0 ± 2.5 % | 800 | – | 1.00× |" in markdown
    assert "| RippleViT | 1,006 | – | 95.0 ± 0.0 % | 1,200 | – | 1.50× |" in markdown
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
    assert [entry["model"] for entry in runs] == ["baseline"]
    assert len(skipped) == 5
    assert all("run.json" in line for line in skipped)
    assert read_runs(tmp_path / "nowhere") == ([], [])
