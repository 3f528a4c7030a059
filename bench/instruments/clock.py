"""How long a call takes: on a CPU by its clock, on CUDA by the device's own.

Both return one duration per round and know nothing of what they time. Whatever has to happen once
(compilation, allocation of workspaces) happens in :func:`warm_up`, before the first round.
"""

import functools
import gc
import random
import statistics
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from linear_vit.bench.instruments.telemetry import Watch

# A CPU round lasts at least this, so that the clock's own cost (some 50 ns) stays under 0.1 %.
_SHORTEST_ROUND_S = 1e-3
# A call this long is its own warm-up, and is timed three times rather than five.
_LONG_CALL_S = 0.2
# Of a call in another process a round lasts longer, so that what asking for it takes is a small
# part of what our clock sees of it.
_SHORTEST_ELSEWHERE_S = 4e-3
# Rounds of one call enqueued on CUDA in a turn, at most: a few calls of these stay below the
# driver's queue of about 1,000 launches. Calls as long as a turn take one round.
_ENQUEUED_ROUNDS = 16
_TURN_S = 0.01
# Disturbed turns are thrown away and taken again: so many of them and as many as there were others,
# and while they take less than so many times the budget. A few are, however long they take.
_MOST_DISTURBED, _MOST_BUDGETS, _LEAST_DISTURBED = 20, 3.0, 3
# A median known to this, from end to end of its interval, is known well enough.
TARGET = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one per round; a CPU round is the mean of ``calls_per_round`` calls."""

    seconds: tuple[float, ...]
    calls_per_round: int
    clock: str
    stop: str = "asked for"  # why there are no more rounds: see measure_interleaved
    cache: str = "hot"  # or "cold": other data are in it before every round
    dropped: int = 0  # rounds of disturbed turns, thrown away
    turns: str | None = None  # alike for timings whose i-th rounds were of one turn
    disturbed: str | None = None  # by what, where too few turns were not: the rounds are of all
    host_seconds: float | None = None  # CUDA: median of what the host takes to enqueue a call

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the median, in seconds."""
        return median_interval(self.seconds)

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

    def over(self, other: "Timing") -> float:
        """How many times as long as the other: the median over the turns that both had.

        Where they took none together, the ratio of their medians. A machine of two speeds has two
        medians, but within a turn one speed (see :mod:`reports.turns`).
        """
        if self.turns is None or self.turns != other.turns:
            return self.median / other.median
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))


@runtime_checkable
class Elsewhere(Protocol):
    """A call that another process makes and times; or several, with a ``clock`` of their own."""

    def rounds(self, calls: int) -> list[float]:
        """Seconds a call: of one round of so many, or on CUDA of so many rounds of one."""
        ...


