"""How check-noise judges: on made-up runs, whose truth is known."""

import contextlib
import io
import json
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.bench import noise
from linear_vit.reports.__main__ import main
from tests.reports import saved, synthetic

BACKENDS = ("torch", "compiled")
READS = noise._reports


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of saved files is read here: a process is seconds."""

    def reports(arguments: list[str]) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            return main(arguments), said.getvalue()

    monkeypatch.setattr(noise, "_reports", reports)


def runs(folder: Path, planted: float, luck: float = 1.0) -> list[Path]:
    rng = np.random.default_rng(0)
    name = "linear_attention-forward-float32-N{}-compiled"
    factors = {"before": {}, "same": {name.format(512): luck}}
    factors["slower"] = {name.format(n): planted for n in synthetic.LENGTHS}
    return [
        saved.save(folder / f"{stem}.json", synthetic.run(rng, "independent", slower, BACKENDS))
        for stem, slower in factors.items()
    ]


def test_a_tenth_that_is_seen_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # what is folded is still read
    assert noise._judge(*runs(tmp_path, 1.1), "compiled")["right"]
    said = " ".join(capsys.readouterr().out.split())
    assert "the same code in compiled: same; a tenth more work: slower" in said


@pytest.mark.parametrize(
    ("planted", "luck"),
    [
        pytest.param(1.0, 1.0, id="unseen"),
        pytest.param(1.1, 1.5, id="alarm", marks=pytest.mark.slow),
    ],
)
def test_a_tenth_unseen_and_a_false_alarm_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planted: float, luck: float
) -> None:
    assert not noise._judge(*runs(tmp_path, planted, luck), "compiled")["right"]
    assert "FAILED: wanted slower of a tenth more work" in capsys.readouterr().err


def test_what_is_saved_is_read_by_a_process_of_reports() -> None:
    code, said = READS(["compare"])
    assert code == 2
    assert said.startswith("compare takes two runs")


def timed(dropped: int = 0, **medians: float | tuple[float, str]) -> list[Any]:
    """Cases of a saved run of 100 turns, of which some were dropped; a median may be marked."""
    cases, turns = [], str(uuid.uuid4())
    for name, median in medians.items():
        seconds, by = median if isinstance(median, tuple) else (median, None)
        # Of one group, and so of the same turns.
        info = {"turns": turns, "telemetry": {"turns": 100, "turns_dropped": dropped}}
        info["disturbed"] = by
        cases.append({"param": name, "stats": {"median": seconds}, "extra_info": info})
    return cases


def test_cases_are_timed_alone_and_beside_a_busy_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    neighbours: list[Any] = []
    started = noise.subprocess.Popen

    def start(command: list[str], **given: Any) -> Any:
        if "torch.randn" not in command[-1]:  # git, which says what revision this is
            return started(command, **given)
        neighbours.append(started([sys.executable, "-c", "import time; time.sleep(60)"]))
        return neighbours[-1]

    def run(path: Path, given: list[str]) -> None:
        busy = [one for one in neighbours if one.poll() is None]
        cases = timed(30 if busy else 0, **{f"N{path.stem}": 1.05 if busy else 1.0})
        path.write_text(json.dumps({"benchmarks": cases}))

    monkeypatch.setattr(noise.subprocess, "Popen", start)
    monkeypatch.setattr(noise, "_run", run)
    assert noise.main(["--only", "neighbour", "--out", str(tmp_path)]) == 0
    assert "0.0% on the quiet machine, 30.0% beside it" in capsys.readouterr().out
    assert [one.wait() for one in neighbours] == [-signal.SIGKILL] * 5  # one a length
    # What was found is kept, with where that was.
    kept = json.loads((tmp_path / "check-noise.json").read_text())
    case, *others = kept["rows"]
    assert len(others) == 4
    assert (case["case"], case["quiet_s"], case["beside_s"]) == ("N64", 1.0, 1.05)
    text = (tmp_path / "check-noise.md").read_text()
    assert "| N64 | 1000.000 | 1050.000 | 1000.000 | 1.05 |" in text
    assert kept["machine"]["cpu"] in text
    assert "## Is a busy neighbour noticed?\n\nYes." in text


@pytest.mark.parametrize(
    ("quiet", "beside", "again", "right", "words"),
    [
        (timed(1, a=1.0, b=2.0), timed(60, a=1.09, b=1.9), timed(2, a=1.0, b=2.0), True, "1.5% on"),
        (timed(a=1.0), timed(80, a=(47.0, "a neighbour")), timed(a=1.0), True, "47000.000 †"),
        (timed(a=1.0, b=1.0), timed(a=1.0, b=1.2), timed(a=1.0, b=1.0), False, "not marked: b"),
        (timed(2, a=1.0), timed(a=1.0), timed(2, a=1.0), False, "more than 2% of the quiet"),
        # The machine itself became faster.
        (timed(a=1.0), timed(a=0.8), timed(a=0.7), True, "1 changed by over 10%"),
        (timed(a=1.0), timed(a=0.6), timed(a=0.7), False, "not marked: a"),
    ],
)
def test_a_neighbour_is_noticed_or_not(
    quiet: list[Any],
    beside: list[Any],
    again: list[Any],
    right: bool,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert noise.compared({"quiet": quiet, "beside": beside, "again": again})["right"] == right
    text = capsys.readouterr().out
    assert words in text
    assert ("FAILED" in text) == (not right)


def test_repeats_are_recorded_by_turns_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of the same code and of more work, made up here, as reports reads them."""
    rng, lengths, recorded = np.random.default_rng(0), synthetic.LENGTHS, []

    def run(path: Path, given: list[str], plugins: Path | None) -> None:
        share = float(path.parent.name) / 100
        planted = (plugins / "planted.py").read_text() if plugins else ""
        assert (f"int({share} * q.shape[2])" in planted) == bool(share)
        assert ("planted" in given) == bool(share)
        factors = {f"linear_attention-forward-float32-N{n}-cpu": 1 + share for n in lengths}
        saved.save(path, synthetic.run(rng, "independent", factors, ("torch", "cpu")))
        recorded.append(share)

    monkeypatch.setattr(noise, "_run", run)
    monkeypatch.setattr(noise, "_RECORDED", 2)
    assert noise._record(tmp_path, "cpu", tmp_path / "out") == 0
    assert recorded == [0, 0.02, 0, 0.05, 0.1] * 2
    kept = json.loads((tmp_path / "out/repeats.json").read_text())
    assert len(kept["processes"]) == 10
    # No round is begun that would end after its minutes.
    (tmp_path / "again").mkdir()
    assert noise._record(tmp_path / "again", "cpu", tmp_path / "short", minutes=1e-9) == 0
    assert len(recorded) == 15
    assert "False alarms and power" in (tmp_path / "out/repeats.md").read_text()
