"""What the machine can do at best: copy rate, matrix-product rate, the cost of a launch.

Measured, not looked up, by PyTorch's own copy and matmul, in the run that uses them. An operation's
least traffic and least work over these rates is the time it cannot be expected to beat; which of
the two is longer says what binds it. Data that fit a cache are held against the cache's own rate.
(A limit can be beaten: by data of which some stay in a cache, and by an algorithm that does less
than the least work as SPEC counts it, which is that of dense products.)
"""

import ctypes
import functools
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from linear_vit.bench.instruments import clock, machine
from linear_vit.bench.instruments.telemetry import Watch

# Far past any last-level cache, in both directions.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
# float16 products without hardware for them are a thousand times slower than with it.
_SHORT_SIDE, _LONGEST_PROBE_S = 256, 5e-3
_BUDGET_S = 0.3
_FRESH_BYTES = 100_000_000 // mmap.PAGESIZE * mmap.PAGESIZE


Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Cache:
    """One level of the CPU's caches, all that this process's cores have of it together."""

    name: str
    bytes: int
    copy_bytes_per_s: float


@dataclass(frozen=True)
class Limits:
    """Rates of one device.

    Attributes:
        copy_bytes_per_s: of a large copy; each byte counts twice, read and written.
        matmul_flop_per_s: by dtype name, of a large square product; float32 is IEEE.
        matmul_kernels: by dtype name, what oneDNN calls the kernel of that product, its
            instruction set last; without those that another library multiplied.
        launch_s: host time to launch the smallest operation, results not waited for.
        measured: when, ISO time.
        probes: by name, how much a second of what kernels need and nothing general measures.
        fresh_bytes_per_s, fresh_large_bytes_per_s: of memory fresh from the system, written once,
            in small pages and in large ones; None where it was not measured.
        caches: smallest first, each with the rate of a copy inside it; none where calls find theirs
            overwritten, as on CUDA.
        disturbed: what kept the machine from its best; None where it was left to itself.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    launch_s: float
    measured: str = ""
    probes: dict[str, float] = field(default_factory=dict)
    matmul_kernels: dict[str, str] = field(default_factory=dict)
    fresh_bytes_per_s: float | None = None
    fresh_large_bytes_per_s: float | None = None
    caches: tuple[Cache, ...] = ()
    disturbed: str | None = None

    def least_seconds(self, moved: int, flop: int, dtype: str) -> dict[str, float]:
        """The time that copy and matmul allow for so many bytes and FLOP, by the limit's name."""
        allowed = {"copy": moved / self.copy_bytes_per_s}
        for cache in self.caches:
            if moved <= cache.bytes:
                allowed = {f"copy in {cache.name} cache": moved / cache.copy_bytes_per_s}
                break
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

    A limit is what the machine can do, so the fastest round counts, and not the median.

    Args:
        device: where.
        dtypes: names ("float32") of those whose products are wanted.
        probes: by name, calls that return how much they did; with them fresh pages are measured.
    """
    disturbed: list[str] = []

    def fastest(call: Callable[[], object]) -> float:
        timing = clock.measure(call, device, budget_s=_BUDGET_S, target=0.0)
        if timing.disturbed:
            timing = clock.measure(call, device, budget_s=_BUDGET_S, target=0.0)
        if timing.disturbed:
            disturbed.append(timing.disturbed)
        return min(timing.seconds)

    caches = machine.caches() if device.type == "cpu" else {}
    found = Limits(
        _copy_rate(_COPY_BYTES[device.type], device, fastest),
        {name: _matmul_rate(device, getattr(torch, name), fastest) for name in dtypes},
        _launch_seconds(device),
        datetime.now(UTC).isoformat(timespec="seconds"),
        matmul_kernels=_matmul_kernels(dtypes) if device.type == "cpu" else {},
        # Half of a cache is filled: it is shared with all that runs beside.
        caches=tuple(Cache(n, b, _copy_rate(b // 4, device, fastest)) for n, b in caches.items()),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it is for the cases, which another process may run
    if probes:
        found = replace(
            found,
            probes={name: probe() / fastest(probe) for name, probe in probes.items()},
            fresh_bytes_per_s=_fresh_rate(fastest, large_pages=False),
            fresh_large_bytes_per_s=_fresh_rate(fastest, large_pages=True),
        )
    return replace(found, disturbed=disturbed[0] if disturbed else None)


def _copy_rate(size: int, device: torch.device, fastest: Seconds) -> float:
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def _matmul_rate(device: torch.device, dtype: torch.dtype, fastest: Seconds) -> float:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        side = _MATMUL_SIDE[device.type]
        probe = _operands(_SHORT_SIDE, device, dtype)
        if clock.warm_up(lambda: probe[0] @ probe[1], device) > _LONGEST_PROBE_S:
            side = _SHORT_SIDE
        a, b = _operands(side, device, dtype)
        return 2 * side**3 / fastest(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _operands(
    side: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
    return a, b


def _matmul_kernels(dtypes: tuple[str, ...]) -> dict[str, str]:
    """As oneDNN's own log names them: whether there is a matrix unit does not say that it ran."""
    found = {}
    for name in dtypes:
        a, b = _operands(_SHORT_SIDE, torch.device("cpu"), getattr(torch, name))
        kernel = kernel_in(_logged(functools.partial(torch.matmul, a, b)))
        if kernel is not None:
            found[name] = kernel
    return found


def kernel_in(log: str) -> str | None:
    """The kernel of the last product in a log of oneDNN's."""
    kernels = re.findall(
        r"^onednn_verbose,.*\bexec,cpu,(?:matmul|inner_product),([^,]+)", log, re.M
    )
    return kernels[-1] if kernels else None


def _logged(call: Callable[[], object]) -> str:
    """What oneDNN writes to the process's standard output, which it alone can be told to use."""
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    output = os.dup(1)
    with tempfile.TemporaryFile() as log:
        try:
            os.dup2(log.fileno(), 1)
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                call()
            flush(None)
        finally:
            os.dup2(output, 1)
            os.close(output)
        log.seek(0)
        return log.read().decode("utf-8", "replace")


def _fresh_rate(fastest: Seconds, *, large_pages: bool) -> float:
    """Bytes a second of memory got from the system, as an allocator does for a large tensor."""

    def write() -> None:
        memory = mmap.mmap(-1, _FRESH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(memory, dtype=torch.float32).fill_(0.0)

    return _FRESH_BYTES / fastest(write)


def _launch_seconds(device: torch.device, launches: int = 200) -> float:
    """Of a launch, by the host's clock, in turns that nothing disturbed if there are any."""
    x = torch.zeros(1, device=device)
    watch, clean, all_of_them = Watch.of(device), list[float](), list[float]()
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        watch.begin()
        start = time.perf_counter()
        for _ in range(launches):
            x.zero_()
        all_of_them.append((time.perf_counter() - start) / launches)
        watch.look()
        if not watch.end():
            clean.append(all_of_them[-1])
    return min(clean or all_of_them)