def median_interval(seconds: Sequence[float], draws: int = 1000) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median: (low, high), in the unit of ``seconds``.

    The draws are the same at every call, so the same rounds give the same interval.
    """
    rounds = np.asarray(seconds)
    drawn = np.random.default_rng(0).integers(len(rounds), size=(draws, len(rounds)))
    low, high = np.quantile(np.median(rounds[drawn], axis=1), (0.025, 0.975))
    return float(low), float(high)


def measure(call: Callable[[], object], device: torch.device, **how: Any) -> Timing:
    """Time one call by itself: :func:`measure_interleaved` of one, which has the options."""
    return measure_interleaved({"": call}, device, **how)[""]


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget_s: float,
    target: float = TARGET,
    min_rounds: int = 5,
    max_rounds: int = 200,
    watch: Watch | None = None,
) -> dict[str, Timing]:
    """Time calls that are to be compared: they take turns, so that drift hits all of them alike.

    A turn is one round of every call, in an order drawn anew. A call drops out with the reason
    "interval" (that of its median is narrow enough), "budget" or "rounds" (the most there may be).

    A turn that something disturbed (see :class:`telemetry.Watch`) is thrown away and taken again. A
    machine that others use may have nothing else: then the calls end with the reason "disturbed",
    and those that have fewer than ``min_rounds`` are marked, and keep all of their rounds.

    Args:
        calls: by name; each does one pass and is free of set-up. Its results are dropped.
        device: where they run. CUDA takes device time, everything else host time.
        budget_s: seconds to spend on the rounds of each call, at most.
        target: width of the median's 95 % interval, over the median, that is narrow enough.
        min_rounds: however long a call is (three for one of more than 0.2 s).
        max_rounds: however short it is.
        watch: tells the turns that were disturbed; by default all that the machine offers.

    Returns:
        A :class:`Timing` for each name.
    """
    rounds = {name: _rounds_of(call, device, min_rounds) for name, call in calls.items()}
    order = random.Random(0)
    watch = Watch.of(device) if watch is None else watch
    lost_s = 0.0
    with _no_garbage_collection():
        while True:
            turn = [r for r in rounds.values() if r.wants_more(budget_s, target, max_rounds)]
            if not turn:
                break
            order.shuffle(turn)
            watch.begin()
            began = time.perf_counter()
            for one in turn:
                one.start()
            watch.look()
            _wait_for(device)
            for one in turn:
                one.finish()
            took = time.perf_counter() - began
            disturbed = watch.end()
            for one in turn:
                one.end_turn(disturbed=disturbed)
            lost_s += took if disturbed else 0.0
            if _hopeless(watch, lost_s, budget_s * len(calls)):
                for one in turn:
                    one.stop = "disturbed"
    # On CUDA a turn is a batch of rounds, of another size for each call.
    turns = None if device.type == "cuda" else uuid.uuid4().hex
    return {name: one.timing(turns, watch) for name, one in rounds.items()}


def _hopeless(watch: Watch, lost_s: float, budget_s: float) -> bool:
    """Whether enough turns were thrown away."""
    if watch.dropped <= _LEAST_DISTURBED:
        return False
    others = watch.turns - watch.dropped
    return watch.dropped > _MOST_DISTURBED + others or lost_s > _MOST_BUDGETS * budget_s


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


def _rounds_of(call: Callable[[], object], device: torch.device, min_rounds: int) -> "Rounds":
    elsewhere = isinstance(call, Elsewhere)
    estimate = _warm_up_elsewhere(call) if isinstance(call, Elsewhere) else warm_up(call, device)
    if estimate > _LONG_CALL_S:
        min_rounds = min(min_rounds, 3)
    kind = _ElsewhereRounds if elsewhere else rounds_on(device)
    return kind(call, device, estimate, min_rounds)


def rounds_on(device: torch.device) -> type["Rounds"]:
    """How rounds are taken on a device, in the process that makes the calls."""
    return _CudaRounds if device.type == "cuda" else _CpuRounds


def _warm_up_elsewhere(call: Elsewhere, *, least_s: float = 0.02) -> float:
    """As :func:`warm_up`: by the other process's clock, since asking takes a while."""
    started, times = time.perf_counter(), list[float]()
    while len(times) < 2 or time.perf_counter() - started < least_s:
        times += call.rounds(1)
        if times[-1] > _LONG_CALL_S:
            break
    return min(times)


class Rounds(ABC):
    """The rounds of one call so far, and what they cost."""

    clock: str
    cache = "hot"
    calls_per_round = 1
    overhead_s = 0.0  # of the host, to enqueue a turn's rounds

    def __init__(
        self, call: Callable[[], object], device: torch.device, estimate: float, min_rounds: int
    ) -> None:
        self.call, self.device, self.estimate = call, device, estimate
        self.min_rounds = min_rounds
        self.seconds: list[float] = []
        self.disturbed: list[float] = []
        self._of_turn: list[float] = []
        self.host_seconds: list[float] = []
        self.spent = 0.0
        self.stop = ""
        self._judge_at = 2 * min_rounds  # of fewer rounds the interval is luck

    def wants_more(self, budget_s: float, target: float, max_rounds: int) -> bool:
        """Whether another round is needed; if not, ``stop`` says why."""
        done = len(self.seconds)
        if self.stop or done < self.min_rounds:
            return not self.stop
        if self.spent >= budget_s:
            self.stop = "budget"
        elif done >= max_rounds:
            self.stop = "rounds"
        elif done >= self._judge_at:
            low, high = median_interval(self.seconds)
            if high - low <= target * statistics.median(self.seconds):
                self.stop = "interval"
            # Every look is another chance to stop by luck, and costs a millisecond or two.
            self._judge_at = max(done + 1, int(1.4 * done))
        return not self.stop

    @abstractmethod
    def start(self) -> None:
        """Begin a round of the call, or a batch of them; on a CPU also end it."""

    @abstractmethod
    def finish(self) -> None:
        """Called when the device has nothing left to do."""

    def ask_for(self, calls: int) -> None:
        """The next turn is of so many calls: a round of them, or on CUDA so many rounds."""
        self.calls_per_round = calls

    def take(self) -> list[float]:
        """The rounds of the turn, in seconds a call, to whoever keeps them himself."""
        taken, self._of_turn = self._of_turn, []
        return taken

    def end_turn(self, *, disturbed: bool) -> None:
        """Keep the rounds of a turn, or put them aside; the time that kept ones took is spent."""
        (self.disturbed if disturbed else self.seconds).extend(self._of_turn)
        if not disturbed:
            self.spent += sum(self._of_turn) * self.calls_per_round + self.overhead_s
        self._of_turn, self.overhead_s = [], 0.0

    def timing(self, turns: str | None, watch: Watch) -> Timing:
        marked = self.stop == "disturbed" and len(self.seconds) < self.min_rounds
        return Timing(
            (*self.seconds, *(self.disturbed if marked else ())),
            self.calls_per_round,
            self.clock,
            self.stop,
            self.cache,
            0 if marked else len(self.disturbed),
            turns,
            watch.sentence() if marked else None,
            statistics.median(self.host_seconds) if self.host_seconds else None,
        )


