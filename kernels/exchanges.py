"""What processes of torch.distributed send one another, with the gradients of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rank_in(group: "dist.ProcessGroup | None", who: str) -> int:
    """This process's rank in a group, None being all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not of the group;
            with ``who`` needs it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{who} needs torch.distributed: start the processes with torchrun "
            "and call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError(f"{who}: this process is not of the group")
    return rank


def summed(group: "dist.ProcessGroup | None", *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one dtype, of any shapes, each added up over the processes, in one exchange.

    The gradient of a sum is that of each of its terms, and every process has a part of it: those
    are added up in the same way.
    """
    return _Summed.apply(group, *tensors)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _all_reduced(group, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_all_reduced(ctx.group, gradients)


def _all_reduced(group: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As one, since an all-reduce of few bytes takes as long as that of none."""
    together = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(together, group=group)
    parts = together.split([x.numel() for x in tensors])
    return tuple([part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])


def gathered(x: Tensor, counts: Sequence[int], group: "dist.ProcessGroup | None") -> Tensor:
    """The parts (n, ...) of all processes, (N, ...), of which each has ``counts[rank]``.

    Backward each process is sent its part by every other, and adds them up.
    """
    return _Gathered.apply(x, counts, group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        ctx.own = [len(x)] * len(counts)
        return exchanged(torch.cat([x] * len(counts)), ctx.own, counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = exchanged(gradient, ctx.counts, ctx.own, ctx.group)
        return parts.unflatten(0, (len(ctx.own), -1)).sum(dim=0), None, None


def exchanged(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: "dist.ProcessGroup | None"
) -> Tensor:
    """What the processes of a group send to this one, in the order of ranks; no gradient.

    Args:
        x: (sum of ``sent``, ...): first what goes to rank 0, then what goes to rank 1, ...
        sent: how many of x's first axis each rank is to have.
        received: how many each rank sends here.

    Returns:
        (sum of ``received``, ...).
    """
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
    return out
