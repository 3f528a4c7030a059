"""What goes wrong while a model is trained, tested or compared is told, and nothing is lost."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training import board, experiments
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.config import Config
from linear_vit.training.data import datasets
from tests.training.test_datasets import tiny

open_board = board.open_board
TINY = ["--recipe=light", "--dim=8", "--depth=1", "--heads=1", "--epochs=1", "--backend=torch"]
DIGITS = [*TINY, "--dataset=digits", "--batch_size=64"]

pytestmark = pytest.mark.usefixtures("few_digits")


def main(*arguments: object) -> int:
    return train_minimal.main([*map(str, arguments), "--device=cpu"])


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


# --- a part of a data set -------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three classes of Tiny ImageNet."""
    tiny(tmp_path / "data")
    monkeypatch.setattr(datasets, "load_once", datasets.load)
    return tmp_path / "data"


def test_a_part_of_a_data_set_is_trained_and_recorded_as_one(
    part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--dataset=tiny-imagenet", "--patch_size=16", f"--out={tmp_path / 'run'}"]
    assert main(*options, f"--data_dir={part}") == 0
    run = record(tmp_path / "run")
    assert (run["dataset_title"], run["dataset_subset"]) == (
        "Tiny ImageNet, 3 of 200 classes",
        True,
    )
    assert len(load_checkpoint(tmp_path / "run" / "best.pt")["model"]["head.bias"]) == 3
    evaluate = ["evaluate", f"--checkpoint={tmp_path / 'run' / 'best.pt'}", f"--data_dir={part}"]
    assert main(*evaluate) == 0
    assert "ripple on Tiny ImageNet, 3 of 200 classes" in capsys.readouterr().out
    (part / "wnids.txt").write_text("n01\nn02\n")
    assert main(*evaluate) == 2
    assert "was trained on 3 classes, and the data here have 2" in capsys.readouterr().err
    # A finished run of the other part is none of this one.
    config, device = Config(**run["config"]), torch.device("cpu")
    there = {name: lambda _, name=name: f"Tiny ImageNet, {name} of 200 classes" for name in (2, 3)}
    assert not experiments.recorded([config], tmp_path, device, there[2])
    assert experiments.recorded([config], tmp_path, device, there[3])
    assert main(*options, f"--data_dir={part}", "--resume") == 2
    assert "was trained on 3 classes, and the data here have 2" in capsys.readouterr().err


def test_all_of_a_data_set_is_no_part_of_it(tmp_path: Path) -> None:
    assert main(*DIGITS, f"--out={tmp_path}") == 0
    run = record(tmp_path)
    assert (run["dataset_title"], run["dataset_subset"]) == ("scikit-learn digits", False)


# --- settings that change nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention_type=hydra", "--ripple_stages=1,2"], "ripple_stages would change nothing"),
        (["--attention_type=hydra", "--heads=1,2"], "heads would change nothing: hydra models"),
        (["--attention_type=baseline", "--hydra_branches=1,2"], "baseline models have none"),
        (["--drop_path=0,0.1"], "drop_path would change nothing: it grows from 0"),
        (["--recipe=light,weak"], "recipe must be one of light, seed, strong, got 'weak'"),
        (["--amp=off,fp8"], "amp must be one of off, bf16, fp16, got 'fp8'"),
    ],
)
def test_ablate_refuses_what_changes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is trained."""
    where = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    others = [option for option in TINY if option.split("=")[0] not in "".join(arguments)]
    assert main("ablate", *others, *where, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("varied", ["attention_type=baseline,hydra", "local_branch=off,on"])
def test_ablate_varies_choices_and_switches(varied: str, tmp_path: Path) -> None:
    where = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path}", "--seconds=0", "--seeds=1"]
    assert main("ablate", *DIGITS, *where, "--hydra_branches=1", f"--{varied}") == 0
    name, values = varied.split("=")
    found = json.loads((tmp_path / f"ablation-{name}.json").read_text())
    words = {False: "off", True: "on"}
    assert [words.get(row["value"], row["value"]) for row in found["rows"]] == values.split(",")


def test_a_warm_up_that_is_too_long_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*DIGITS, "--warmup_epochs=1", f"--out={tmp_path / 'fits'}") == 0
    assert "warm-up" not in capsys.readouterr().err
    assert main(*DIGITS, "--warmup_epochs=3.5", f"--out={tmp_path / 'long'}") == 0
    assert "the warm-up of 3.5 epochs is longer than the run of 1" in capsys.readouterr().err


# --- what can't be written ------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A real one, nearly: files may not grow beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


class FullBoard(board.Board):
    """The disk is full when pictures are to be written."""

    def add_predictions(self, *arguments: Any) -> None:
        with full_disk(5000):
            super().add_predictions(*arguments)


def test_a_full_disk_under_tensorboard_ends_its_logs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("without", "full"):
        assert main(*DIGITS, "--epochs=3", f"--out={tmp_path / name}") == 0
        monkeypatch.setattr(board, "open_board", lambda out, **_: FullBoard(out))
    error = capfd.readouterr().err
    assert error.count("no more TensorBoard logs") == 1
    assert "File too large" in error
    assert "Traceback" not in error
    assert record(tmp_path / "full")["status"] == "finished"
    paths = [tmp_path / name / "last.pt" for name in ("without", "full")]
    weights = [load_checkpoint(path)["model"] for path in paths]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_board_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert open_board(tmp_path / "nowhere") is None
    assert "no TensorBoard logs" in (error := capsys.readouterr().err)
    assert "pip install" not in error


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["table", "--seeds=1", "--models=ripple", *DIGITS], "runs"),
        (["ablate", "--ripple_stages=1,2", "--seeds=1", *DIGITS], "runs"),
        (["bench", "--models=ripple", *DIGITS], "out"),
        (["profile", "--models=ripple", *DIGITS], "out"),
        (DIGITS, "out"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_trained(
    command: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(train_minimal, "training_step", never)
    monkeypatch.setattr("linear_vit.training.steps.training_step", never)
    monkeypatch.setattr("linear_vit.training.breakdown.training_step", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(*command, f"--{name}=file/below") == 2
    assert "cannot write file/below" in capsys.readouterr().err


def test_nothing_is_downloaded_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor for a run that can't be recorded."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr("urllib.request.urlopen", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    command = [*TINY, "--dataset=cifar100", "--batch_size=64"]
    assert main(*command, "--out=file/below", "--data_dir=data") == 2
    assert "cannot write file/below" in capsys.readouterr().err
    assert main(*command, "--out=out", "--data_dir=file/below") == 2
    assert "cannot write file/below" in capsys.readouterr().err


def test_a_table_of_recorded_runs_beside_which_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of these runs are timed anew, into a file that is in the way."""
    monkeypatch.chdir(tmp_path)
    command = ["table", "--seeds=1", "--models=ripple", *DIGITS, "--seconds=0.01", "--out=out"]
    assert main(*command) == 0
    [saved] = (tmp_path / "runs").glob("steps-*.json")
    saved.unlink()
    saved.mkdir()
    capsys.readouterr()
    assert main(*command) == 2
    assert f"cannot write {saved.relative_to(tmp_path)}" in capsys.readouterr().err


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_says_of_weights_that_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on with the others: a bad file in a list is no end of it."""
    for name in ("a", "c"):
        assert main(*DIGITS, f"--out={tmp_path / name}", "--seed", ord(name)) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    content = torch.load(tmp_path / "b" / "best.pt", weights_only=True)
    content["model"]["head.weight"][:] = float("nan")
    torch.save(content, tmp_path / "b" / "best.pt")
    (tmp_path / "a" / "best.pt").write_bytes(b"")
    capsys.readouterr()
    assert main("evaluate", "--checkpoint", tmp_path / "*" / "best.pt") == 2
    told = capsys.readouterr()
    assert told.out.count("of 40 test images") == 1
    assert str(tmp_path / "c") in told.out
    assert "b/best.pt: the model's output is no number for 40 of 40 test images" in told.err
    assert "its weights hold NaN or infinity (head.weight)" in told.err
    assert "a/best.pt is not a readable checkpoint" in told.err
    assert "2 of 3 checkpoints could not be tested" in told.err.splitlines()[-1]
    assert not (tmp_path / "b" / "best-evaluation.json").exists()
    assert main("evaluate", "--checkpoint", tmp_path / "b" / "best.pt") == 2
    assert "no number" in capsys.readouterr().err
