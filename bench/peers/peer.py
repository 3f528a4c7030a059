"""What the suite has to know of another library's implementation."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One implementation of another library, adapted to an operation's q, k and v.

    Attributes:
        name: like a backend's.
        operation: that it is compared with.
        signature: parts of the names of operators or kernels that it runs: one of them, in either
            pass, shows that it ran.
        unusable: for a device and dtype (None: any), why it can't run here; None where it can.
        run: one forward pass of (q, k, v); autograd goes through it.
        colour: in plots.
        other_function: what it computes instead, in words; None where it is the same function.
        flop_share: the least work of what it computes, over the operation's.
        expected: the definition of its other function, for float64 tensors.
        emulation: where the library has no such operation: what its user makes it of, in words.
    """

    name: str
    operation: str
    signature: tuple[str, ...]
    unusable: Callable[[torch.device, torch.dtype | None], str | None]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    colour: str
    other_function: str | None = None
    flop_share: float = 1.0
    expected: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    emulation: str | None = None


def gpu_only(module: str, missing: str) -> Callable[[torch.device, torch.dtype | None], str | None]:
    """:attr:`Peer.unusable` of a library of Triton kernels; ``missing`` is said where it is not."""

    def unusable(device: torch.device, dtype: torch.dtype | None) -> str | None:
        if importlib.util.find_spec(module) is None:
            return missing
        if device.type != "cuda":
            return f"its kernels are Triton's, which run on CUDA devices, not on {device.type}"
        return None

    return unusable
