"""Attention of one sequence whose tokens lie on several processes: what a second one saves.

One process takes the operation as it is, several the sharded form, each of one thread (on CUDA,
each of a device of its own). They make the calls at the same time; a round is that of the slowest.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit import kernels
from linear_vit.bench.instruments import machine
from linear_vit.bench.instruments.clock import settle
from linear_vit.bench.instruments.exchanged import Exchanged
from linear_vit.bench.instruments.ranks import Ranks
from linear_vit.bench.problems.attention import HEAD_DIM, HEADS, AttentionShape, square
from linear_vit.bench.problems.case import (
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    Case,
    Expected,
    Operation,
    Problem,
    Shape,
    TimedOnly,
    Wanted,
    WrongResult,
    judge,
    no_inputs,
    worst,
)
from linear_vit.bench.problems.linear_attention import LinearAttention
from linear_vit.bench.problems.softmax_attention import SoftmaxAttention

LINEAR, SOFTMAX = "linear", "softmax"
_OF: dict[str, Operation] = {LINEAR: LinearAttention(), SOFTMAX: SoftmaxAttention()}
_LENGTHS = (256, 1024, 4096, 16_384, 65_536)
_LONGEST_SOFTMAX = 4096  # a second a call on one thread
_PROCESSES = (1, 2)
_LARGE = 2**21  # numbers, to see what an exchange takes a byte


@dataclass(frozen=True)
class SequenceShape(Shape):
    """One sequence of N tokens, H heads of D, over so many processes."""

    B: int
    H: int
    N: int
    D: int
    processes: int

    @property
    def tokens(self) -> int:
        return self.N

    @property
    def whole(self) -> AttentionShape:
        """Of the sequence, wherever it lies."""
        return square(self.B, self.H, self.N, self.D)


# A case in every process: of which dtype, backend and pass.
Key = tuple[SequenceShape, torch.dtype, str, str]


class OverProcesses(TimedOnly):
    """Linear attention, which exchanges a state, and softmax attention with gathered k and v."""

    name = "over_processes"
    title = "Attention over processes"
    budget = 2.0
    modes = (FORWARD, FORWARD_BACKWARD)

    def shape(self, tokens: int, batch: int = 1) -> SequenceShape:
        return SequenceShape(batch, HEADS, tokens, HEAD_DIM, _PROCESSES[-1])

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        return _LENGTHS

    def sizes(
        self, device_type: str, extent: str, tokens: Sequence[int], total_tokens: int | None
    ) -> Iterator[SequenceShape]:
        """Every length on one process and on two."""
        for shape in super().sizes(device_type, extent, tokens, None):
            assert isinstance(shape, SequenceShape)
            yield from (replace(shape, processes=count) for count in _PROCESSES)

    def special(self, sweep: str) -> list[Wanted]:
        return [
            Wanted(400 + number, mode, "float32", shape)
            for mode in self.modes
            for number, shape in enumerate(self.sizes(sweep, sweep, (), None))
            if sweep == "cpu"
        ]

    def backends(self, device: torch.device, asked: Sequence[str]) -> dict[str, str | None]:
        """Both, where no kernels are asked for by name: each takes the fastest there is."""
        return {} if asked else dict.fromkeys(_OF)

    def unusable(self, shape: Any, backend: str, device: torch.device) -> str | None:
        """Why there are too few devices, or the sequence is too long."""
        there = torch.cuda.device_count() if device.type == "cuda" else machine.available_cores()
        if shape.processes > there:
            what = "GPUs" if device.type == "cuda" else "cores"
            return f"{shape.processes} processes need as many {what}, there are {there}"
        if backend == SOFTMAX and device.type == "cpu" and shape.N > _LONGEST_SOFTMAX:
            return f"its cost is quadratic: it is timed up to N = {_LONGEST_SOFTMAX:,}"
        return None

    def turn_key(self, shape: Any) -> object:
        return replace(shape, processes=0)

    def rehearsal(self, shape: Any) -> SequenceShape:
        return replace(shape, H=1, N=64, D=16)

    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        return _OverProcesses(self, shape, dtype, {}, (), (), no_inputs, device)

    def working_set(self, mode: str, backend: str, shape: Any) -> int:
        """Of the whole problem in every process, its slices, and the judge's float64."""
        tensors = 8 * 4 * shape.B * shape.H * shape.N * shape.D
        return tensors * (shape.processes + 4)

    def size_name(self, shape: Any) -> str:
        return f"{super().size_name(shape)}-P{shape.processes}"

    def facts(self, case: Case, median_s: float) -> dict[str, Any]:
        shape = case.shape
        assert isinstance(shape, SequenceShape)
        call = _made[shape, DTYPES[case.dtype], case.backend, case.mode]
        ranks = call.ranks
        settle()
        latency, rate = zip(*ranks.ask(_all_reduce), strict=True) if ranks.count > 1 else ((), ())
        return {
            "processes": shape.processes,
            "batch": shape.B,
            "heads": shape.H,
            "head_dim": shape.D,
            "sent_bytes": call.sent_bytes,
            "exchanges": call.exchanges,
            "all_reduce_latency_s": max(latency, default=None),
            "all_reduce_bytes_per_s": min(rate, default=None),
        }


OPERATIONS = (OverProcesses(),)

_made: "dict[Key, _Together]" = {}


