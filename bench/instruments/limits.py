"""What the machine can do at best: copy rate, matrix-product rate, the cost of a launch.

Measured, not looked up, by PyTorch's own copy and matmul. An operation's least traffic and least
work over these rates is the time it cannot be expected to beat; which of the two is longer says
what binds it. (It can be beaten: by data that stay in a cache, and by an algorithm that does less
than the least work as SPEC counts it, which is that of dense products.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from linear_vit.bench.instruments import clock
from linear_vit.bench.problems import Work

# Far past any last-level cache, in both directions.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
# float16 products without hardware for them are a thousand times slower than with it.
_SHORT_SIDE, _LONGEST_PROBE_S = 256, 5e-3
_BUDGET_S = 0.3


@dataclass(frozen=True)
class Limits:
    """Rates of one device.

    Attributes:
        copy_bytes_per_s: of a large copy; each byte counts twice, read and written.
        matmul_flop_per_s: by dtype name, of a large square product; float32 is IEEE.
        launch_s: host time to launch the smallest operation, results not waited for.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    launch_s: float

    def least_seconds(self, work: Work, dtype: str) -> dict[str, float]:
        """The time that each limit allows for, by the limit's name."""
        return {
            "copy": work.bytes / self.copy_bytes_per_s,
            f"{dtype} matmul": work.flop / self.matmul_flop_per_s[dtype],
        }

    def binding(self, work: Work, dtype: str) -> tuple[str, float]:
        """The limit that binds, and the seconds it asks for."""
        return max(self.least_seconds(work, dtype).items(), key=lambda item: item[1])


@cache
def measure(device: torch.device, dtypes: tuple[str, ...]) -> Limits:
    """Measure a device's limits, once a process; a second or two.

    Args:
        device: where.
        dtypes: names ("float32") of those whose products are wanted.
    """
    return Limits(
        _copy_rate(device),
        {name: _matmul_rate(device, getattr(torch, name)) for name in dtypes},
        _launch_seconds(device),
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
