"""The clock and the memory meter, against calls whose cost is known."""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linear_vit.bench.instruments import clock, second_clock
from linear_vit.bench.instruments.memory import is_out_of_memory, peak_beyond_outputs
from linear_vit.bench.instruments.second_clock import is_in_sample
from linear_vit.bench.instruments.telemetry import Watch

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_cpu_time_is_that_of_the_call() -> None:
    timing = clock.measure(lambda: spin(2e-3), CPU, budget_s=0.05)
    # A busy machine only ever adds time, so the fastest round is the one to judge.
    assert 2e-3 <= min(timing.seconds) < 2.4e-3
    assert timing.calls_per_round == 1


def test_short_calls_are_averaged_over_a_round() -> None:
    timing = clock.measure(lambda: spin(2e-5), CPU, budget_s=0.02)
    assert timing.calls_per_round > 10
    assert 2e-5 <= min(timing.seconds) < 3e-5


def test_warm_up_is_not_timed() -> None:
    calls = []

    def slow_at_first() -> None:
        calls.append(1)
        spin(0.05 if len(calls) == 1 else 5e-4)

    timing = clock.measure(slow_at_first, CPU, budget_s=0.05)
    assert statistics.median(timing.seconds) < 0.02
    assert len(calls) >= 2 + len(timing.seconds)


def test_budget_and_limits_decide_the_rounds() -> None:
    assert len(clock.measure(lambda: spin(5e-3), CPU, budget_s=0, min_rounds=4).seconds) == 4
    assert len(clock.measure(lambda: spin(1e-3), CPU, budget_s=9, max_rounds=6).seconds) == 6


def test_interleaved_calls_take_turns() -> None:
    turns: list[str] = []
    durations = {"a": 1e-3, "b": 1e-3, "slow": 6e-3}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            turns.append(name)
            spin(durations[name])

        return run

    calls = {name: call(name) for name in durations}
    timings = clock.measure_interleaved(
        calls, CPU, budget_s=0.03, target=0, min_rounds=3, max_rounds=20
    )
    for name, timing in timings.items():
        # No upper bound: what a busy machine adds is not the clock's.
        assert durations[name] <= min(timing.seconds)
    # Who has spent its budget drops out; until then no call is two turns ahead of another.
    assert len(timings["slow"].seconds) < len(timings["a"].seconds)
    rounds = len(timings["slow"].seconds)
    timed = turns[-(sum(len(t.seconds) for t in timings.values())) :][: 3 * rounds]
    for turn in range(rounds):
        assert sorted(timed[3 * turn : 3 * turn + 3]) == ["a", "b", "slow"]
    assert len({tuple(timed[3 * turn : 3 * turn + 3]) for turn in range(rounds)}) > 1
    assert len({timing.turns for timing in timings.values()}) == 1
    assert clock.measure(lambda: None, CPU, budget_s=0).turns != timings["a"].turns


def test_stops_when_the_median_is_known() -> None:
    steady = clock.measure(lambda: spin(1e-3), CPU, budget_s=5, target=0.3, max_rounds=10**6)
    assert steady.stop == "interval"
    assert 10 <= len(steady.seconds) < 100
    low, high = steady.interval
    assert low <= steady.median <= high
    assert high - low <= 0.3 * steady.median

    durations = itertools.cycle((1e-3, 3e-3))
    unsteady = clock.measure(lambda: spin(next(durations)), CPU, budget_s=0.1, target=0.01)
    assert unsteady.stop == "budget"
    assert (
        clock.measure(lambda: spin(1e-4), CPU, budget_s=9, target=0, max_rounds=7).stop == "rounds"
    )


