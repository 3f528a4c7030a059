"""``--profile``: a trace of each case, its top kernels, and Nsight Compute's counters.

The trace opens in https://ui.perfetto.dev and in chrome://tracing. It is of calls of its own, after
those that are timed: a profiler slows what it watches.
"""

import csv
import gzip
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

_CALLS = 3
_TOP = 10
# What says where a kernel's time went, by Nsight Compute's names.
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
NCU_LIMIT_S = 300


def write(
    call: Callable[[], object],
    device: torch.device,
    folder: Path,
    name: str,
    child: Sequence[str] = (),
) -> dict[str, Any]:
    """Trace a few calls; what goes into the case's ``profile`` field.

    Args:
        call: one pass, warmed up.
        device: where it runs.
        folder: where ``{name}.trace.json.gz`` goes; its parent is what the path is relative to.
        name: the case's.
        child: command of a process that makes the call once, between the marks that ncu waits for.
    """
    profile = trace(call, device, calls=_CALLS, record_shapes=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', name)}.trace.json"
    profile.export_chrome_trace(str(path))
    packed = path.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    counters, why = None, "no CUDA device" if device.type != "cuda" else "no process for ncu"
    if device.type == "cuda" and child:
        counters, why = _ncu(child)
    return {
        "trace": str(packed.relative_to(folder.parent)),
        "top": top(profile, device),
        "ncu": counters,
        "ncu_why": why,
    }


def trace(
    call: Callable[[], object], device: torch.device, *, calls: int = 1, record_shapes: bool = False
) -> profiler.profile:
    """What PyTorch's profiler records of these calls, on the host and on the device."""
    # What torch.profiler.profile wraps: entering the wrapper imports all of torch.compile.
    on = "cuda" if device.type == "cuda" else None
    with profiler.profile(use_device=on, use_kineto=True, record_shapes=record_shapes) as profile:
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profile


def top(profile: profiler.profile, device: torch.device) -> list[dict[str, Any]]:
    """The names with the most time of their own, and their share of all: kernels, or operators."""
    of_device = device.type == "cuda"
    rows = []
    for event in profile.key_averages():
        if of_device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if of_device else event.self_cpu_time_total
        if spent > 0:
            rows.append({"name": event.key, "calls": event.count, "total_us": float(spent)})
    whole = sum(row["total_us"] for row in rows) or 1.0
    rows.sort(key=lambda row: -row["total_us"])
    return [{**row, "share": row["total_us"] / whole} for row in rows[:_TOP]]


def _ncu(child: Sequence[str]) -> tuple[dict[str, dict[str, float]] | None, str]:
    """Counters per kernel of one call, in a process of its own that ncu can hold."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return None, "ncu is not installed (it comes with Nsight Compute)"
    # Else ncu picks a unit for each value, and the values alone would not say which.
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--metrics", ",".join(COUNTERS)]
    command += ["--profile-from-start", "off", *child]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=NCU_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"ncu: {type(error).__name__}: {error}"
    found = read_ncu(done.stdout)
    if not found:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        refused = [line for line in said if "==ERROR==" in line] or said[-1:] or ["nothing"]
        return None, f"ncu ended with {done.returncode}: {refused[0]}"
    return found, ""


def read_ncu(text: str) -> dict[str, dict[str, float]]:
    """Kernel -> counter -> value of ncu's raw CSV page, whose second line holds the units."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if not row["ID"]:  # the line of units
            continue
        values = {}
        for counter in COUNTERS:
            try:
                values[counter] = float((row.get(counter) or "").replace(",", ""))
            except ValueError:
                continue
        found[row["Kernel Name"]] = values
    return found
