"""What the machine can do at best: copy rate, matrix-product rate, the cost of a launch.

Measured, not looked up, by PyTorch's own copy and matmul, in the run that uses them. An operation's
least traffic and least work over these rates is the time it cannot be expected to beat; which of
the two is longer says what binds it. (It can be beaten: by data that stay in a cache, and by an
algorithm that does less than the least work as SPEC counts it, which is that of dense products.)
"""

import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from linear_vit.bench.instruments import clock

# Far past any last-level cache, in both directions.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
# float16 products without hardware for them are a thousand times slower than with it.
_SHORT_SIDE, _LONGEST_PROBE_S = 256, 5e-3
_BUDGET_S = 0.3
_FRESH_BYTES = 100_000_000 // mmap.PAGESIZE * mmap.PAGESIZE


@dataclass(frozen=True)
class Limits:
    """Rates of one device.

    Attributes:
        copy_bytes_per_s: of a large copy; each byte counts twice, read and written.
        matmul_flop_per_s: by dtype name, of a large square product; float32 is IEEE.
        launch_s: host time to launch the smallest operation, results not waited for.
        measured: when, ISO time.
        probes: by name, how much a second of what kernels need and nothing general measures.
        fresh_bytes_per_s, fresh_large_bytes_per_s: of memory fresh from the system, written once,
            in small pages and in large ones; None where it was not measured.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    launch_s: float
    measured: str = ""
    probes: dict[str, float] = field(default_factory=dict)
    fresh_bytes_per_s: float | None = None
    fresh_large_bytes_per_s: float | None = None

    def least_seconds(self, moved: int, flop: int, dtype: str) -> dict[str, float]:
        """The time that copy and matmul allow for so many bytes and FLOP, by the limit's name."""
        allowed = {"copy": moved / self.copy_bytes_per_s}
        if dtype in self.matmul_flop_per_s:
            allowed[f"{dtype} matmul"] = flop / self.matmul_flop_per_s[dtype]
        return allowed

    def seconds_of(self, needs: Mapping[str, float]) -> dict[str, float]:
        """The time that the probes, and "fresh" bytes, allow for these amounts."""
        rates = dict(self.probes)
        if self.fresh_large_bytes_per_s is not None:
            rates["fresh"] = self.fresh_large_bytes_per_s
        return {name: n / rates[name] for name, n in needs.items() if name in rates}


def measure(
    device: torch.device,
    dtypes: tuple[str, ...],
    probes: Mapping[str, Callable[[], float]] | None = None,
) -> Limits:
    """Measure a device's limits; a second or two.

    Args:
        device: where.
        dtypes: names ("float32") of those whose products are wanted.
        probes: by name, calls that return how much they did; with them fresh pages are measured.
    """
    found = Limits(
        _copy_rate(device),
        {name: _matmul_rate(device, getattr(torch, name)) for name in dtypes},
        _launch_seconds(device),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it is for the cases, which another process may run
    if not probes:
        return found
    return replace(
        found,
        probes={name: probe() / _fastest(probe, device) for name, probe in probes.items()},
        fresh_bytes_per_s=_fresh_rate(device, large_pages=False),
        fresh_large_bytes_per_s=_fresh_rate(device, large_pages=True),
    )


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        side = _MATMUL_SIDE[device.type]
        probe = _operands(_SHORT_SIDE, device, dtype)
        if clock.warm_up(lambda: probe[0] @ probe[1], device) > _LONGEST_PROBE_S:
            side = _SHORT_SIDE
        a, b = _operands(side, device, dtype)
        return 2 * side**3 / _fastest(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _operands(
    side: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
    return a, b


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """A limit is what the machine can do, so the fastest round and not the median."""
    return min(clock.measure(call, device, budget_s=_BUDGET_S, target=0.0).seconds)


def _fresh_rate(device: torch.device, *, large_pages: bool) -> float:
    """Bytes a second of memory got from the system, as an allocator does for a large tensor."""

    def write() -> None:
        memory = mmap.mmap(-1, _FRESH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(memory, dtype=torch.float32).fill_(0.0)

    return _FRESH_BYTES / _fastest(write, device)


def _launch_seconds(device: torch.device, launches: int = 200) -> float:
    x = torch.zeros(1, device=device)
    best = float("inf")
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(launches):
            x.zero_()
        best = min(best, (time.perf_counter() - start) / launches)
    return best
