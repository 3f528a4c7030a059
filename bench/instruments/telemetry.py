"""What the machine did while rounds were timed, and whether a turn of them was disturbed.

On CUDA NVML answers, on a CPU Linux does, each with what it has; what is not offered is None. A
reading is taken once a turn of rounds (see :mod:`bench.clock`), on CUDA while the device works:
afterwards it would be idle, and its clock with it. Around a turn the host's accounts are read and,
on a CPU, the canary.
"""

import functools
import os
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from linear_vit.bench.instruments import machine
from linear_vit.bench.instruments.canary import Canary
from linear_vit.bench.instruments.host import Host, Sample, disturbances, ticks_of
from linear_vit.bench.instruments.machine import read
from linear_vit.screen import counted

# NVML's reasons for a clock below the one asked for (nvml.h, nvmlClocksEventReason*). The power cap
# is no fault: a card at its cap runs as fast as its owner lets it, and always will.
_THROTTLED = {
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}
_POWER_CAP = {0x0000000000000004: "software power cap"}
OTHERS = "another process on the GPU"


@dataclass(frozen=True)
class Reading:
    """One look: values by name, and the reasons why times taken now would be those of a disturbed
    machine (none: they may be kept). ``remarks`` are reasons that are no ground to drop them."""

    values: dict[str, float]
    disturbed: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Source(Protocol):
    """Where readings come from."""

    name: str

    def read(self) -> Reading: ...


NAMES = (
    "clock_mhz",
    "memory_clock_mhz",
    "power_w",
    "temperature_c",
    "load",
    "steal_share",
)


@dataclass
class Watch:
    """What is looked at around each turn of one measurement; by default nothing is.

    Attributes:
        source: of telemetry; None: nobody to ask.
        host: of the accounts of this process's threads.
        canary: operations that are slow where the machine is.
        turns, dropped: how many there were, and how many of them were disturbed.
        reasons: how many turns each of them disturbed.
    """

    source: Source | None = None
    host: Host | None = None
    canary: Canary | None = None
    readings: list[Reading] = field(default_factory=list)
    turns: int = 0
    dropped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    _slow: list[str] | None = None
    _before: Sample | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Watch":
        """Everything that there is to look at for times taken on a device."""
        linux = Path("/proc/self/task").exists()
        canary = _canary(torch.get_num_threads()) if device.type == "cpu" else None
        return cls(source_for(device), Host() if linux else None, canary)

    def begin(self) -> None:
        """A turn is about to begin."""
        if self.canary is not None and self._slow != []:  # else that of the turn before holds
            self._slow = self.canary.slow()
        if self.host is not None:
            self._before = self.host.sample()

    def look(self) -> None:
        """The turn is under way, on CUDA: the device is at work."""
        if self.source is not None:
            self.readings.append(self.source.read())

    def end(self) -> bool:
        """The turn is over; whether something disturbed it, so that it has to be taken again."""
        found = list(self._slow or ())
        if self.host is not None and self._before is not None:
            after = self.host.sample()
            more, remarks = disturbances(self._before, after, self.host.cores)
            found += more
            self.remarks.update(remarks)
        if self.canary is not None:
            self._slow = self.canary.slow()
            found += self._slow
        if self.source is not None:
            found += self.readings[-1].disturbed
            self.remarks.update(self.readings[-1].remarks)
        self.turns += 1
        self.dropped += bool(found)
        self.reasons.update(set(found))
        return bool(found)

    def sentence(self) -> str:
        """What disturbed the turns, in words."""
        told = ", ".join(f"{what} ({n})" for what, n in self.reasons.most_common())
        return f"{self.dropped} of {counted(self.turns, 'turn')} disturbed: {told}"

    def summary(self, dropped: int, *, gave_up: bool = False) -> dict[str, Any]:
        """What goes into the file: ``[least, median, greatest]`` of each value.

        Args:
            dropped: rounds of this case that were thrown away.
            gave_up: whether there are fewer than wanted, since too many turns were disturbed.
        """
        found: dict[str, Any] = {"source": self.source.name if self.source else None}
        for name in NAMES:
            values = [one.values[name] for one in self.readings if name in one.values]
            spread = [min(values), statistics.median(values), max(values)] if values else None
            found[name] = spread
        return found | {
            "samples": len(self.readings),
            "throttle_reasons": sorted({*self.reasons, *self.remarks}),
            "throttled_rounds_dropped": dropped,
            "gave_up": gave_up,
            "turns": self.turns,
            "turns_dropped": self.dropped,
            "disturbances": dict(self.reasons),
        }


