"""What a machine can run, and if not, why not: a probe per kind of backend.

A probe answers None (usable) or why not, in one line with the remedy, for a device. It imports and
compiles nothing that it doesn't have to.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

INTERPRETER = "TRITON_INTERPRET"  # the environment variable that has Triton interpret its kernels


def switched_on(variable: str | None) -> bool:
    """Whether an environment variable says yes, as Triton reads its own; False for None."""
    if variable is None:
        return False
    return os.environ.get(variable, "0").lower() in ("1", "true", "on", "y", "yes")


def anywhere(device: torch.device) -> None:
    """PyTorch alone: whatever device the tensors are on, they are there."""


def compiler(device: torch.device) -> str | None:
    """What torch.compile needs: Triton on a GPU, elsewhere a C++ compiler."""
    return triton(device) if device.type == "cuda" else _no_cpp_compiler()


def triton(device: torch.device) -> str | None:
    """Triton compiles for GPUs, and interprets on any device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if switched_on(INTERPRETER):
        return _triton_broken() or _interpreter_unusable()
    if device.type != "cuda":
        return (
            f"Triton compiles for GPUs, not for {device.type}: use a CUDA device, or set "
            "TRITON_INTERPRET=1 before Python starts to check the kernels on CPU tensors"
        )
    return _no_cuda_device() or _triton_broken()


def cuda(device: torch.device) -> str | None:
    """The CUDA sources, which are built for the device at first use."""
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device.type}"
    return _no_cuda_device() or _extension("cuda", device)


def cpu(device: torch.device) -> str | None:
    """The C++ sources, which are built at first use."""
    if device.type != "cpu":
        return f"C++ kernels run on the CPU, not on {device.type}: use a CPU tensor"
    return _extension("cpu", device)


def _extension(backend: str, device: torch.device) -> str | None:
    from linear_vit.kernels import build  # not for an import of kernels to load

    return build.unavailable(backend, device)


@functools.cache
def _no_cpp_compiler() -> str | None:
    words = os.environ.get("CXX", "g++").split()  # as Inductor asks for it
    if not words:
        return "torch.compile takes its C++ compiler from CXX, which is set to nothing: unset CXX"
    if shutil.which(words[0]) is None:
        return (
            f"torch.compile needs a C++ compiler, no {words[0]}: install g++ (Debian: apt-get "
            "install g++)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"torch.compile needs Python's headers: install them (apt: python{version}-dev)"
    return None


@functools.cache
def _triton_broken() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install raises what it likes
        return f"Triton does not import ({type(error).__name__}: {error}): reinstall triton"
    return None


@functools.cache
def _interpreter_unusable() -> str | None:
    """Triton 3.6's interpreter turns a size-1 array into an int, which NumPy 2.4 refuses."""
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        found = f"Triton {importlib.metadata.version('triton')}"
        return f"the interpreter of {found} needs numpy<2.4: pip install 'numpy<2.4'"
    return None


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def _no_cuda_device() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build and use a CUDA device"
    return "no CUDA device here (torch.cuda.is_available() is False): run on a machine with one"
