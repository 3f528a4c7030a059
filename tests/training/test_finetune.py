"""Fine-tuning after a swap: what a run begins with, and what its record and the table say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.errors import UserError
from linear_vit.training.finetune import Start

TINY = "--dataset digits --preset small --dim 16 --depth 1 --heads 2 --mlp_dim 16 --device cpu"


def run(arguments: str, out: Path) -> dict[str, Any]:
    assert train_minimal.main([*arguments.split(), "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "baseline"
    run(f"{TINY} --attention_type baseline --epochs 2 --seed 3", folder)
    return folder


def test_it_begins_with_the_weights_and_settings_of_a_run(baseline: Path, tmp_path: Path) -> None:
    best = baseline / "best.pt"
    record = run(f"--init_from {best} --attention_type linear --epochs 1 --device cpu", tmp_path)
    source = load_checkpoint(best)["config"]
    began = record["init_from"]
    assert (began["model"], began["checkpoint"]) == ("baseline", str(best))
    assert record["model"] == "linear"
    config = record["config"]
    assert {name: config[name] for name in ("dim", "depth", "seed", "batch_size")} == {
        "dim": 16,
        "depth": 1,
        "seed": 3,
        "batch_size": source.batch_size,
    }
    assert (config["epochs"], config["warmup_epochs"]) == (1, 0.05)
    # Before anything was trained, and after an epoch from there.
    scratch = run(
        f"{TINY} --attention_type linear --epochs 1 --seed 3", tmp_path.with_name("scratch")
    )
    assert record["test_accuracy"] > scratch["test_accuracy"]
    assert began["val_accuracy"] > 0


@pytest.mark.slow
def test_baseline_to_baseline_is_where_it_was(baseline: Path, tmp_path: Path) -> None:
    source = json.loads((baseline / "run.json").read_text())
    command = f"--init_from {baseline / 'best.pt'} --attention_type baseline --epochs 1"
    record = run(f"{command} --device cpu", tmp_path)
    best = max(epoch["val_accuracy"] for epoch in source["epochs"])
    assert record["init_from"]["val_accuracy"] == best


@pytest.mark.slow
def test_a_finished_run_is_not_made_again_and_is_no_other(
    baseline: Path, tmp_path: Path, capsys: Any
) -> None:
    command = f"--init_from {baseline / 'best.pt'} --attention_type ripple --epochs 1 --device cpu"
    first = run(command, tmp_path)
    assert run(f"{command} --resume", tmp_path)["started"] == first["started"]
    # Without the option, --resume goes on with whatever is there; with it, with no other run.
    assert run(f"{TINY} --attention_type ripple --epochs 1 --seed 3 --resume", tmp_path)[
        "init_from"
    ]
    scratch = tmp_path / "scratch"
    run(f"{TINY} --attention_type ripple --epochs 1 --seed 3", scratch)
    assert train_minimal.main([*command.split(), "--resume", "--out", str(scratch)]) == 2
    assert "began with new weights, not with" in " ".join(capsys.readouterr().err.split())


def test_other_sizes_are_refused(baseline: Path, tmp_path: Path, capsys: Any) -> None:
    command = f"--init_from {baseline / 'best.pt'} --attention_type linear --dim 32 --device cpu"
    assert train_minimal.main([*command.split(), "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "can't become this model: size mismatch" in said
    with pytest.raises(UserError, match="no checkpoint at"):
        Start(tmp_path / "none.pt")


@pytest.mark.slow
def test_a_resumed_run_still_knows_where_it_began(baseline: Path, tmp_path: Path) -> None:
    """As after a kill: what is in last.pt is what the record says."""
    command = f"--init_from {baseline / 'best.pt'} --attention_type linear --epochs 1 --device cpu"
    record = run(command, tmp_path)
    assert (
        torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["init_from"]
        == (record["init_from"])
    )


def test_the_results_table_shows_what_came_back(baseline: Path, tmp_path: Path) -> None:
    runs = baseline.parent
    command = f"--init_from {baseline / 'best.pt'} --attention_type linear --epochs 1 --device cpu"
    run(command, runs / "linear")
    table = ["table", "--no-run", "--runs", str(runs), "--out", str(tmp_path)]
    assert train_minimal.main(table) == 0
    content = json.loads((tmp_path / "table.json").read_text())
    [rows] = [part["rows"] for part in content["datasets"] if part["status"] == "measured"]
    [row] = [row for row in rows if row["model"] == "linear from baseline"]
    assert row["title"] == "Linear ViT from Baseline ViT"
    assert (row["attention_type"], row["local_branch"]) == ("linear", False)
    assert row["seeds"] == [3]
    assert row["gain"]["values"]
    assert row["time_to_baseline"]["speedup"] is None
    said = " ".join((tmp_path / "table.md").read_text().split())
    assert "right after its attention was swapped" in said
    assert "1 epoch more" in said
