"""Which run --resume goes on with where no folder is named, and that no two processes share one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from linear_vit import train_minimal
from linear_vit.training.config import Config, resolve
from linear_vit.training.errors import UserError
from linear_vit.training.experiments import to_resume
from linear_vit.training.record import SCHEMA, lock

ROOT = Path(__file__).parents[2]
TINY = ["--dataset=digits", "--preset=small", "--dim=8", "--depth=1", "--heads=1", "--epochs=1"]


@pytest.fixture(autouse=True)
def _in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_digits: None
) -> None:  # what is trained is small
    monkeypatch.chdir(tmp_path)


def leave(name: str, *, age: float = 0, status: str = "running", **given: Any) -> Config:
    """A run's folder below runs/, last written ``age`` seconds ago."""
    config = resolve({"dataset": "digits", "preset": "small", **given})
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    record = {"schema": SCHEMA, "status": status, "config": asdict(config), "environment": {}}
    (folder / "run.json").write_text(json.dumps({**record, "model": config.model, "epochs": []}))
    (folder / "last.pt").touch()
    os.utime(folder / "last.pt", (1e9 - age, 1e9 - age))
    return config


def chosen(**given: Any) -> tuple[Config, str]:
    config, folder = to_resume(given, resolve(given), Path("runs"))
    return config, folder.name


def test_the_newest_unfinished_one(capsys: pytest.CaptureFixture[str]) -> None:
    leave("older", age=9)
    newer = leave("newer", age=5, attention_type="hydra")
    leave("done", age=1, status="finished", seed=3)
    assert chosen() == (newer, "newer")
    assert "going on with runs/newer" in capsys.readouterr().err


def test_of_those_with_the_settings_given() -> None:
    older = leave("older", age=9, lr=0.5)
    leave("newer", age=5)
    assert chosen(lr=0.5) == (older, "older")


def test_before_a_newer_one_that_has_more_settings() -> None:
    """The run that these very options made."""
    exact = leave("exact", age=9)
    leave("other", age=5, lr=0.5)
    assert chosen(dataset="digits", preset="small") == (exact, "exact")


def test_a_changed_setting_is_refused_by_name() -> None:
    leave("one", lr=0.5)
    leave("two", age=3, seed=7)
    with pytest.raises(UserError) as caught:
        chosen(attention_type="hydra", seed=7)
    message = str(caught.value)
    assert "runs/one has attention_type ripple (asked for: hydra), seed 0 (asked for: 7)" in message
    assert "runs/two has attention_type ripple (asked for: hydra)" in message
    assert "leave out --resume to start one" in message


def test_nothing_is_started_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for left in (lambda: None, lambda: leave("done", status="finished")):
        left()
        assert train_minimal.main(["--resume"]) == 2
        assert "no run to resume: none below runs is unfinished" in capsys.readouterr().err


def test_a_finished_run_of_these_options_is_as_good() -> None:
    config = resolve({"dataset": "digits", "preset": "small"})
    leave(config.run_name, status="finished")
    assert chosen(dataset="digits", preset="small") == (config, config.run_name)


def test_damaged_ones_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    good = leave("good", age=9)
    for name in ("no record", "odd settings", "no settings"):
        leave(name)
    (Path("runs") / "no record" / "run.json").unlink()
    odd = Path("runs") / "odd settings" / "run.json"
    odd.write_text(odd.read_text().replace('"dim"', '"width"'))
    none = Path("runs") / "no settings" / "run.json"
    none.write_text(none.read_text().replace('"config": {', '"config": null, "other": {'))
    assert chosen() == (good, "good")
    skipped = capsys.readouterr().err
    assert "skipped runs/no record/last.pt" in skipped
    assert "skipped runs/odd settings/last.pt" in skipped
    assert "skipped runs/no settings/last.pt" in skipped


def test_killed_and_found_again(
    stop_at: Callable[[int, BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with the options of the run left out."""
    stop_at(4, KeyboardInterrupt())
    assert train_minimal.main([*TINY, "--checkpoint_every=2", "--attention_type=hydra"]) == 130
    assert train_minimal.main(["--resume", "--lr=0.5"]) == 2
    assert "lr 0.005 (asked for: 0.5)" in capsys.readouterr().err
    assert train_minimal.main(["--resume"]) == 0
    assert "digits hydra: test accuracy" in capsys.readouterr().out
    [path] = Path("runs").rglob("run.json")
    run = json.loads(path.read_text())
    assert (run["status"], run["resumed"], run["config"]["dim"]) == ("finished", 1, 8)


def test_two_processes_do_not_train_in_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    leave("held")
    program = (
        "import sys; from pathlib import Path; from linear_vit.training.record import lock\n"
        "lock(Path('runs/held')); print('has it', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        assert train_minimal.main(["--resume"]) == 2
        error = capsys.readouterr().err
        assert "skipped runs/held/last.pt: another process is training in runs/held" in error
        assert "none below runs is unfinished" in error
        assert train_minimal.main([*TINY, "--out=runs/held"]) == 2
        assert "another process is training in runs/held" in capsys.readouterr().err
        assert other.stdin is not None
        other.stdin.close()
    os.close(lock(Path("runs/held")))
