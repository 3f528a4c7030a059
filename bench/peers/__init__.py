"""Other libraries' implementations, timed in the same tables as ours: a file each, that adapts one.

A peer is known by its name, like a backend, and asked the same way: what it can run here, and if
not, why not. Each is held to the same float64 reference, except one that computes another function:
that is checked against its own and marked. A file of this folder that has ``PEERS`` adds them.
"""

import importlib
import pkgutil

import torch

from linear_vit.bench.peers.peer import Peer

__all__ = ["PEERS", "Peer", "backends", "other_function"]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in pkgutil.iter_modules(__path__)
    for peer in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", ())
}


def backends(
    operation: str, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, str | None]:
    """Every peer that has this operation, with None (usable here) or the reason why not."""
    return {
        name: peer.unusable(device, dtype)
        for name, peer in PEERS.items()
        if operation == peer.operation
    }


def other_function(name: str) -> str | None:
    """What a backend or peer computes instead, in words; None where it is the operation."""
    return PEERS[name].other_function if name in PEERS else None
