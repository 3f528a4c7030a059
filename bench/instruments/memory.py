"""Peak memory of a call beyond its inputs and outputs, measured outside the timing."""

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import profiler

from linear_vit.bench.instruments.machine import read

# The profiler's library talks on stderr about every session unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_ERROR = 2  # of c10's levels


def peak_beyond_outputs(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[int | None, str]:
    """Bytes allocated at the worst moment of one call, less the bytes of what it returns.

    Counts what PyTorch's allocators hand out: on CUDA ``max_memory_allocated``, on a CPU the
    running sum of the profiler's allocation events. Scratch that a library takes from the system by
    itself (BLAS packing buffers) is not seen.

    Returns:
        The bytes, or None where they cannot be measured, and how they were.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        outputs = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(0, peak - _bytes(outputs)), "torch.cuda.max_memory_allocated"
    if device.type != "cpu":
        return None, f"not measured on {device.type}"

    with _without_remarks(), profiler.profile(use_kineto=True, profile_memory=True) as profile:
        outputs = call()
    kineto = profile.kineto_results
    if kineto is None:
        return None, "not measured: this PyTorch is built without Kineto"
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in kineto.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return max(0, peak - _bytes(outputs)), "torch.profiler allocation events"


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [value for value in (_of_meminfo(), _of_cgroup()) if value is not None]
    return min(known, default=None)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """PyTorch's C++ code logs errors alone meanwhile.

    It would remark that memory which is older than the profile is freed in it.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
        level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # a build of another kind remarks
        yield
        return
    before, level.value = level.value, max(level.value, _ERROR)
    try:
        yield
    finally:
        level.value = before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator raises a plain RuntimeError, and a CUDA launch reports the driver's words.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: " in text or "CUDA error: out of memory" in text
    )


def _of_meminfo() -> int | None:
    found = re.search(r"MemAvailable:\s*(\d+) kB", read(Path("/proc/meminfo")))
    return int(found[1]) * 1024 if found else None


def _of_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """A container's limit less what it uses."""
    limit, used = (read(root / f"memory.{name}").strip() for name in ("max", "current"))
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else None


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, as the allocators that are recommended for PyTorch do.

    Otherwise glibc gives every block of more than 32 MB back to the system, which clears its pages
    anew for the next one: a share of the time that has nothing to do with the kernels, and is
    the larger the more intermediate tensors an implementation makes.

    Raises:
        ValueError: malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    never_map, never_trim = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if mallopt is None or not (mallopt(*never_map) and mallopt(*never_trim)):
        raise ValueError("--keep-memory sets glibc's malloc, which this process does not use")