class _CpuRounds(Rounds):
    clock = "host clock (perf_counter_ns)"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls_per_round = max(1, round(_SHORTEST_ROUND_S / self.estimate))

    def start(self) -> None:
        call, calls = self.call, self.calls_per_round
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        self._of_turn.append((time.perf_counter_ns() - start) * 1e-9 / calls)

    def finish(self) -> None:
        """Nothing: a CPU call is over when it returns."""


class _CudaRounds(Rounds):
    """Device time between two events around the call, with a cold L2.

    Each round enqueues, without waiting: a spin, a read of twice the L2, start event, call, stop
    event. A write would flush it too, but leave it full of lines that the call then waits for to be
    written back. The spin outlasts the host's enqueueing of the round, so the device finds the
    whole call in its queue and no launch gap is inside the interval; what the host takes is kept
    apart.
    """

    clock = "device time (CUDA events, L2 flushed)"
    cache = "cold"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._flush = flush_of(self.device)
        self._spin = _spin_cycles(self.call, self.device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.batch = _batch_of(self.estimate)

    def ask_for(self, calls: int) -> None:
        self.batch = calls

    def start(self) -> None:
        before = time.perf_counter()
        with torch.cuda.device(self.device):
            for _ in range(self.batch):
                start = torch.cuda.Event(enable_timing=True)
                stop = torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(self._spin)
                self._flush()
                start.record()
                called = time.perf_counter()
                self.call()
                self.host_seconds.append(time.perf_counter() - called)
                stop.record()
                self._events.append((start, stop))
        self.overhead_s = time.perf_counter() - before

    def finish(self) -> None:
        self._of_turn = [start.elapsed_time(stop) * 1e-3 for start, stop in self._events]
        self._events.clear()


class _ElsewhereRounds(Rounds):
    """Rounds that the call's own process takes, as it would be done here."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        here = rounds_on(self.device)
        self.clock = getattr(self.call, "clock", f"{here.clock}, in a process of its own")
        self.cache = getattr(self.call, "cache", here.cache)
        if self.device.type == "cuda":
            self._calls = _batch_of(self.estimate)
        else:
            self._calls = max(1, round(_SHORTEST_ELSEWHERE_S / self.estimate))
            self.calls_per_round = self._calls

    def start(self) -> None:
        self._of_turn = self.call.rounds(self._calls)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Nothing: it answers when its device has nothing left to do."""


def settle(most_s: float = 0.03) -> None:
    """Wait until no thread of this process is busy: OpenMP's spin for a while after a call."""
    end = time.perf_counter() + most_s
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 3e-4:
            return


def _batch_of(estimate_s: float) -> int:
    """How many rounds a turn has on CUDA: waiting for the device costs more than a short call."""
    return int(min(_ENQUEUED_ROUNDS, max(1.0, _TURN_S / max(estimate_s, 1e-6))))


def flush_of(device: torch.device) -> Callable[[], object]:
    """What empties a GPU's L2 cache, by reading twice its size: nothing has to be written back."""
    floats = torch.cuda.get_device_properties(device).L2_cache_size // 2
    memory, largest = torch.zeros(floats, device=device), torch.zeros((), device=device)
    return lambda: torch.amax(memory, 0, out=largest)


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


def captured(
    call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device
) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
    """A CUDA graph of the call: what replays it, and the tensors that a replay writes.

    Raises:
        ValueError: not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"no CUDA graphs on {device.type}")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
    return graph.replay, outputs


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