@functools.cache
def _canary(threads: int) -> Canary:
    """One for all measurements on so many threads: what is slow is told by what was seen before."""
    return Canary()


def source_for(device: torch.device) -> Source | None:
    """Who to ask about a device: NVML or Linux; None where neither answers."""
    if device.type == "cuda":
        try:
            return Nvml(*machine.nvml(device))
        except Exception:  # NVML raises classes of its own, which need it to be named
            return None
    return Linux() if Path("/proc/stat").exists() else None


class Nvml:
    """An NVIDIA GPU by its management library."""

    name = "NVML"

    def __init__(self, nvml: Any, handle: Any) -> None:
        """``nvml``: the module pynvml, or one like it; ``handle``: its own of the GPU."""
        self._nvml, self._handle, self._seen, self._busy = nvml, handle, 0, False
        self._others()  # what there was before

    def read(self) -> Reading:
        n, handle = self._nvml, self._handle
        queries = {
            "clock_mhz": lambda: n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_MEM),
            "power_w": lambda: n.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU),
        }
        values = {}
        for name, query in queries.items():
            try:
                values[name] = float(query())
            except n.NVMLError:  # this card does not have it; the others still count
                continue
        try:
            bits = n.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        except n.NVMLError:
            bits = 0
        others = (OTHERS,) if self._others() else ()
        return Reading(values, (*_words(bits, _THROTTLED), *others), _words(bits, _POWER_CAP))

    def _others(self) -> bool:
        """Whether a process that is none of ours used the GPU when NVML last looked.

        It looks a few times a second: until it has looked again, what it saw stands.
        """
        n = self._nvml
        try:
            samples = n.nvmlDeviceGetProcessUtilization(self._handle, self._seen)
        except n.NVMLError:  # it has not looked since, or this card does not tell
            return self._busy
        self._seen = max((one.timeStamp for one in samples), default=self._seen)
        used, ours = {one.pid for one in samples if one.smUtil}, {os.getpid(), os.getppid()}
        # A container may number processes otherwise than NVML: then none of them is ours.
        self._busy = bool(used & ours and used - ours)
        return self._busy


class Linux:
    """A CPU by /proc and /sys. A virtual machine shows little of it; its steal time it does."""

    name = "Linux"

    def __init__(self, root: Path = Path("/")) -> None:
        """``root``: where proc and sys are, for tests."""
        cores = sorted(os.sched_getaffinity(0))
        cpu = root / "sys/devices/system/cpu"
        self._stat = root / "proc/stat"
        self._load = root / "proc/loadavg"
        self._clocks = [cpu / f"cpu{i}/cpufreq/scaling_cur_freq" for i in cores[:4]]
        self._throttles = [cpu / f"cpu{i}/thermal_throttle/package_throttle_count" for i in cores]
        # Files that are not there now will not be there at the next reading.
        self._clocks = [path for path in self._clocks if path.exists()]
        self._throttles = [path for path in self._throttles if path.exists()][:1]
        zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
        self._heat = [zone / "temp" for zone in zones if _is_of_cpu(zone)]
        self._ticks = ticks_of(self._stat)
        self._throttled = _numbers(self._throttles)

    def read(self) -> Reading:
        values: dict[str, float] = {}
        if clocks := _numbers(self._clocks):
            values["clock_mhz"] = statistics.median(clocks) / 1000
        if heat := _numbers(self._heat):
            values["temperature_c"] = max(heat) / 1000
        if loads := read(self._load).split():
            values["load"] = float(loads[0])
        before, self._ticks = self._ticks, ticks_of(self._stat)
        if before and self._ticks and (total := sum(self._ticks) - sum(before)) > 0:
            values["steal_share"] = (self._ticks[7] - before[7]) / total
        throttled, self._throttled = self._throttled, _numbers(self._throttles)
        hot = self._throttled > throttled
        return Reading(values, ("CPU package thermal throttling",) if hot else ())


def _words(bits: int, meaning: dict[int, str]) -> tuple[str, ...]:
    return tuple(words for bit, words in meaning.items() if bits & bit)


def _is_of_cpu(zone: Path) -> bool:
    kind = read(zone / "type").strip().lower()
    return "cpu" in kind or "x86_pkg" in kind


def _numbers(paths: list[Path]) -> list[float]:
    texts = [read(path).strip() for path in paths]
    return [float(text) for text in texts if text.lstrip("-").isdigit()]
