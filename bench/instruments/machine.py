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
        "affinity": _affinity(),
        "cpu_quota": cpu_quota(),
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
    for line in read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process has: those it may run on, or as many as its cgroup's quota buys."""
    quota = cpu_quota()
    return _affinity() if quota is None else max(1, min(_affinity(), int(quota)))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the cgroup may have; None where it is not limited."""
    found = []
    for folder in cgroup_folders(root):
        both = read(folder / "cpu.max").split() or [
            read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if all(word.isdigit() for word in both):  # "max", or -1: no limit
            found.append(int(both[0]) / int(both[1]))
    return min(found, default=None)


def caches(root: Path = Path("/")) -> dict[str, int]:
    """Bytes of the CPU's L2 and L3 caches, of all of this process's cores together."""
    found: dict[str, dict[str, int]] = {}
    for core in sorted(os.sched_getaffinity(0)):
        for index in (root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            level, kind, size = (read(index / n).strip() for n in ("level", "type", "size"))
            if level in ("2", "3") and kind in ("Unified", "Data") and size[:-1].isdigit():
                unit = {"K": 2**10, "M": 2**20}[size[-1]]
                shared = read(index / "shared_cpu_list").strip()
                found.setdefault(f"L{level}", {})[shared] = int(size[:-1]) * unit
    return {name: sum(found[name].values()) for name in sorted(found)}


def cgroup_folders(root: Path = Path("/")) -> list[Path]:
    """The folders of this process's cgroup and of those above it: all of them limit it."""
    mounted = root / "sys/fs/cgroup"
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers in ("", "cpu", "cpu,cpuacct"):
            top = mounted / controllers
            here = top / inside.strip("/")
            return [path for path in (here, *here.parents) if path.is_relative_to(top)]
    return []


def read(path: Path) -> str:
    """A file's text; nothing of one that is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""


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
