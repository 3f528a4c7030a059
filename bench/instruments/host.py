"""What a turn's threads had of the machine: waits for a core, stolen time, the cgroup's quota.

Spread can't see a neighbour: rounds may agree with one another and all be too long. The kernel's
own accounts do: how long each thread of ours was ready to run and had no core
(``/proc/self/task/*/schedstat``).
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from linear_vit.bench.instruments import machine
from linear_vit.screen import counted

WAITED = "waiting for a core"
STOLEN = "time stolen by the hypervisor"
QUOTA = "the cgroup's quota of CPU time"
# Of a turn's time: what a median that is known to 2 % may lose.
_MOST_WAITED = 0.02
# A thread that ran for this share of a turn takes part in it; others only look in.
_TAKES_PART = 0.1
_MOST_STOLEN = 0.02
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # that /proc/stat counts in


@dataclass(frozen=True)
class Sample:
    """Accounts at one moment, in seconds.

    Attributes:
        at: of a clock that only runs forward.
        ran, waited: of each thread of this process, by its number.
        stolen: of our cores together.
        stopped: by a cgroup's quota.
    """

    at: float
    ran: Mapping[int, float]
    waited: Mapping[int, float]
    stolen: float = 0.0
    stopped: float = 0.0


def disturbances(before: Sample, after: Sample, cores: int) -> tuple[list[str], list[str]]:
    """What disturbed the time between two samples, and remarks that are no ground to drop it.

    Threads that are more than the cores wait for one another: that is how the call runs.
    """
    took = max(after.at - before.at, 1e-9)
    # The others wait for the slowest.
    waited = max((s - before.waited.get(t, 0.0) for t, s in after.waited.items()), default=0.0)
    running = [s - before.ran.get(thread, 0.0) for thread, s in after.ran.items()]
    taking_part = sum(s > _TAKES_PART * took for s in running)
    found, remarks = [], []
    if waited > _MOST_WAITED * took:
        if taking_part > cores:
            threads = counted(taking_part, "thread")
            remarks.append(f"{threads} of this process on {counted(cores, 'core')}")
        else:
            found.append(WAITED)
    stolen = after.stolen - before.stolen
    # Of one tick, or of none, it can't be told when it began.
    if stolen > _MOST_STOLEN * took * cores and stolen > 1.5 * TICK_S:
        found.append(STOLEN)
    if after.stopped > before.stopped:
        found.append(QUOTA)
    return found, remarks


class Host:
    """The accounts of this process's threads and of its machine, by Linux."""

    def __init__(self, root: Path = Path("/")) -> None:
        """``root``: where proc and sys are, for tests."""
        self.cores = machine.available_cores()
        self._threads = root / "proc/self/task"
        self._stat, self._ours = root / "proc/stat", sorted(os.sched_getaffinity(0))
        folders = machine.cgroup_folders(root)
        self._quotas = [path / "cpu.stat" for path in folders if (path / "cpu.stat").exists()]

    def sample(self) -> Sample:
        ran, waited = {}, {}
        for thread in os.listdir(self._threads):
            # It may have ended since.
            words = machine.read(self._threads / thread / "schedstat").split()
            if len(words) >= 2:
                ran[int(thread)], waited[int(thread)] = (int(word) * 1e-9 for word in words[:2])
        stolen = sum(ticks_of(self._stat, f"cpu{core}")[7] for core in self._ours) * TICK_S
        return Sample(time.perf_counter(), ran, waited, stolen, self._stopped())

    def _stopped(self) -> float:
        total = 0.0
        for path in self._quotas:
            words = machine.read(path).split()
            told = dict(zip(words[::2], map(int, words[1::2]), strict=False))
            total += told.get("throttled_usec", 0) * 1e-6 + told.get("throttled_time", 0) * 1e-9
        return total


def ticks_of(stat: Path, core: str = "cpu") -> list[int]:
    """user nice system idle iowait irq softirq steal, of one core or all; zeros where none says."""
    lines = (line.split() for line in machine.read(stat).splitlines())
    words = next((words for words in lines if words[:1] == [core] and len(words) >= 9), ["0"] * 9)
    return [int(word) for word in words[1:9]]
