"""Runs that an earlier version left: they resume and are evaluated as if it had gone on itself.

``golden/finished`` is a run of two epochs of 20 steps, ``golden/stopped`` the same one, killed in
its step 31: its last.pt is of step 24, in the middle of the second epoch.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import kernels, train_minimal
from linear_vit.training import board, experiments
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.config import DATASETS, MODELS, Config
from linear_vit.training.record import environment, new_record, write_json

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = [
    *("--dataset=digits", "--preset=small", "--attention_type=hydra", "--backend=torch"),
    *("--device=cpu", "--epochs=2", "--dim=8", "--heads=1", "--depth=1", "--batch_size=64"),
    *("--lr=0.02", "--dropout=0.1", "--checkpoint_every=8", "--resume"),
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the runs had; their folders hold no TensorBoard files."""
    monkeypatch.setattr(board, "open_board", lambda _out, **_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "stopped", tmp_path / "run"))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_stopped_run_ends_as_the_one_that_was_not(stopped: Path) -> None:
    assert load_checkpoint(stopped / "last.pt")["step"] == 24
    assert train_minimal.main([*OPTIONS, f"--out={stopped}"]) == 0
    run, expected = record(stopped), record(GOLDEN / "finished")
    assert (run["status"], run["resumed"], run["config"]) == ("finished", 1, expected["config"])
    # Another PyTorch or processor may round otherwise.
    same = all(run["environment"][key] == expected["environment"][key] for key in ("torch", "cpu"))
    exact = {"rtol": 0, "atol": 0}
    near = {"rtol": 1e-3, "atol": 1e-4}
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(at / name) for at in (stopped, GOLDEN / "finished"))
        for part in ("model", "history"):
            for key, value in theirs[part].items():
                if key not in ("seconds", "images"):
                    found = ours[part][key]
                    torch.testing.assert_close(found, value, **(exact if same else near))
    assert run["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0 if same else 0.02)
    assert set(expected) <= set(run)
    assert [set(entry) for entry in expected["epochs"]] == [set(entry) for entry in run["epochs"]]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "finished", tmp_path / "run"))
    assert train_minimal.main([*OPTIONS, f"--out={folder}"]) == 0
    for path in (GOLDEN / "finished").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_its_best_weights_are_evaluated_alike(tmp_path: Path) -> None:
    best = GOLDEN / "finished" / "best.pt"
    command = ["evaluate", f"--checkpoint={best}", f"--out={tmp_path}", "--device=cpu"]
    assert train_minimal.main(command) == 0
    [found] = tmp_path.rglob("best-evaluation.json")
    accuracy = json.loads(found.read_text())["accuracy"]
    assert accuracy == pytest.approx(record(GOLDEN / "finished")["test_accuracy"], abs=1e-3)


def test_a_record_of_this_machine_is_not_trained_again(tmp_path: Path) -> None:
    """Records of before describe their machine in fewer words; those that count are there."""
    run, device = record(GOLDEN / "finished"), torch.device("cpu")
    here = environment(device)
    assert set(run["environment"]) <= {*here, "platform"}
    run["environment"] |= {name: here[name] for name in ("torch", "cpu", "threads")}
    path = tmp_path / "run" / "run.json"
    write_json(path, run)
    config = Config(**run["config"])
    assert list(experiments.recorded([config], tmp_path, device)) == [path]
    assert list(experiments.missing([config], tmp_path, device)) == []
    run["environment"]["threads"] += 1
    write_json(path, run)
    assert not experiments.recorded([config], tmp_path, device)
    assert list(experiments.missing([config], tmp_path, device)) == [config]


def test_a_new_record_has_all_that_one_of_before_had_and_titles() -> None:
    run = record(GOLDEN / "stopped")
    made = new_record(Config(**run["config"]), torch.device("cpu"), run["parameters"])
    assert set(run) - {"best_epoch"} <= set(made)
    for name in ("schema", "status", "config", "model", "parameters", "train_accuracy_is"):
        assert made[name] == run[name]
    assert made["model_title"] == MODELS["hydra"].title
    assert made["dataset_title"] == DATASETS["digits"].title
    asked = run["config"]["backend"]
    assert made["backend"] == (asked or kernels.default_backend("linear_attention", "cpu"))
    default = new_record(Config(attention_type="baseline"), torch.device("cpu"), 1)
    assert default["backend"] == "torch"  # SDPA: own softmax kernels for the CPU there are none
