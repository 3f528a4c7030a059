"""The process that measures: what a case does to it costs no other case its result."""

import os
from collections.abc import Iterator

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
