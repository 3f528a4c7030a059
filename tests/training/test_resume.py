"""Runs that are killed, interrupted, out of disk or out of numbers, and taken up again."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import train_minimal
from linear_vit.training import checkpoints, logbook
from linear_vit.training.checkpoints import load_checkpoint
from linear_vit.training.errors import UserError
from tests.training.conftest import take_few

ROOT = Path(__file__).parents[2]
# Dropout, drop path and mixing draw random numbers; 5 steps an epoch, checkpoints between them.
OPTIONS = [
    *("--dataset=digits", "--recipe=strong", "--backend=torch", "--dim=16", "--depth=2"),
    *("--heads=1", "--batch_size=32", "--epochs=3", "--dropout=0.1", "--checkpoint_every=2"),
]


pytestmark = pytest.mark.usefixtures("few_digits")


def main(out: Path, *more: object) -> int:
    return train_minimal.main([*OPTIONS, f"--out={out}", *map(str, more)])


def fingerprint(out: Path) -> dict[str, Any]:
    """Hashes of all tensors of both checkpoints, and the record without its times."""
    hashes = {}
    for name in ("last.pt", "best.pt"):
        content = load_checkpoint(out / name)
        state = {
            "model": content["model"],
            "optimizer": content["optimizer"]["state"],
            "rng": content["rng"][0]["cpu"],
            "loss": content["history"]["loss"],
        }
        digest = hashlib.sha256()
        for tensor in _tensors(state):
            digest.update(tensor.contiguous().numpy().tobytes())
        hashes[name] = digest.hexdigest()
    run = json.loads((out / "run.json").read_text())
    timed = ("seconds", "images_per_second")
    epochs = [{k: v for k, v in e.items() if k not in timed} for e in run["epochs"]]
    kept = {name: run[name] for name in ("status", "test_accuracy", "best_epoch")}
    return {**hashes, "epochs": epochs, **kept}


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _tensors(value)]
    return []


class _Killed(BaseException):
    pass


def die_at_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """The training loop ends before its step ``last``, as a process that is no more."""
    count = 0
    original = train_minimal.training_step

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        if count == last:
            raise _Killed
        count += 1
        return original(*arguments, **options)

    monkeypatch.setattr(train_minimal, "training_step", counted)


@pytest.mark.parametrize(
    "steps",
    [
        [3, 2, 7],
        *(pytest.param(s, marks=pytest.mark.slow) for s in ([0], [1, 1], [5], [6, 6], [14])),
    ],
)
def test_stopped_and_resumed_is_as_if_never_stopped(
    steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    for last in steps:
        with monkeypatch.context() as patch:
            die_at_step(patch, last)
            with pytest.raises(_Killed):
                main(tmp_path, "--resume")
    assert main(tmp_path, "--resume") == 0
    assert fingerprint(tmp_path) == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that was never stopped ends with."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        take_few(patch)
        assert main(out) == 0
    return fingerprint(out)


_PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import pytest, torch
torch.set_num_threads(1)
import test_resume as t
t.take_few(pytest.MonkeyPatch())
sys.exit(t.main(t.Path({out!r}), "--resume"))
"""


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Processes killed at random moments, writing files included, until one gets to the end."""
    outs = [tmp_path / "never", tmp_path / "often"]
    moments = random.Random(1)
    for out in outs:
        program = textwrap.dedent(_PROGRAM).format(
            root=str(ROOT), tests=str(Path(__file__).parent), out=str(out)
        )
        kills = 0
        while True:
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdout=subprocess.DEVNULL, cwd=tmp_path
            )
            if out.name == "often" and kills < 4:
                # From the first file of this attempt on, at any moment.
                before = stamp(out)
                while process.poll() is None and stamp(out) == before:
                    time.sleep(0.002)
                time.sleep(moments.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                if process.returncode == 0:
                    break
            else:
                assert process.wait() == 0
                break
    assert fingerprint(outs[0]) == fingerprint(outs[1])
    left = {path.name for path in outs[1].iterdir() if path.name.startswith(".")}
    assert left <= {".lock"}


def stamp(out: Path) -> Any:
    try:
        return os.stat(out / "last.pt").st_mtime_ns
    except FileNotFoundError:
        return None


def test_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may grow to 20,000 bytes from the second checkpoint on: a real write that fails."""
    original, count = checkpoints.save_checkpoint, 0
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(logbook, "save_checkpoint", limited)
        try:
            assert main(tmp_path) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    error = capsys.readouterr().err
    assert "last.pt" in error
    assert "make room or choose another folder" in error
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed"
    assert main(tmp_path, "--resume") == 0


def test_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path, "--epochs=1") == 0
    assert main(tmp_path, "--epochs=1", "--resume", "--lr=0.5", "--attention_type=hydra") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "last.pt") in error
    assert "lr 0.001 (asked for: 0.5)" in error
    assert "attention_type ripple (asked for: hydra)" in error
    assert "--out" in error


@pytest.mark.parametrize("damage", ["cut", "foreign", "no optimizer"])
def test_damaged_checkpoints_are_named(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path, "--epochs=1") == 0
    (tmp_path / "run.json").unlink()
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        del content["optimizer"]
        torch.save(content, path)
    assert main(tmp_path, "--epochs=1", "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in error
    assert {"cut": "delete it", "foreign": "delete it", "no optimizer": "lacks optimizer"}[
        damage
    ] in error


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(tmp_path, "--epochs=1") == 0
    before = (tmp_path / "run.json").read_bytes()
    die_at_step(monkeypatch, 0)
    assert main(tmp_path, "--epochs=1", "--resume") == 0
    assert (tmp_path / "run.json").read_bytes() == before


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.abc123").write_bytes(b"half a checkpoint")
    assert main(tmp_path, "--epochs=1") == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "run.json", "best.pt", "last.pt"}


@pytest.mark.parametrize(
    ("error", "code", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted", "--resume"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "failed", "--batch_size 16"),
    ],
)
def test_stopping_leaves_a_valid_record(
    error: BaseException,
    code: int,
    status: str,
    words: str,
    tmp_path: Path,
    stop_at: Callable[[int, BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(8, error)
    assert main(tmp_path) == code
    assert words in capsys.readouterr().err
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == status
    assert len(run["epochs"]) == 1
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 6


def test_a_loss_that_is_no_number_names_step_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, count = train_minimal.training_step, 0

    def exploding(model: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            with torch.no_grad():
                model.head.weight.fill_(float("inf"))
        return original(model, *arguments, **options)

    monkeypatch.setattr(train_minimal, "training_step", exploding)
    assert main(tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "became nan at step 4" in error
    assert f"{tmp_path}/last.pt (step 2)" in error
    weights = load_checkpoint(tmp_path / "last.pt")["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_loading_executes_nothing(tmp_path: Path) -> None:
    torch.save({"schema": checkpoints.SCHEMA, "code": Path("x")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
