"""Where a measurement was made: what a reader needs to judge whether two may be compared."""

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads, versions, the device with its driver, and the source's revision."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "git": git_revision(),
        "device": device.type,
        "device_name": cpu_model(),
        "driver": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device_name"] = properties.name
        facts["driver"] = _driver_version(device)
        facts["cuda"] = torch.version.cuda
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["device_memory"] = properties.total_memory
    return facts


@functools.cache
def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores this process may run on, which in a container is fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@functools.cache
def git_revision() -> str | None:
    """The checkout's commit, "-dirty" appended where tracked files differ; None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _driver_version(device: torch.device) -> str | None:
    """The NVIDIA driver's version from NVML; None where NVML is missing."""
    try:
        return str(nvml(device)[0].nvmlSystemGetDriverVersion())
    except Exception:  # NVML raises classes of its own, which need it to be named
        return None


def nvml(device: torch.device) -> tuple[Any, Any]:
    """The module pynvml, and its handle of a CUDA device; raises what that raises."""
    import pynvml

    pynvml.nvmlInit()
    identity = torch.cuda.get_device_properties(device).uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
