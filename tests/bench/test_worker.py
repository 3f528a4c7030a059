"""The process that measures: what a case does to it costs no other case its result."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from linear_vit.bench import worker
from linear_vit.bench.store import FAILED, MEASURED, OUT_OF_MEMORY, Result
from linear_vit.bench.worker import Worker
from tests.bench.misbehaving import Deed, misbehave


@pytest.fixture(scope="module")
def process() -> Iterator[Worker]:
    """One for all tests: starting a process costs seconds."""
    made = Worker(misbehave)
    yield made
    made.stop()


def outcomes(process: Worker, deeds: list[Deed]) -> dict[str, Result]:
    """As a session does it: groups that are to be tried again are."""
    left, found = [deeds], {}
    while left:
        results, again = process.attempt(
            left.pop(0), None, lambda name: None, 1.0, lambda deed: deed.name
        )
        found |= {result.case: result for result in results}
        left[:0] = again
    return found


def test_what_a_case_does_costs_no_other(process: Worker) -> None:
    deeds = [Deed("first"), Deed("crash", "crash"), Deed("exit", "exit"), Deed("full", "exhaust")]
    found = outcomes(process, [*deeds, Deed("last")])
    assert {name: (r.status, r.reason) for name, r in found.items()} == {
        "first": (MEASURED, None),
        "crash": (FAILED, "its process ended with signal SIGSEGV"),
        "exit": (FAILED, "its process ended with code 3"),
        "full": (OUT_OF_MEMORY, "out of memory: no memory"),
        "last": (MEASURED, None),
    }


def test_who_kills_it_while_they_take_turns_is_found_out(process: Worker) -> None:
    found = outcomes(process, [Deed("sound"), Deed("guilty", "turns"), Deed("sound, too")])
    assert {name: r.status for name, r in found.items()} == {
        "sound": MEASURED,
        "guilty": FAILED,
        "sound, too": MEASURED,
    }


def test_a_process_is_kept_until_it_dies_or_the_device_is_lost(process: Worker) -> None:
    pids = [
        outcomes(process, [Deed("a"), Deed("b", does)])["a"].info["process"]
        for does in ("", "break the device", "")
    ]
    assert os.getpid() not in pids
    assert pids[0] == pids[1] != pids[2]


def test_a_case_that_hangs_is_ended(process: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_S", 1.0)
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    found = outcomes(process, [Deed("hangs", "hang")])
    assert found["hangs"].status == FAILED
    assert found["hangs"].reason == "no result within 1 s"


def test_who_takes_the_device_away_costs_no_other(process: Worker) -> None:
    deeds = [Deed("before"), Deed("guilty", "break the device"), Deed("after")]
    found = outcomes(process, deeds)
    assert {name: r.status for name, r in found.items()} == {
        "before": MEASURED,
        "guilty": FAILED,
        "after": MEASURED,
    }


def test_a_process_that_does_not_begin_fails_its_cases() -> None:
    absent = Worker(lambda *_: [])  # a function that no other process can find
    with pytest.raises(Exception, match=r"pickle|local object|lambda"):
        outcomes(absent, [Deed("a")])
    assert outcomes(Worker(_dies_when_found), [Deed("a")])["a"].status == FAILED


class _Dies:
    """Ends the process that it is sent to."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (7,)


_dies_when_found: Any = _Dies()


def test_no_more_is_taken_than_there_is_time(process: Worker) -> None:
    results, again = process.attempt(
        [Deed("slow", "hang")], None, lambda _: None, 1.0, lambda deed: deed.name, 0.5
    )
    assert [(r.status, r.reason) for r in results] == [(FAILED, "no result within 0 s")]
    assert again == []
