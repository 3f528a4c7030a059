"""What the machine did while rounds were timed: clocks, power, heat, and whether it throttled.

On CUDA NVML answers, on a CPU Linux does, each with what it has; what is not offered is None. A
reading is taken once a turn of rounds (see :mod:`bench.clock`), on CUDA while the device works:
afterwards it would be idle, and its clock with it.
"""

import os
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from linear_vit.bench.instruments import machine

# NVML's reasons for a clock below the one asked for (nvml.h, nvmlClocksEventReason*). The power cap
# is no fault: a card at its cap runs as fast as its owner lets it, and always will.
_THROTTLED = {
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
}
_POWER_CAP = {0x0000000000000004: "software power cap"}


@dataclass(frozen=True)
class Reading:
    """One look: values by name, and the reasons why times taken now would be those of a throttled
    machine (none: they may be kept). ``remarks`` are reasons that are no ground to drop them."""

    values: dict[str, float]
    throttled: tuple[str, ...] = ()
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
    """The readings of one measurement. ``source`` None: nobody to ask, and nothing is dropped."""

    source: Source | None
    readings: list[Reading] = field(default_factory=list)
    gave_up: bool = False

    def look(self) -> bool:
        """Take a reading; whether the rounds of this turn are a throttled machine's."""
        if self.source is None:
            return False
        reading = self.source.read()
        self.readings.append(reading)
        return bool(reading.throttled)

    def summary(self, dropped: int) -> dict[str, Any] | None:
        """What goes into the file: ``[least, median, greatest]`` of each value.

        Args:
            dropped: rounds of this case that were thrown away, since the machine throttled.
        """
        if self.source is None or not self.readings:
            return None
        seen = Counter(r for one in self.readings for r in (*one.throttled, *one.remarks))
        found: dict[str, Any] = {"source": self.source.name, "samples": len(self.readings)}
        for name in NAMES:
            values = [one.values[name] for one in self.readings if name in one.values]
            spread = [min(values), statistics.median(values), max(values)] if values else None
            found[name] = spread
        return found | {
            "throttle_reasons": sorted(seen),
            "throttled_rounds_dropped": dropped,
            "gave_up": self.gave_up,
        }


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
        self._nvml, self._handle = nvml, handle

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
        return Reading(values, _words(bits, _THROTTLED), _words(bits, _POWER_CAP))


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
        self._ticks = self._read_ticks()
        self._throttled = _numbers(self._throttles)

    def read(self) -> Reading:
        values: dict[str, float] = {}
        if clocks := _numbers(self._clocks):
            values["clock_mhz"] = statistics.median(clocks) / 1000
        if heat := _numbers(self._heat):
            values["temperature_c"] = max(heat) / 1000
        if loads := _text(self._load).split():
            values["load"] = float(loads[0])
        before, self._ticks = self._ticks, self._read_ticks()
        if before and self._ticks and (total := sum(self._ticks) - sum(before)) > 0:
            values["steal_share"] = (self._ticks[7] - before[7]) / total
        throttled, self._throttled = self._throttled, _numbers(self._throttles)
        hot = self._throttled > throttled
        return Reading(values, ("CPU package thermal throttling",) if hot else ())

    def _read_ticks(self) -> list[int]:
        """user nice system idle iowait irq softirq steal, of all cores."""
        first = _text(self._stat).partition("\n")[0].split()
        return [int(word) for word in first[1:9]] if len(first) >= 9 else []


def _words(bits: int, meaning: dict[int, str]) -> tuple[str, ...]:
    return tuple(words for bit, words in meaning.items() if bits & bit)


def _is_of_cpu(zone: Path) -> bool:
    kind = _text(zone / "type").strip().lower()
    return "cpu" in kind or "x86_pkg" in kind


def _numbers(paths: list[Path]) -> list[float]:
    texts = [_text(path).strip() for path in paths]
    return [float(text) for text in texts if text.lstrip("-").isdigit()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
