"""A second clock on CUDA: what the device's own profiler (CUPTI) says of calls timed by events.

Events see all that is between them, CUPTI only the kernels. So events are expected to show a little
more: a few microseconds of a call, and the gaps between its kernels.
"""

import statistics
import zlib
from collections.abc import Callable
from typing import Any

import torch

from linear_vit.bench.instruments import clock, profiles

_CALLS = 5
_ONE_IN = 8


def is_in_sample(name: str) -> bool:
    """Whether a case, by its name, is in the sample: one in eight, the same ones in every run."""
    return zlib.crc32(name.encode()) % _ONE_IN == 0


def compare(
    name: str, call: Callable[[], object], device: torch.device, median_s: float
) -> dict[str, Any] | None:
    """The call by both clocks; None for cases not in the sample and devices without a second one.

    Args:
        name: the case's.
        call: one pass, warmed up. Before each of its calls the L2 cache is overwritten.
        device: where it runs.
        median_s: what events said.

    Returns:
        ``seconds`` (the median of a few calls, each the sum of its kernels' times), ``difference``
        of events from it, as a share of it, and ``clock``.
    """
    if device.type != "cuda" or not is_in_sample(name):
        return None
    flush = clock.flush_of(device)
    sums = []
    for _ in range(_CALLS):
        flush()
        torch.cuda.synchronize(device)
        events = profiles.trace(call, device).function_events or []
        sums.append(
            1e-6
            * sum(
                event.time_range.elapsed_us()
                for event in events
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
        )
    seconds = statistics.median(sums)
    if seconds <= 0:
        return None
    return {
        "seconds": seconds,
        "difference": median_s / seconds - 1,
        "clock": f"CUPTI (PyTorch's profiler), kernels of a call, median of {_CALLS}",
    }
