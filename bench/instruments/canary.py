"""Two small operations whose time is known: they are slow where the machine is.

The kernel accounts for a core that another process has. It does not see a neighbour on the memory
bus or on the other half of a core, nor a hypervisor that keeps its counters to itself.
"""

import bisect
import time
from collections.abc import Callable

import torch

from linear_vit.bench.instruments import machine, memory

ARITHMETIC, MEMORY = "slow arithmetic", "slow memory"
_LEAST_S = 40e-6  # shorter operations are all overhead
_BEST_OF = 3
_READINGS = 20  # before it judges
_MOST = 1.3  # times the usual reading, which a quarter are faster than
# So short operations jitter by half of their time on a machine that nobody else uses, but not often
# in a row. Who really slows the machine does so for longer than these readings take.
_IN_A_ROW = 4
# Each reading goes on where the last one ended, so it is of no core's own cache.
_LEAST_MEMORY = 2**26


class Canary:
    """Reads how long the operations take, and tells a reading that is slow for this process."""

    def __init__(self, read: Callable[[], dict[str, float]] | None = None) -> None:
        """``read``: seconds of each operation by name; by default those of this CPU."""
        self._read = read or _Operations().read
        self._fastest_first: dict[str, list[float]] = {}
        for _ in range(_READINGS):
            self.slow()

    def slow(self) -> list[str]:
        """Names of the operations that are slow now, in several readings one after another."""
        found = self._slow_once()
        for _ in range(_IN_A_ROW - 1):
            if not found:
                break
            again = self._slow_once()
            found = [name for name in found if name in again]
        return found

    def _slow_once(self) -> list[str]:
        found = []
        for name, seconds in self._read().items():
            known = self._fastest_first.setdefault(name, [])
            bisect.insort(known, seconds)
            if seconds > _MOST * known[len(known) // 4]:
                found.append(name)
        return found


class _Operations:
    """A matrix product and a sum over fresh memory, each on all of PyTorch's threads."""

    def __init__(self) -> None:
        # Twice what the last-level cache holds, if that is a small part of the memory.
        free = memory.available_bytes(torch.device("cpu")) or 0
        wanted = min(2 * max(machine.caches().values(), default=0), free // 16)
        count = max(_LEAST_MEMORY, wanted) // torch.float32.itemsize
        self._memory, self._next, self._window = torch.ones(count), 0, 2**16
        while self._window < count // 8 and _best(self._sum) < _LEAST_S:
            self._window *= 2
        side = 64
        while True:
            self._a, self._product = torch.ones(side, side), torch.empty(side, side)
            if side >= 512 or _best(self._multiply) >= _LEAST_S:
                break
            side += side // 2

    def read(self) -> dict[str, float]:
        return {ARITHMETIC: _best(self._multiply), MEMORY: _best(self._sum)}

    def _multiply(self) -> None:
        torch.mm(self._a, self._a, out=self._product)

    def _sum(self) -> None:
        start = self._next if self._next + self._window <= len(self._memory) else 0
        self._next = start + self._window
        self._memory[start : self._next].sum()


def _best(operation: Callable[[], None]) -> float:
    times = []
    for _ in range(_BEST_OF):
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    return min(times)
