"""Which backend can run what here, and if not, why not.

An operation is a room (a package of ``kernels``), a backend a file in it of the backend's name that
defines the operation's functions. Adding a backend is that file per operation and one line in
``_PROBES`` below; nothing else asks which backends there are.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linear_vit.kernels.layout import without_autocast

# Operation -> the room (sub-package) its backends live in.
_ROOMS = {
    "linear_attention": "linear_attention",
    "linear_attention_packed": "linear_attention",
    "linear_attention_state": "linear_attention",
    "linear_attention_apply": "linear_attention",
    "softmax_attention": "softmax_attention",
    "softmax_attention_packed": "softmax_attention",
    "ripple_pool": "ripple",
    "ripple_expand": "ripple",
    "ripple_pool_stages": "ripple",
    "ripple_expand_stages": "ripple",
}
OPERATIONS = tuple(_ROOMS)

# Head dims that the kernels are written for. 192 (two hydra branches at dim 384) would hold
# 2·192² float32 accumulators, more than a multiprocessor's register file.
HEAD_DIMS = (16, 32, 48, 64, 96, 128)
# The C++ kernels take any up to this: a head's state, 2·D² floats, should fit the L2 cache.
MOST_CPU_HEAD_DIM = 256

# A probe answers None (usable) or why not, with the remedy, for (device, interpreted or not).
_Probe = Callable[[torch.device], str | None]


def backends(
    op: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> dict[str, str | None]:
    """Every backend of an operation, and why it can't be used here where it can't.

    Args:
        op: an operation's name, one of ``kernels.OPERATIONS``.
        device: where the tensors are.
        dtype: the inputs' dtype; None asks about any of float32, float16, bfloat16.
        head_dim: the inputs' head dim (attention operations); None asks about any supported one.

    Returns:
        Backend name -> None where it is usable, else the reason and the remedy in one line.

    Raises:
        ValueError: an unknown operation; the message lists those there are.
    """
    if op not in _ROOMS:
        raise ValueError(f"unknown operation {op!r}: there are {', '.join(OPERATIONS)}")
    device = torch.device(device)
    return {name: _reason(name, op, device, dtype, head_dim) for name in BACKENDS}


def default_backend(
    op: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """The backend that ``backend=None`` takes: the first usable one in order of speed."""
    device = torch.device(device)
    usable = backends(op, device, dtype=dtype, head_dim=head_dim)
    for name in _preference(op, device.type):
        if usable[name] is None and is_timeable(name, device):
            return name
    raise ValueError(f"no backend can run {op} on {device}: {_list(usable)}")


def is_timeable(backend: str, device: torch.device | str) -> bool:
    """Whether timing the backend says anything: not where Triton runs in its interpreter."""
    del device  # the interpreter takes over on every device
    return not (backend == "triton" and _interpreting())


def implementation(op: str, backend: str, *arguments: Any) -> str:
    """What runs for these arguments, in one line: for SDPA, the kernel PyTorch picks.

    Args:
        op, backend: names, as for :func:`backends`.
        arguments: the tensors the operation would be called with.
    """
    module = _module(op, backend)
    describe = getattr(module, "implementation", None)
    return describe(op, *arguments) if describe else f"{backend}: kernels.{_ROOMS[op]}.{backend}"


def run(op: str, backend: str | None, *arguments: Any) -> Any:
    """Run an operation whose arguments have been validated, on the chosen backend.

    Raises:
        ValueError: the backend is unknown, or can't run this; the message lists the others.
        TypeError: ``backend`` is neither a string nor None.
    """
    first = arguments[0]
    head_dim = first.shape[-1] if _ROOMS[op] != "ripple" else None
    chosen = _resolve(op, backend, str(first.device), first.dtype, head_dim)
    with without_autocast(first.device.type):
        return getattr(_functions, chosen)(*arguments)


class _Functions:
    """Attribute ``<op>__<backend>``: the function that runs it, once it has been chosen.

    Attributes and not a dict, because torch.compile reads them anew: of a dict it keeps the copy
    it saw first, which lacks what a later call of the same graph loads.
    """


_functions = _Functions()


def _resolve(
    op: str, backend: str | None, device: str, dtype: torch.dtype, head_dim: int | None
) -> str:
    """The name in ``_functions`` of the function to run, which is loaded by then."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {type(backend).__name__}")
    return _choose(op, backend, torch.device(device), dtype, head_dim, _interpreting())


