"""Other libraries' implementations, timed in the same tables as ours: a file each, that adapts one.

A peer is known by its name, like a backend, and asked the same way: what it can run here, and if
not, why not. Each is held to the same float64 reference, except one that computes another function:
that is checked against its own and marked.

A peer's module has ``OPERATION``; ``NAMES``, each with a part of the name of an operator or kernel
that it runs; ``unusable(name, device, dtype)``; ``run(name, q, k, v)``; and, where what it computes
is something else, ``OTHER_FUNCTION`` in words, ``FLOP_SHARE`` of the work, and
``expected(q, k, v)``.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from linear_vit.bench.peers import fla, flash_bla, litemla, sdpa

_MODULES: tuple[ModuleType, ...] = (sdpa, fla, flash_bla, litemla)
_OF = {name: module for module in _MODULES for name in module.NAMES}
NAMES = tuple(_OF)


def backends(
    operation: str, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Every peer that has this operation, with None (usable here) or the reason why not."""
    return {
        name: module.unusable(name, device, dtype)
        for name, module in _OF.items()
        if operation == module.OPERATION
    }


def run(name: str, operation: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One forward pass; autograd goes through it."""
    module = _OF[name]
    if operation != module.OPERATION:
        raise ValueError(f"{name} has no {operation}, but {module.OPERATION}")
    return (module.run(name, tensors["q"], tensors["k"], tensors["v"]),)


def signature(name: str) -> str | None:
    """What the name of one of its operators or kernels contains; None of what is no peer."""
    return _OF[name].NAMES[name] if name in _OF else None


def other_function(name: str) -> str | None:
    """What a peer computes instead, in words; None where it is what it is compared with."""
    return getattr(_OF.get(name), "OTHER_FUNCTION", None)


def flop_share(name: str) -> float:
    """The least work of what a backend or peer computes, over the operation's."""
    return float(getattr(_OF.get(name), "FLOP_SHARE", 1.0))


def expected(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The definition of a peer's other function, for float64 tensors."""
    found: Callable[[Tensor, Tensor, Tensor], Tensor] = _OF[name].expected
    return found
