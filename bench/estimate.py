"""What a case will need before it runs: memory from its tensors, time from the machine's limits."""

from dataclasses import dataclass
from pathlib import Path

import torch

from linear_vit import kernels
from linear_vit.bench.instruments.limits import Limits
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD_BACKWARD,
    Case,
    case_name,
    least_work,
    operation,
)

# The float64 reference works in chunks: what those take, and the profiler's and allocator's own.
_CHUNKS = 256 * 2**20
# A call takes this many times what the limits allow: a coarse middle of eager and own kernels.
_OVER_LIMIT = {"oracle": 20.0, "eager": 5.0, "kernels": 3.0}
_OVERHEAD_S = 0.25  # checking, profiling, warming up
_COMPILES_S = 8.0
_ENERGY_S = 0.5  # of calls back to back
# Of the memory that is free now, the share a case may ask for.
_SHARE = 0.9


@dataclass(frozen=True)
class Plan:
    """How the cases of a run are measured.

    Attributes:
        device: where.
        budget_s: seconds to spend on the rounds of each case, at most.
        limits: of the machine; None leaves shares of limits out.
        sources: name of the code measured.
        profiles: folder for traces; None for none.
        energy: names of the cases whose joules a call are measured; None for all.
    """

    device: torch.device
    budget_s: float = 1.0
    limits: Limits | None = None
    sources: str | None = None
    profiles: Path | None = None
    energy: frozenset[str] | None = None

    def measures_energy(self, case: Case) -> bool:
        return self.energy is None or case_name(case) in self.energy


def memory_bytes(case: Case) -> int:
    """Bytes that checking and timing one case take at once, an upper bound but not a wild one.

    Counted are the problem's tensors and gradients, the float64 reference's inputs and results, and
    the working set of what is known to need one (see :meth:`Operation.working_set`).
    """
    of = operation(case.operation)
    tensors = least_work(of, FORWARD_BACKWARD, case.shape, 1).bytes
    element_size = DTYPES[case.dtype].itemsize if case.dtype in DTYPES else 4
    total = tensors * element_size + 2 * tensors * 8 + _CHUNKS
    return total + of.working_set(case.mode, case.backend, case.shape)


def does_not_fit(need: int, available: int | None) -> str | None:
    """Why a case of this need is left out; None where it fits."""
    if available is None or need <= _SHARE * available:
        return None
    return f"it needs about {need / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def seconds(case: Case, plan: Plan) -> float:
    """About how long a case takes: its check, its rounds, and once in a while a compilation."""
    of = operation(case.operation)
    budget = of.budget * plan.budget_s
    work = least_work(of, case.mode, case.shape, DTYPES.get(case.dtype, torch.float32).itemsize)
    if not of.has_reference or plan.limits is None:
        return _OVERHEAD_S + 2 * budget
    allowed = plan.limits.least_seconds(work.bytes, work.flop, case.dtype)
    row = kernels.backend_rows().get(case.backend)
    kind = "kernels" if row is None or not row.eager else "oracle" if row.oracle else "eager"
    call_s = _OVER_LIMIT[kind] * max(allowed.values()) + 20e-6
    rounds = min(budget, 60 * max(call_s, 1e-3))
    # The reference in float64, of eager operators, and both passes; and all of it once more.
    check = 12 * work.flop / plan.limits.matmul_flop_per_s.get(case.dtype, 1e11)
    compiles = _COMPILES_S / 8 if row is not None and row.compiles else 0.0
    energy = _ENERGY_S if plan.device.type == "cuda" and plan.measures_energy(case) else 0.0
    return _OVERHEAD_S + check + max(rounds, 4 * call_s) + compiles + energy
