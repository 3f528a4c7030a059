"""Proof that the implementation asked for is the one that ran: the names a profiler recorded.

On CUDA these are kernels, on a CPU operators, of one call that nothing else is measured in. Every
own kernel is behind an operator ``linear_vit::{backend}_...``, a compiled graph announces itself,
and what is plain PyTorch has neither.
"""

from collections.abc import Callable

import torch

from linear_vit.bench import peers
from linear_vit.kernels.operators import NAMESPACE

_OWN = ("cpu", "triton", "cuda")
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
# An event around the operators, of autograd's or the profiler's own: no work by itself.
_FRAMES = ("autograd::engine", "[memory]", "ProfilerStep", "TorchDynamo", "Pregraph", "AOTDisp")


def names_of(
    call: Callable[[], object], device: torch.device
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Operators and device kernels of one call, each name once, in the order they began."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    operators: dict[str, None] = {}
    kernels: dict[str, None] = {}
    for event in sorted(profile.events() or [], key=lambda e: e.time_range.start):
        if event.name.startswith(_FRAMES):
            continue
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        (kernels if on_device else operators)[event.name] = None
    return tuple(operators), tuple(kernels)


def fallback(backend: str, operators: tuple[str, ...], kernels: tuple[str, ...], on: str) -> str:
    """What is wrong with these names for this backend, in words; "" where nothing is.

    Args:
        backend: one of ``kernels.BACKENDS``, or a peer's name.
        operators, kernels: as from :func:`names_of`.
        on: the device's type, "cpu" or "cuda".
    """
    own = {name for name in _OWN if _has(operators, f"{NAMESPACE}::{name}_")}
    compiled = _has(operators, _COMPILED)
    if backend in _OWN:
        if backend not in own:
            return f"no operator {NAMESPACE}::{backend}_… ran, but {_some(operators)}"
        own.discard(backend)
    elif backend == "compiled":
        if not compiled:
            return f"no compiled graph ran, but {_some(operators)}"
    elif backend in ("torch", "reference"):
        if compiled:
            return "a compiled graph ran, where eager PyTorch was asked for"
        if not _has(operators, "aten::"):
            return "no operator of PyTorch ran"
    part = peers.signature(backend)
    if part is not None and not any(part in name for name in (*operators, *kernels)):
        return f"no …{part}… ran, but {_some(operators)}"
    if own:
        return f"kernels of {', '.join(sorted(own))} ran, where {backend} was asked for"
    if on == "cuda" and not kernels:
        return "nothing ran on the device"
    if on == "cuda" and backend == "triton" and all(k.startswith(_LIBRARY) for k in kernels):
        return f"only PyTorch's own kernels ran: {_some(kernels)}"
    return ""


def shown(
    backend: str, operators: tuple[str, ...], kernels: tuple[str, ...], most: int = 40
) -> list[str]:
    """What goes into the file: kernels where there are some, else operators; the telling first."""
    names = kernels or operators
    telling = [n for n in names if n.startswith((NAMESPACE, *_COMPILED))]
    scaled = [n for n in names if "scaled_dot_product" in n]
    return list(dict.fromkeys([*telling, *scaled, *names]))[:most]


# How kernels of PyTorch's own begin.
_LIBRARY = ("void at::", "void at_cuda", "Memset", "Memcpy", "void cublas", "ampere_", "sm80_")


def _has(names: tuple[str, ...], beginning: str | tuple[str, ...]) -> bool:
    return any(name.startswith(beginning) for name in names)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "nothing"