@dataclass(frozen=True, eq=False)
class _OverProcesses(Problem):
    device: torch.device

    def call(self, backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        """The call of all processes, whose results have been judged.

        Raises:
            WrongResult: they are not those of the whole sequence.
            RankFailed: a process raised, or died.
        """
        key = (self.shape, self.dtype, backend, mode)
        whole, expected = _whole(backend, self.shape.whole, self.dtype)
        changed = expected.cotangents is not whole.cotangents  # it is judged in a part
        cotangent = expected.cotangents[0].float().numpy() if changed else None
        ranks = _group(self.shape.processes, self.device.type)
        parts = ranks.ask(_open, key, self.device.type, cotangent)
        results = [
            torch.cat([torch.from_numpy(x).to(self.dtype) for x in rows], dim=2)
            for rows in zip(*(part["results"] for part in parts), strict=True)
        ]
        name, verdict = worst(judge(whole, mode, results, expected))
        if not verdict.passed:
            raise WrongResult(f"wrong result: {name}: {verdict}")
        _made[key] = _Together(ranks, key, *parts[0]["sent"])
        return _made[key]


@functools.lru_cache(maxsize=2)
def _whole(backend: str, shape: AttentionShape, dtype: torch.dtype) -> tuple[Problem, Expected]:
    """The whole sequence, and the right results."""
    problem = _problem(backend, shape, dtype)
    return problem, problem.expected()


def _problem(backend: str, shape: AttentionShape, dtype: torch.dtype) -> Problem:
    """The same numbers in every process: they are drawn on the CPU."""
    return _OF[backend].problem(shape, dtype, torch.device("cpu"))


_groups: dict[tuple[int, str], Ranks] = {}


def _group(count: int, device_type: str) -> Ranks:
    """Started once, and anew where one failed."""
    found = _groups.get((count, device_type))
    if found is None or not found.alive:
        found = _groups[count, device_type] = Ranks(count, device_type)
    return found


@dataclass(frozen=True)
class _Together:
    """One case's call, which all processes of a group make: ``clock.Elsewhere``, and a callable.

    ``sent_bytes`` are those that a process sends in a call, in so many ``exchanges``.
    """

    ranks: Ranks
    key: Key
    sent_bytes: int
    exchanges: int
    clock: ClassVar = "host clock, the slowest of the processes"
    cache: ClassVar = "hot"

    def __call__(self) -> tuple[Tensor, ...]:
        self.rounds(1)
        return ()

    def rounds(self, calls: int) -> list[float]:
        """Of each round the time of the slowest."""
        settle()  # or a thread of this process has one of their cores
        return [max(of_all) for of_all in zip(*self.ranks.ask(_time, self.key, calls), strict=True)]


# ---- in the processes ----------------------------------------------------------------------------

_calls: dict[Key, tuple[Callable[[], Sequence[Tensor]], torch.device]] = {}


def _open(rank: int, key: Key, device_type: str, cotangent: Any) -> dict[str, Any]:
    """Make the call; this process's results, and what it sends."""
    shape, dtype, backend, mode = key
    for other in [k for k in _calls if replace(k[0], processes=0) != replace(shape, processes=0)]:
        del _calls[other]  # its tensors may be large
    device = torch.device(device_type, rank if device_type == "cuda" else 0)
    problem = _problem(backend, shape.whole, dtype)
    given = problem.cotangents[0] if cotangent is None else torch.from_numpy(cotangent).to(dtype)

    def own(x: Tensor) -> Tensor:
        part = x.detach().tensor_split(shape.processes, dim=2)[rank]
        return part.to(device, copy=True, memory_format=torch.contiguous_format)

    q, k, v, dout = (own(x) for x in (*problem.inputs.values(), given))
    name = f"{_OF[backend].name}{'_sharded' if shape.processes > 1 else ''}"
    attend = getattr(kernels, name)
    if mode == FORWARD:
        call = lambda: [attend(q, k, v)]  # noqa: E731
    else:
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def call() -> list[Tensor]:
            out = attend(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with Exchanged() as exchanged:
        results = call()
    _calls[key] = call, device
    return {
        "results": [x.cpu().float().numpy() for x in results],
        "sent": (round(exchanged.bytes), exchanged.exchanges),
    }


def _time(rank: int, key: Key, calls: int) -> list[float]:
    """Seconds a call: on a CPU of one round of so many, on CUDA of so many rounds of one."""
    call, device = _calls[key]
    on_device = device.type == "cuda"
    rounds, in_each = (calls, 1) if on_device else (1, calls)
    taken = []
    for _ in range(rounds):
        dist.barrier()
        if on_device:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(in_each):
            call()
        if on_device:
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - began) / in_each)
    return taken


def _all_reduce(rank: int) -> tuple[float, float]:
    """Seconds that an all-reduce takes of next to nothing, and bytes a second of a large one.

    The bytes are those that each process sends where the exchange goes around a ring.
    """
    [device] = {device for _, device in _calls.values()}

    def took(numbers: int, times: int) -> float:
        x, found = torch.zeros(numbers, device=device), []
        for _ in range(times):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            x[0].item()  # on CUDA it is over when this is known
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    latency = took(2, 50)
    with Exchanged() as exchanged:
        dist.all_reduce(torch.zeros(_LARGE, device=device))
    return latency, exchanged.bytes / max(took(_LARGE, 10) - latency, 1e-9)
