"""What a file says of where it was measured: a label, and what keeps two from being compared."""

from collections.abc import Mapping
from typing import Any

from linear_vit.screen import counted

Facts = Mapping[str, Any]

# Where one of these differs, so does what was measured.
_FINGERPRINT = {
    "device": "kind of device",
    "device_name": "device",
    "cpu": "CPU",
    "cores": "cores",
    "threads": "threads",
    "cpu_capability": "instruction set",
    "driver": "driver",
    "cuda": "CUDA version",
    "compute_capability": "compute capability",
    "multiprocessors": "multiprocessors",
    "torch": "PyTorch",
}
# What environments of training runs name in another way, or older ones did.
_OF_OLD = {"device", "device_name", "cores"}


def label(facts: Facts) -> str:
    """One line that tells the machines of a report apart: device, threads, PyTorch.

    Machines of benchmarks and environments of training runs give the same line; the latter may have
    a GPU's name as ``device``.
    """
    if on_cpu(facts):
        memory = f", freed memory {facts['memory']}" if facts.get("memory") else ""
        return (
            f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, torch {facts['torch']}{memory}"
        )
    return f"{device(facts)}, torch {facts['torch']}"


def on_cpu(facts: Facts) -> bool:
    return bool(facts["device"] == "cpu")


def device(facts: Facts) -> str:
    """The name of what computed."""
    if on_cpu(facts):
        return str(facts["cpu"])
    return str(facts.get("device_name") or facts["device"])


def obstacles(before: Facts, after: Facts) -> list[str]:
    """Why times of two machines may not be compared; empty where they may."""
    return [
        f"{words}: {before.get(key)} against {after.get(key)}"
        for key, words in _FINGERPRINT.items()
        if before.get(key) != after.get(key)
    ]


def same(one: Facts, other: Facts) -> bool:
    """Whether two files are of one machine and one PyTorch, as far as both say.

    Of a benchmark's facts and a training run's environment, which may have been written by
    different versions: what only one of them says does not tell them apart.
    """
    both = (one.keys() & other.keys() & _FINGERPRINT.keys()) - _OF_OLD
    return label(one) == label(other) and all(one[key] == other[key] for key in both)
