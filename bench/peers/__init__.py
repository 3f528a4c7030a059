"""Other libraries' implementations, timed in the same tables as ours: a file each, that adapts one.

A peer is known by its name, like a backend, and asked the same way: what it can run here, and if
not, why not. Each is held to the same float64 reference, except one that computes another function:
that is checked against its own and marked. A file of this folder that has ``PEERS`` adds them.
"""

import importlib
import pkgutil
from collections.abc import Callable

import torch
from torch import Tensor

from linear_vit.bench.peers.peer import Peer

__all__ = [
    "NAMES",
    "PEERS",
    "Peer",
    "backends",
    "expected",
    "flop_share",
    "other_function",
    "run",
    "signature",
]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in pkgutil.iter_modules(__path__)
    for peer in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", ())
}
NAMES = tuple(PEERS)


def backends(
    operation: str, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Every peer that has this operation, with None (usable here) or the reason why not."""
    return {
        name: peer.unusable(device, dtype)
        for name, peer in PEERS.items()
        if operation == peer.operation
    }


def run(name: str, operation: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """One forward pass; autograd goes through it."""
    peer = PEERS[name]
    if operation != peer.operation:
        raise ValueError(f"{name} has no {operation}, but {peer.operation}")
    return (peer.run(tensors["q"], tensors["k"], tensors["v"]),)


def signature(name: str) -> str | None:
    """What the name of one of its operators or kernels contains; None of what is no peer."""
    return PEERS[name].signature if name in PEERS else None


def other_function(name: str) -> str | None:
    """What a peer computes instead, in words; None where it is what it is compared with."""
    return PEERS[name].other_function if name in PEERS else None


def flop_share(name: str) -> float:
    """The least work of what a backend or peer computes, over the operation's."""
    return PEERS[name].flop_share if name in PEERS else 1.0


def expected(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The definition of a peer's other function, for float64 tensors."""
    found = PEERS[name].expected
    if found is None:
        raise ValueError(f"{name} computes the operation's own function")
    return found
