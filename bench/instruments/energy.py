"""The energy that a call takes, by the GPU's own counter."""

import time
from collections.abc import Callable

import torch

from linear_vit.bench.instruments import machine
from linear_vit.screen import counted

_LEAST_S = 0.5  # of calls back to back: the counter is refreshed a few dozen times a second


def per_call(
    call: Callable[[], object], device: torch.device, estimate_s: float
) -> tuple[float | None, str]:
    """Joules a call takes of the whole board, and how that was measured; None where it can't be.

    Args:
        call: run back to back for half a second, or once if it takes longer.
        device: where it runs; only a CUDA device has a counter.
        estimate_s: seconds of one call.
    """
    if device.type != "cuda":
        return None, f"not measured on {device.type}"
    try:
        pynvml, handle = machine.nvml(device)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # NVML raises classes of its own, which need it to be named
        return None, f"not measured: NVML says {type(error).__name__}: {error}"
    calls = max(1, round(_LEAST_S / max(estimate_s, 1e-6)))
    torch.cuda.synchronize(device)
    started, before = time.perf_counter(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    for _ in range(calls):
        call()
    torch.cuda.synchronize(device)
    spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before
    seconds = time.perf_counter() - started
    return (
        spent * 1e-3 / calls,
        f"NVML board energy over {counted(calls, 'call')} in {seconds:.2f} s",
    )
