"""Proof that the implementation asked for is the one that ran: the names a profiler recorded.

On CUDA these are kernels, on a CPU operators, of one call that nothing else is measured in. Every
own kernel is behind an operator ``linear_vit::{backend}_...``, a compiled graph announces itself,
and what is plain PyTorch has neither.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from linear_vit.bench.instruments import profiles
from linear_vit.kernels.operators import NAMESPACE

_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
# An event around the operators, of autograd's or the profiler's own: no work by itself.
_FRAMES = ("autograd::engine", "[memory]", "ProfilerStep", "TorchDynamo", "Pregraph", "AOTDisp")


@dataclass(frozen=True)
class Claim:
    """What was asked for, and what it has to show.

    Attributes:
        name: the backend's.
        own: operators ``linear_vit::{name}_...`` have to run.
        compiled: a compiled graph has to.
        eager: PyTorch's operators have to, and no compiled graph.
        signature: parts of names, one of which has to occur; none for any.
        others: backends whose own operators must not run.
    """

    name: str
    own: bool = False
    compiled: bool = False
    eager: bool = False
    signature: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def names_of(
    call: Callable[[], object], device: torch.device
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Operators and device kernels of one call, each name once, in the order they began."""
    profile = profiles.trace(call, device)
    operators: dict[str, None] = {}
    kernels: dict[str, None] = {}
    for event in sorted(profile.function_events or [], key=lambda e: e.time_range.start):
        if event.name.startswith(_FRAMES):
            continue
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        (kernels if on_device else operators)[event.name] = None
    return tuple(operators), tuple(kernels)


def fallback(claim: Claim, operators: tuple[str, ...], kernels: tuple[str, ...], on: str) -> str:
    """What is wrong with these names for what was asked for, in words; "" where nothing is.

    Args:
        claim: what was asked for.
        operators, kernels: as from :func:`names_of`.
        on: the device's type, "cpu" or "cuda".
    """
    name, compiled = claim.name, _has(operators, _COMPILED)
    if claim.own and not _has(operators, f"{NAMESPACE}::{name}_"):
        return f"no operator {NAMESPACE}::{name}_… ran, but {_some(operators)}"
    if claim.compiled and not compiled:
        return f"no compiled graph ran, but {_some(operators)}"
    if claim.eager:
        if compiled:
            return "a compiled graph ran, where eager PyTorch was asked for"
        if not _has(operators, "aten::"):
            return "no operator of PyTorch ran"
    ran = (*operators, *kernels)
    if claim.signature and not any(part in one for part in claim.signature for one in ran):
        return f"no {' or '.join(f'…{part}…' for part in claim.signature)} ran, but {_some(ran)}"
    if own := [other for other in claim.others if _has(operators, f"{NAMESPACE}::{other}_")]:
        return f"kernels of {', '.join(sorted(own))} ran, where {name} was asked for"
    if on == "cuda" and not kernels:
        return "nothing ran on the device"
    if on == "cuda" and claim.own and all(ran.startswith(_LIBRARY) for ran in kernels):
        return f"only PyTorch's own kernels ran: {_some(kernels)}"
    return ""


def shown(operators: tuple[str, ...], kernels: tuple[str, ...], most: int = 40) -> list[str]:
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