# torch.compile takes the choice as a constant of the graph. This is what
# torch.compiler.assume_constant_result sets; calling that would import Dynamo, and with it Triton.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    interpreting: bool,
) -> str:
    del interpreting  # part of the key: TRITON_INTERPRET changes what is usable
    usable = backends(op, device, dtype=dtype, head_dim=head_dim)
    if backend is None:
        candidates = [
            name
            for name in _preference(op, device.type)
            if usable[name] is None and is_timeable(name, device)
        ]
    elif backend not in usable:
        raise ValueError(f"unknown backend {backend!r} for {op}: there are {_list(usable)}")
    else:
        candidates = [backend] if usable[backend] is None else []
    for name in candidates:
        try:
            setattr(_functions, f"{op}__{name}", getattr(_module(op, name), op))
        except RuntimeError as error:  # its extension does not build: the reason from now on
            usable[name] = str(error)
        else:
            return f"{op}__{name}"
    what = f"backend {backend!r} can't" if backend is not None else "no backend can"
    because = f": {usable[backend]}" if backend is not None else ""
    raise ValueError(f"{what} run {op} on {device}{because}. All of them: {_list(usable)}")


def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"linear_vit.kernels.{_ROOMS[op]}.{backend}")


def _list(usable: dict[str, str | None]) -> str:
    return "; ".join(
        f"{name} (usable)" if reason is None else f"{name} (not usable: {reason})"
        for name, reason in usable.items()
    )


def _preference(op: str, device_type: str) -> tuple[str, ...]:
    """Backends from the fastest to the slowest. Compiling is never a surprise: it is by name."""
    if device_type == "cuda":
        # SDPA's kernels are tuned; ours are, so far, only right.
        if _ROOMS[op] == "softmax_attention":
            return ("torch", "triton", "cuda", "reference")
        return ("triton", "cuda", "torch", "reference")
    return ("cpu", "torch", "reference")


def _reason(
    name: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
) -> str | None:
    if dtype == torch.float64 and name != "reference":
        return "float64 is for the reference only: use backend='reference', or float32"
    if (
        name in ("triton", "cuda")
        and _ROOMS[op] != "ripple"
        and head_dim is not None
        and head_dim not in HEAD_DIMS
    ):
        return (
            f"head dim {head_dim} is not one of the kernels' {', '.join(map(str, HEAD_DIMS))}: "
            "use backend='torch'"
        )
    if name == "cpu" and _ROOMS[op] == "softmax_attention":
        return "on the CPU PyTorch's own softmax attention is the fast one: use backend='torch'"
    if (
        name == "cpu"
        and _ROOMS[op] == "linear_attention"
        and head_dim is not None
        and head_dim > MOST_CPU_HEAD_DIM
    ):
        return (
            f"head dim {head_dim} is more than the C++ kernels' {MOST_CPU_HEAD_DIM}: "
            "use backend='torch'"
        )
    return _PROBES[name](device)


def _probe_none(device: torch.device) -> None:
    return None


def _probe_compiled(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _probe_triton(device)
    return _no_cpp_compiler()


@functools.cache
def _no_cpp_compiler() -> str | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return "torch.compile needs a C++ compiler: install g++ (Debian: apt-get install g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"torch.compile needs Python's headers: install them (apt: python{version}-dev)"
    return None


def _probe_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _interpreting():
        return _triton_broken() or _interpreter_unusable()
    if device.type != "cuda":
        return (
            f"Triton compiles for GPUs, not for {device.type}: use a CUDA device, or set "
            "TRITON_INTERPRET=1 before Python starts to check the kernels on CPU tensors"
        )
    if not torch.cuda.is_available():
        return _no_cuda_device()
    return _triton_broken()


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
    triton = _version("triton")
    numpy = _version("numpy")
    if triton < (3, 7) and numpy >= (2, 4):
        found = f"Triton {importlib.metadata.version('triton')}"
        return f"the interpreter of {found} needs numpy<2.4: pip install 'numpy<2.4'"
    return None


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def _probe_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return _no_cuda_device()

    from linear_vit.kernels import build

    return build.unavailable("cuda", device)


def _probe_cpu(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"C++ kernels run on the CPU, not on {device.type}: use a CPU tensor"

    from linear_vit.kernels import build

    return build.unavailable("cpu", device)


def _no_cuda_device() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build and use a CUDA device"
    return "no CUDA device here (torch.cuda.is_available() is False): run on a machine with one"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


# Backend -> its probe. Probes import and compile nothing they don't have to.
_PROBES: dict[str, _Probe] = {
    "reference": _probe_none,
    "torch": _probe_none,
    "compiled": _probe_compiled,
    "cpu": _probe_cpu,
    "triton": _probe_triton,
    "cuda": _probe_cuda,
}
BACKENDS = tuple(_PROBES)
