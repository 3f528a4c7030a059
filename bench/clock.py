"""How long a call takes: on a CPU by its clock, on CUDA by the device's own.

Both return one duration per round and know nothing of what they time. Whatever has to happen once
(compilation, allocation of workspaces) happens in :func:`warm_up`, before the first round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A CPU round lasts at least this, so that the clock's own cost (some 50 ns) stays under 0.1 %.
_SHORTEST_ROUND_S = 1e-3
# A call this long is its own warm-up, and is timed three times rather than five.
_LONG_CALL_S = 0.2
# Rounds enqueued on CUDA before waiting for them: below the driver's queue of about 1,000 launches.
_ENQUEUED_ROUNDS = 16


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one per round; a CPU round is the mean of ``calls_per_round`` calls."""

    seconds: tuple[float, ...]
    calls_per_round: int
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def relative_iqr(self) -> float:
        """Interquartile range over the median: how noisy the rounds were."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> Timing:
    """Time ``call`` until the budget is spent, within the given numbers of rounds.

    Args:
        call: does one pass and is free of set-up; its results are dropped.
        device: where it runs. CUDA takes device time, everything else host time.
        budget_s: seconds to spend on rounds.
        min_rounds: however long the call is (three for one of more than 0.2 s).
        max_rounds: however short it is.
    """
    estimate = warm_up(call, device)
    if estimate > _LONG_CALL_S:
        min_rounds = min(min_rounds, 3)
    with _no_garbage_collection():
        if device.type == "cuda":
            return _measure_cuda(call, device, estimate, budget_s, min_rounds, max_rounds)
        return _measure_cpu(call, estimate, budget_s, min_rounds, max_rounds)


def warm_up(call: Callable[[], object], device: torch.device, *, least_s: float = 0.02) -> float:
    """Run ``call`` for ``least_s`` seconds, twice unless it is long; the fastest call's time."""
    started, times = time.perf_counter(), []
    while True:
        before = time.perf_counter()
        call()
        _wait_for(device)
        now = time.perf_counter()
        times.append(now - before)
        if times[-1] > _LONG_CALL_S or (len(times) >= 2 and now - started >= least_s):
            return min(times)


def _measure_cpu(
    call: Callable[[], object], estimate: float, budget_s: float, min_rounds: int, max_rounds: int
) -> Timing:
    calls = max(1, round(_SHORTEST_ROUND_S / estimate))
    seconds: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(seconds) < min_rounds or (
        len(seconds) < max_rounds and time.perf_counter() < deadline
    ):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter_ns() - start) * 1e-9 / calls)
    return Timing(tuple(seconds), calls, "host clock (perf_counter_ns)")


def _measure_cuda(
    call: Callable[[], object],
    device: torch.device,
    estimate: float,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
) -> Timing:
    """Device time between two events around the call, with a cold L2.

    Each round enqueues, without waiting: a spin, a write over twice the L2, start event, call, stop
    event. The spin outlasts the host's enqueueing of the round, so the device finds the whole call
    in its queue and no launch gap is inside the interval.
    """
    properties = torch.cuda.get_device_properties(device)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
    spin = _spin_cycles(call, device)
    seconds: list[float] = []
    started = time.perf_counter()
    with torch.cuda.device(device):
        while len(seconds) < min_rounds or (
            len(seconds) < max_rounds and time.perf_counter() - started < budget_s
        ):
            # No more in flight than the budget has room for.
            rounds = int(min(_ENQUEUED_ROUNDS, max(1.0, budget_s / max(estimate, 1e-6))))
            events = []
            for _ in range(rounds):
                start = torch.cuda.Event(enable_timing=True)
                stop = torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(spin)
                flush.zero_()
                start.record()
                call()
                stop.record()
                events.append((start, stop))
            torch.cuda.synchronize(device)
            seconds += [start.elapsed_time(stop) * 1e-3 for start, stop in events]
    return Timing(tuple(seconds), 1, "device time (CUDA events, L2 flushed)")


def _spin_cycles(call: Callable[[], object], device: torch.device) -> int:
    """Cycles of a spin that lasts twice as long as the host needs to enqueue one call."""
    with torch.cuda.device(device):
        host = []
        for _ in range(3):
            torch.cuda.synchronize(device)
            before = time.perf_counter()
            call()
            host.append(time.perf_counter() - before)
            torch.cuda.synchronize(device)
        # The spin counts SM cycles, whose rate is not the nominal one: measure it.
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(10_000)
        start.record()
        torch.cuda._sleep(1_000_000)
        stop.record()
        torch.cuda.synchronize(device)
        cycles_per_s = 1_000_000 / (start.elapsed_time(stop) * 1e-3)
    return int(2 * (max(host) + 20e-6) * cycles_per_s)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection pause inside a round would be charged to the call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
