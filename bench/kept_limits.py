"""A machine's limits, measured once a day and not once a run.

They are kept in the user's cache (``LINEAR_VIT_LIMITS`` names another folder), a file per state of
the machine: its CPU or GPU, cores, threads, governor and clock limits, driver and PyTorch. Another
state, a file of more than a day, a dtype it lacks, or one that is damaged: then they are measured
anew. A file says when each was measured, and so does the run that uses it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.instruments import limits, machine
from linear_vit.bench.instruments.limits import Limits

KEPT_FOR = timedelta(days=1)
_SCHEMA = 1
# Of bench.machine's facts those that say nothing of what the machine can do.
_NO_MATTER = ("git", "python", "triton", "system")
_CPU_STATE = {
    "governor": "cpu{}/cpufreq/scaling_governor",
    "highest_clock_khz": "cpu{}/cpufreq/scaling_max_freq",
    "boost": "cpufreq/boost",
    "no_turbo": "intel_pstate/no_turbo",
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Limits, ``measured`` when (UTC, ISO 8601; the oldest of them), and what there is to say."""

    limits: Limits
    measured: str
    remarks: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """What goes into a run's file."""
        return {**dataclasses.asdict(self.limits), "measured": self.measured}


def limits_of(device: torch.device, dtypes: Sequence[str], *, fresh: bool = False) -> Kept:
    """The limits of a device, as kept or measured now: a second or two.

    Args:
        device: where.
        dtypes: names ("float32") of those whose products are wanted.
        fresh: measure now, whatever is kept.
    """
    facts = state(device)
    path = folder() / f"{_name(facts)}.json"
    remarks: list[str] = []
    kept = None if fresh else _read(path, facts, remarks)
    if kept is not None and set(dtypes) <= set(kept.limits.matmul_flop_per_s):
        return kept
    known = set() if kept is None else set(kept.limits.matmul_flop_per_s)
    found = limits.measure(device, tuple(sorted(known | set(dtypes))))
    made = Kept(found, datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        _write(path, facts, made)
    except OSError as error:
        remarks.append(f"the limits are not kept: {path}: {error.strerror}")
    return dataclasses.replace(made, remarks=tuple(remarks))


def state(device: torch.device) -> dict[str, Any]:
    """What limits depend on. What the system does not tell is None."""
    facts = {k: v for k, v in machine.describe(device).items() if k not in _NO_MATTER}
    try:
        core = min(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        core = 0
    root = Path("/sys/devices/system/cpu")
    facts |= {name: _line(root / path.format(core)) for name, path in _CPU_STATE.items()}
    return facts | (_gpu_state(device) if device.type == "cuda" else {})


def folder() -> Path:
    named = os.environ.get("LINEAR_VIT_LIMITS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "linear-vit-kernels" / "limits"


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _gpu_state(device: torch.device) -> dict[str, Any]:
    """Clocks and power that the card is allowed; empty where NVML is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "card": uuid,
            "power_limit_mw": pynvml.nvmlDeviceGetEnforcedPowerLimit(card),
            "highest_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
            "clock_asked_for_mhz": pynvml.nvmlDeviceGetApplicationsClock(
                card, pynvml.NVML_CLOCK_SM
            ),
        }
    except Exception:  # NVML raises classes of its own, which need it to be named
        return {}


def _name(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, facts: dict[str, Any], remarks: list[str]) -> Kept | None:
    """What the file says; None, with a remark where that is a fault, where it does not hold."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            return None
        if content["state"] != facts:
            raise ValueError("of another machine")
        kept = Kept(Limits(**content["limits"]), content["measured"])
        age = datetime.now(UTC) - datetime.fromisoformat(kept.measured)
        rates = (*kept.limits.matmul_flop_per_s.values(), kept.limits.copy_bytes_per_s)
        if not all(0 < float(value) < float("inf") for value in (*rates, kept.limits.launch_s)):
            raise ValueError("a rate that is none")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = str(error).splitlines()[0] if str(error) else "no content"
        remarks.append(f"kept limits are damaged and measured anew: {path}: {what}")
        return None
    return kept if timedelta(0) <= age < KEPT_FOR else None


def _write(path: Path, facts: dict[str, Any], made: Kept) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": _SCHEMA,
        "state": facts,
        "measured": made.measured,
        "limits": dataclasses.asdict(made.limits),
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
