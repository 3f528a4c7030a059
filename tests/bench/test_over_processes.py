"""A sequence over processes: every process's rows are judged, its bytes counted, its death told."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from linear_vit.bench import group, summary
from linear_vit.bench.estimate import Plan
from linear_vit.bench.instruments.ranks import RankFailed, Ranks
from linear_vit.bench.problems import FORWARD, FORWARD_BACKWARD, Case, over_processes
from linear_vit.bench.problems.over_processes import LINEAR, SOFTMAX, OverProcesses, SequenceShape
from linear_vit.bench.store import FAILED, MEASURED, Result

CPU = torch.device("cpu")
SHAPE = SequenceShape(B=1, H=2, N=71, D=16, processes=2)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    """Processes are ended with the module."""
    yield
    for ranks in over_processes._groups.values():
        ranks.close()


def case(shape: SequenceShape, backend: str = LINEAR, mode: str = FORWARD_BACKWARD) -> Case:
    return Case("over_processes", mode, "float32", shape, backend)


def measured(*cases: Case) -> list[Result]:
    return group.measure_group(cases, Plan(CPU, budget_s=0.01), lambda name: None)


def sent(result: Result) -> tuple[int, int]:
    return result.info["sent_bytes"], result.info["exchanges"]


def test_what_is_exchanged_is_a_state_or_grows_with_the_length() -> None:
    shapes = [replace(SHAPE, processes=count) for count in (1, 2)]
    found = measured(*(case(s, b) for s in shapes for b in (LINEAR, SOFTMAX)))
    assert [result.status for result in found] == [MEASURED] * 4
    alone, alone_softmax, linear, softmax = map(sent, found)
    assert alone == alone_softmax == (0, 0)
    # S and z of both heads, in both directions, of an all-reduce of two; k and v of 36 tokens, the
    # gradients of the other 35, and how many there are.
    assert linear == (2 * 4 * 2 * (2 * 16 * 16 + 2 * 16), 2)
    assert softmax == (2 * 2 * (36 + 35) * 16 * 4 + 8, 3)
    [longer] = measured(case(replace(SHAPE, N=2 * SHAPE.N)))
    assert sent(longer) == linear
    assert found[2].info["all_reduce_latency_s"] > 0
    assert found[2].info["all_reduce_bytes_per_s"] > 0
    assert found[0].info["all_reduce_latency_s"] is None
    assert len({result.info["turns"] for result in found}) == 1
    assert {result.info["clock"] for result in found} == {
        "host clock, the slowest of the processes"
    }
    text = summary.render([summary.Row(r.info, 1e-3) for r in found], 120, colour=False)
    assert "linear, 1 process" in text
    assert "softmax, 2 processes" in text


def test_rows_that_are_wrong_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes are right, and what they are held to is of another softmax."""
    right = over_processes._whole(LINEAR, SHAPE.whole, torch.float32)
    monkeypatch.setattr(over_processes, "_whole", lambda *_: right)
    [found] = measured(case(SHAPE, SOFTMAX, FORWARD))
    assert found.status == FAILED
    assert "wrong result: out" in str(found.reason)


def _die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _raise(rank: int) -> int:
    if rank == 1:
        raise ValueError("no such thing")
    return rank


def test_a_process_that_dies_or_raises_is_named() -> None:
    for function, said in (
        (_die, "process 1 of 2: it died of signal 9"),
        (_raise, "process 1 of 2: ValueError: no such thing"),
    ):
        ranks = Ranks(2)
        with pytest.raises(RankFailed, match=said):
            ranks.ask(function)
        assert not ranks.alive


def test_a_group_that_lost_a_process_is_started_anew() -> None:
    over_processes._group(2, "cpu").close()
    [found] = measured(case(SHAPE, mode=FORWARD))
    assert found.status == MEASURED


def test_what_it_can_not_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    of = OverProcesses()
    long = replace(SHAPE, N=65_536)
    assert of.unusable(long, LINEAR, CPU) is None
    assert "quadratic" in str(of.unusable(long, SOFTMAX, CPU))
    monkeypatch.setattr(over_processes.machine, "available_cores", lambda: 1)
    assert of.unusable(SHAPE, LINEAR, CPU) == "2 processes need as many cores, there are 1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    why = of.unusable(SHAPE, LINEAR, torch.device("cuda"))
    assert why == "2 processes need as many GPUs, there are 1"