def test_interval_of_the_median_covers_it() -> None:
    """Of 200 samples of a known median, 95 % of the intervals hold it, give or take 4 sigma."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = clock.median_interval(random.lognormal(sigma=0.3, size=40), draws=400)
        held += low <= 1.0 <= high
    assert held >= 200 * 0.95 - 4 * (200 * 0.95 * 0.05) ** 0.5


def test_spread_of_known_rounds() -> None:
    timing = clock.Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1, "made up")
    assert timing.median == 3.0
    assert timing.relative_iqr == pytest.approx(2 / 3)


def test_over_is_turn_by_turn() -> None:
    """The machine slows down fivefold after three turns; one of the two stopped after four."""
    one = clock.Timing((2.0, 2.0, 2.0, 10.0, 10.0, 10.0, 10.0), 1, "made up", turns="a")
    other = clock.Timing((1.0, 1.0, 1.0, 5.0), 1, "made up", turns="a")
    assert one.over(other) == 2
    apart = clock.Timing(other.seconds, 1, "made up", turns="b")
    assert one.over(apart) == 10


def test_peak_memory_counts_what_lives_at_once_beyond_the_result() -> None:
    x = torch.randn(512, 1024)  # 2 MiB

    def call() -> tuple[torch.Tensor, ...]:
        first = x + 1
        second = first * 2
        del first
        third = second * 3
        del second
        return (third,)

    peak, how = peak_beyond_outputs(call, CPU)
    assert peak is not None
    assert peak == pytest.approx(x.nbytes, rel=0.01)  # two live at a time, one is the result
    assert "profiler" in how


def test_peak_memory_of_a_call_that_needs_none() -> None:
    x = torch.randn(64, 64)
    assert peak_beyond_outputs(lambda: (torch.relu(x),), CPU)[0] == 0


def test_out_of_memory_is_told_apart() -> None:
    with pytest.raises(RuntimeError) as too_big:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(too_big.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory is not what this is about"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_time_agrees_with_do_bench() -> None:
    from triton.testing import do_bench

    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    ours = clock.measure(lambda: x @ x, device, budget_s=0.5).median
    theirs = do_bench(lambda: x @ x, warmup=100, rep=500, return_mode="median") * 1e-3
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launch_gaps_are_no_device_time() -> None:
    x = torch.zeros(1, device="cuda")

    def hesitant() -> None:
        x.add_(1)
        spin(2e-3)
        x.add_(1)

    timing = clock.measure(hesitant, torch.device("cuda"), budget_s=0.2)
    assert timing.median < 2e-4


# ---- a second clock ------------------------------------------------------------------------------


def test_a_second_clock_counts_what_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five calls of 90 to 110 µs in two kernels, with the operators around them left out."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(device: object, elapsed: float) -> SimpleNamespace:
        time_range = SimpleNamespace(elapsed_us=lambda: elapsed)
        return SimpleNamespace(device_type=device, time_range=time_range)

    done: list[str] = []
    calls = iter([100.0, 90.0, 110.0, 101.0, 99.0])

    def trace(call: Callable[[], object], device: torch.device) -> SimpleNamespace:
        call()
        of_call = next(calls)
        kernels = [event(cuda, of_call - 60), event(cuda, 60)]
        return SimpleNamespace(function_events=[event(cpu, 500), *kernels])

    monkeypatch.setattr(second_clock.profiles, "trace", trace)
    monkeypatch.setattr(clock, "flush_of", lambda device: lambda: done.append("flush"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    call = lambda: done.append("call")  # noqa: E731
    name, other = (
        next(n for n in "abcdefghijklmnopqrstuvwxyz" if is_in_sample(n) is asked)
        for asked in (True, False)
    )
    found = second_clock.compare(name, call, torch.device("cuda"), 102e-6)
    assert found is not None
    assert found["seconds"] == pytest.approx(100e-6)
    assert found["difference"] == pytest.approx(0.02)
    assert done == ["flush", "call"] * 5
    assert second_clock.compare(name, call, torch.device("cpu"), 1.0) is None
    assert second_clock.compare(other, call, torch.device("cuda"), 102e-6) is None


def test_the_second_clock_is_asked_about_a_sample() -> None:
    names = [f"linear_attention-forward-float32-N{n}-torch" for n in range(64, 4096, 4)]
    asked = [name for name in names if is_in_sample(name)]
    assert 0.08 < len(asked) / len(names) < 0.17
    assert asked == [name for name in names if is_in_sample(name)]


def test_a_round_on_cuda_ends_its_flush_by_reading_and_keeps_the_hosts_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device of paper: a flush that wrote would leave the call to wait for its write-back."""
    order: list[str] = []

    class Event:
        def __init__(self, **_: object) -> None:
            pass

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, other: object) -> float:
            return 1.0  # ms

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            order.append(func.overloadpacket.__name__)
            read.append(args[0].nbytes)
            return func(*args, **(kwargs or {}))

    properties, read = SimpleNamespace(L2_cache_size=1 << 20), list[int]()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("spin"))
    monkeypatch.setattr(clock, "_spin_cycles", lambda call, device: 1)
    rounds = clock._CudaRounds(lambda: (order.append("call"), spin(2e-3)), CPU, 1.0, 5)
    with Ops():
        rounds.start()
    assert order == ["spin", "amax", "event", "call", "event"]
    assert read == [2 * properties.L2_cache_size]
    rounds.finish()
    rounds.end_turn(disturbed=False)
    timing = rounds.timing(None, Watch.of(CPU))
    assert timing.seconds == (1e-3,)
    assert timing.host_seconds is not None
    assert timing.host_seconds >= 2e-3
    assert clock.measure(lambda: None, CPU, budget_s=0).host_seconds is None
