"""What processes of torch.distributed send one another, with the gradients of it.

An exchange that fails, since a process is gone or hangs, says which one. Between GPUs it can't:
NCCL ends a process whose exchange timed out, after a report of its own, and no Python sees it. Nor
is it in a compiled graph that an exchange fails in our hands.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit.kernels.functions import transformable

GRACE_S = 10  # between the first process and the last to notice that one does not answer


class Unanswered(RuntimeError):
    """An exchange failed for want of some processes: ``of 4 processes, 1 did not answer ...``."""


def missing(group: "dist.ProcessGroup | None", until: float) -> list[int]:
    """The ranks, among all processes, of those in a group that don't come here by ``until``, a time
    of ``time.monotonic``: each comes here when an exchange fails, and says so to the others."""
    store = dist.distributed_c10d._get_default_store()
    left = {rank: f"an exchange failed/{rank}" for rank in dist.get_process_group_ranks(group)}
    store.set(left[dist.get_rank()], "")
    while left and time.monotonic() < until:
        left = {rank: key for rank, key in left.items() if not store.check([key])}
        time.sleep(0.1)
    return sorted(left)


def unanswered(ranks: Sequence[int], seconds: float) -> Unanswered:
    """What to raise: which processes did not answer for so long."""
    who = ", ".join(map(str, ranks))
    return Unanswered(
        f"of {dist.get_world_size()} processes, {who} did not answer for {seconds:g} s and hang or "
        "are gone"
    )


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether it is torch.distributed that failed, or gloo, which has no type for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _named(call: Callable[..., Any], group: Any, *tensors_and_splits: Any) -> None:
    """The exchange that ``call`` makes; Unanswered where others did not take part.

    A process that is gone is noticed by some at once, and by others when their time is over. So the
    former wait for the latter, to name none that is there.
    """
    if torch.compiler.is_compiling():
        call(*tensors_and_splits, group=group)
        return
    begin = time.monotonic()
    try:
        call(*tensors_and_splits, group=group)
    except RuntimeError as error:
        if not is_of_an_exchange(error):
            raise
        seconds = _patience(group, tensors_and_splits[0].device)
        if not (ranks := missing(group, begin + seconds + GRACE_S)):
            raise
        raise unanswered(ranks, seconds) from error


def _patience(group: Any, device: torch.device) -> float:
    """The seconds after which a group's exchange fails."""
    found: Any = dist.group.WORLD if group is None else group
    options = getattr(found._get_backend(device), "options", None)
    return getattr(options, "_timeout", dist.default_pg_timeout).total_seconds()


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
    return _summed(group, *tensors)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _all_reduced(group, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_all_reduced(ctx.group, gradients)


_summed = transformable(_Summed)


def _all_reduced(group: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As one, since an all-reduce of few bytes takes as long as that of none."""
    together = torch.cat([x.flatten() for x in tensors])
    _named(dist.all_reduce, group, together)
    parts = together.split([x.numel() for x in tensors])
    return tuple([part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])


def gathered(x: Tensor, counts: Sequence[int], group: "dist.ProcessGroup | None") -> Tensor:
    """The parts (n, ...) of all processes, (N, ...), of which each has ``counts[rank]``.

    Backward each process is sent its part by every other, and adds them up.
    """
    return _gathered(x, counts, group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, counts: Sequence[int], group: Any) -> Tensor:
        own = [len(x)] * len(counts)
        return exchanged(torch.cat([x] * len(counts)), own, counts, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.counts, ctx.group = inputs
        ctx.own = [len(x)] * len(ctx.counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = exchanged(gradient, ctx.counts, ctx.own, ctx.group)
        return parts.unflatten(0, (len(ctx.own), -1)).sum(dim=0), None, None


_gathered = transformable(_Gathered)


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
    _named(dist.all_to_all_single, group, out, x.contiguous(), list(received), list(sent))
    return out
