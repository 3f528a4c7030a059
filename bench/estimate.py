"""What a case will need before it runs: memory from its tensors, time from the machine's limits."""

from pathlib import Path

import torch

from linear_vit.bench.problems import (
    FORWARD_BACKWARD,
    Shape,
    Work,
    least_work,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)

# The float64 reference works in chunks: what those take, and the profiler's and allocator's own.
_CHUNKS = 256 * 2**20
# A call takes this many times what the limits allow: a coarse middle of eager and own kernels.
_OVER_LIMIT = {"reference": 20.0, "torch": 5.0}
_OVER_LIMIT_ELSE = 3.0
_OVERHEAD_S = 0.25  # checking, profiling, warming up
_COMPILES_S = 8.0
# Of the memory that is free now, the share a case may ask for.
_SHARE = 0.9


def memory_bytes(operation: str, mode: str, backend: str, shape: Shape, element_size: int) -> int:
    """Bytes that checking and timing one case take at once, an upper bound but not a wild one.

    Counted are the problem's tensors and gradients, the float64 reference's inputs and results, and
    the working set of what is known to need one: φ in float32 for what is composed of PyTorch's
    operators, the N×M matrices for softmax attention that stores them.
    """
    tensors = least_work(operation_of(operation), FORWARD_BACKWARD, shape, 1).bytes
    total = tensors * element_size + 2 * tensors * 8 + _CHUNKS
    return total + operation_of(operation).working_set(mode, backend, shape)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_of_meminfo(), _of_cgroup()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def does_not_fit(need: int, available: int | None) -> str | None:
    """Why a case of this need is left out; None where it fits."""
    if available is None or need <= _SHARE * available:
        return None
    return f"it needs about {need / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def call_seconds(backend: str, least_s: float) -> float:
    """About how long one call takes that the limits allow ``least_s`` for."""
    return _OVER_LIMIT.get(backend, _OVER_LIMIT_ELSE) * least_s + 20e-6


def case_seconds(
    backend: str, call_s: float, work: Work, flop_per_s: float, budget_s: float
) -> float:
    """About how long a case takes: its check, its rounds, and once in a while a compilation."""
    rounds = min(budget_s, 60 * max(call_s, 1e-3))
    # The reference in float64, of eager operators, and both passes.
    check = 6 * work.flop / flop_per_s
    compiles = _COMPILES_S / 8 if backend == "compiled" else 0.0
    return _OVERHEAD_S + check + max(rounds, 4 * call_s) + compiles


def _of_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """A container's limit less what it uses."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = (root / "memory.current").read_text().strip()
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None
