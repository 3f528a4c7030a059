"""Limits that are kept: for this state of the machine, for a day, and only while they are sound."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from linear_vit.bench import kept_limits
from linear_vit.bench.instruments import limits, machine
from linear_vit.bench.instruments.limits import Limits
from linear_vit.bench.kept_limits import KEPT_FOR, limits_of

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The dtypes of every measurement made; each finds the rates higher than the last."""
    made: list[tuple[str, ...]] = []

    def measure(device: torch.device, dtypes: tuple[str, ...]) -> Limits:
        made.append(dtypes)
        return Limits(1e10 * len(made), {name: 1e11 * len(made) for name in dtypes}, 1e-6)

    monkeypatch.setattr(limits, "measure", measure)
    monkeypatch.setenv("LINEAR_VIT_LIMITS", str(tmp_path / "cache"))
    return made


def the_file() -> Path:
    (path,) = kept_limits.folder().glob("*.json")
    return path


def test_a_second_run_measures_nothing(measured: list) -> None:
    first = limits_of(CPU, ("float32", "bfloat16"))
    assert limits_of(CPU, ("float32",)) == first
    assert len(measured) == 1
    assert first.limits.copy_bytes_per_s == 1e10
    assert first.record() == {
        **dataclasses.asdict(first.limits),
        "measured": json.loads(the_file().read_text())["measured"],
    }
    age = datetime.now(UTC) - datetime.fromisoformat(first.measured)
    assert timedelta(0) <= age < timedelta(minutes=5)


def test_fresh_measures_and_keeps_that(measured: list) -> None:
    limits_of(CPU, ("float32",))
    fresh = limits_of(CPU, ("float32",), fresh=True)
    assert fresh.limits.copy_bytes_per_s == 2e10
    assert limits_of(CPU, ("float32",)) == fresh
    assert len(measured) == 2


def test_another_dtype_is_measured_with_those_there_are(measured: list) -> None:
    limits_of(CPU, ("float32",))
    both = limits_of(CPU, ("float16",))
    assert measured[1] == ("float16", "float32")
    assert limits_of(CPU, ("float32",)) == both


@pytest.mark.parametrize(
    ("age", "holds"),
    [
        (KEPT_FOR - timedelta(minutes=5), True),
        (KEPT_FOR + timedelta(minutes=5), False),
        (-timedelta(minutes=5), False),
    ],
    ids=["of today", "too old", "of the future"],
)
def test_they_are_kept_for_a_day(measured: list, age: timedelta, holds: bool) -> None:
    limits_of(CPU, ("float32",))
    content = json.loads(the_file().read_text())
    content["measured"] = (datetime.now(UTC) - age).isoformat(timespec="seconds")
    the_file().write_text(json.dumps(content))
    found = limits_of(CPU, ("float32",))
    assert (found.measured == content["measured"]) is holds
    assert len(measured) == (1 if holds else 2)
    assert found.remarks == ()  # age is no damage


@pytest.mark.parametrize(
    ("fact", "value"), [("threads", 99), ("torch", "0.1"), ("cpu_capability", "other")]
)
def test_another_state_has_its_own(
    measured: list, monkeypatch: pytest.MonkeyPatch, fact: str, value: object
) -> None:
    limits_of(CPU, ("float32",))
    facts = machine.describe(CPU)
    with monkeypatch.context() as changed:
        changed.setattr(machine, "describe", lambda device: facts | {fact: value})
        limits_of(CPU, ("float32",))
    assert len(measured) == 2
    # A commit of this project changes nothing in what the machine can do.
    monkeypatch.setattr(machine, "describe", lambda device: facts | {"git": "another"})
    assert limits_of(CPU, ("float32",)).limits.copy_bytes_per_s == 1e10


def test_the_governor_is_part_of_the_state(
    tmp_path: Path, measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    governor = tmp_path / "governor"
    monkeypatch.setattr(kept_limits, "_CPU_STATE", {"governor": str(governor)})
    for words in ("powersave", "performance"):
        governor.write_text(words + "\n")
        assert kept_limits.state(CPU)["governor"] == words
        limits_of(CPU, ("float32",))
    assert len(measured) == 2
    governor.unlink()
    assert kept_limits.state(CPU)["governor"] is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("10000000000.0", "-1"),
        lambda text: text.replace("10000000000.0", '"fast"'),
        lambda text: text.replace('"launch_s"', '"launch"'),
        lambda text: text.replace('"measured": "2', '"measured": "x'),
        lambda text: text.replace('"cores"', '"kernels"'),
    ],
    ids=["cut off", "a list", "negative", "a word", "another name", "no date", "another state"],
)
def test_a_damaged_file_is_named_and_measured_anew(measured: list, damage) -> None:
    limits_of(CPU, ("float32",))
    text = the_file().read_text()
    the_file().write_text(damage(text))
    assert the_file().read_text() != text
    found = limits_of(CPU, ("float32",))
    assert found.limits.copy_bytes_per_s == 2e10
    (remark,) = found.remarks
    assert remark.startswith(f"kept limits are damaged and measured anew: {the_file()}: ")
    assert "\n" not in remark
    assert limits_of(CPU, ("float32",)).remarks == ()  # mended


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, measured: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINEAR_VIT_LIMITS", str(tmp_path / "file" / "cache"))
    found = limits_of(CPU, ("float32",))
    assert found.limits.copy_bytes_per_s == 1e10
    assert "are not kept" in "".join(found.remarks)
