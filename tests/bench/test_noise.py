"""How check-noise judges: on made-up runs, whose truth is known."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.bench import noise
from tests.reports import saved, synthetic

BACKENDS = ("torch", "compiled")


def runs(folder: Path, planted: float, luck: float = 1.0) -> list[Path]:
    rng = np.random.default_rng(0)
    name = "linear_attention-forward-float32-N{}-compiled"
    factors = {"before": {}, "same": {name.format(512): luck}}
    factors["slower"] = {name.format(n): planted for n in synthetic.LENGTHS}
    return [
        saved.save(folder / f"{stem}.json", synthetic.run(rng, "independent", slower, BACKENDS))
        for stem, slower in factors.items()
    ]


def test_a_tenth_that_is_seen_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert noise._judge(*runs(tmp_path, 1.1), "compiled") == 0
    assert "the same code in compiled: same; a tenth more work: slower" in capsys.readouterr().out


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
    assert noise._judge(*runs(tmp_path, planted, luck), "compiled") == 1
    assert "FAILED: wanted slower of a tenth more work" in capsys.readouterr().err


def timed(dropped: int = 0, **medians: float | tuple[float, str]) -> dict[str, Any]:
    """A saved run of so many turns in all, of which some were dropped; a median may be marked."""
    cases = []
    for name, median in medians.items():
        seconds, by = median if isinstance(median, tuple) else (median, None)
        # Of one group, and so of the same turns.
        info = {"turns": "t", "telemetry": {"turns": 100, "turns_dropped": dropped}}
        info["disturbed"] = by
        cases.append({"param": name, "stats": {"median": seconds}, "extra_info": info})
    return {"benchmarks": cases}


def test_cases_are_timed_alone_and_beside_a_busy_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    neighbours: list[Any] = []
    started = noise.subprocess.Popen

    def start(command: list[str]) -> Any:
        neighbours.append(started([sys.executable, "-c", "import time; time.sleep(60)"]))
        assert "torch.randn" in command[2]
        return neighbours[-1]

    def run(path: Path, given: list[str]) -> None:
        busy = [one for one in neighbours if one.poll() is None]
        path.write_text(json.dumps(timed(30 if busy else 0, a=1.05 if busy else 1.0)))

    monkeypatch.setattr(noise.subprocess, "Popen", start)
    monkeypatch.setattr(noise, "_run", run)
    assert noise.main(["--only", "neighbour"]) == 0
    assert "0.0% on the quiet machine, 30.0% beside it" in capsys.readouterr().out
    assert [one.wait() for one in neighbours] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("quiet", "beside", "right", "words"),
    [
        (timed(1, a=1.0, b=2.0), timed(60, a=1.09, b=1.9), True, "1.0% on the quiet machine"),
        (timed(a=1.0), timed(80, a=(47.0, "a neighbour")), True, "47000.000 †"),
        (timed(a=1.0, b=1.0), timed(a=1.0, b=1.2), False, "not marked: b"),
        (timed(2, a=1.0), timed(a=1.0), False, "more than 2% of the quiet machine's turns"),
    ],
)
def test_a_neighbour_is_noticed_or_not(
    quiet: dict[str, Any], beside: dict[str, Any], right: bool, words: str
) -> None:
    text, judged = noise.compared(quiet, beside)
    assert judged == right
    assert words in text
    assert ("FAILED" in text) == (not right)
