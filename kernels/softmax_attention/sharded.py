"""Softmax attention of a sequence whose tokens lie on several processes.

Every query reads every key, so each process gathers the keys and values of all: what they exchange
grows with the length, where linear attention exchanges a state. It is what that is compared with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.softmax_attention import softmax_attention
from linear_vit.kernels.validation import (
    check_attention,
    check_group,
    check_key_mask,
    check_same,
)


def softmax_attention_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`kernels.softmax_attention` of the tokens that all processes of a group hold together.

    Every process calls it, and takes part in the backward pass: with gradients on all or on none.

    Args:
        q: this process's queries (B, H, N, D), as for :func:`kernels.softmax_attention`. N may
            differ from process to process, and be 0; B, H, Hk, D and dtype may not.
        k, v: its keys and values (B, Hk, M, D); M may differ, and be 0.
        group: the processes; None: all of them.
        key_mask: (B, M) bool, of this process's keys; of every process or of none.
        scale: multiplies q kᵀ; D^-½ by default.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D): the rows that these queries have in the whole sequence's result.

    Raises:
        TypeError, ValueError: as :func:`kernels.softmax_attention`, before anything is exchanged.
        RuntimeError: torch.distributed is not initialised, or this process is not of the group.
    """
    check_group("softmax_attention_sharded", group)
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_same(q=q, k=k, v=v)
    check_key_mask(key_mask, k, k.shape[2])
    own = torch.tensor([k.shape[2]], device=k.device)
    tokens = [int(x) for x in _gather(own, group)]
    keys, values = _Gathered.apply(torch.stack((k, v)), tokens, group)
    if key_mask is not None:
        key_mask = _whole(key_mask.byte(), 1, tokens, group).bool()
    return softmax_attention(q, keys, values, key_mask=key_mask, scale=scale, backend=backend)


class _Gathered(torch.autograd.Function):
    """Of (2, B, Hk, M, D) the tokens of all processes. The gradient of a token is the sum of those
    that it has in each process."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, tokens: Sequence[int], group: Any) -> Tensor:
        ctx.tokens, ctx.group = tokens, group
        return _whole(kv, 3, tokens, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        most, own = max(ctx.tokens), ctx.tokens[dist.get_rank(ctx.group)]
        parts = [_padded(x, 3, most) for x in gradient.split(list(ctx.tokens), dim=3)]
        total = torch.empty_like(parts[0])
        dist.reduce_scatter(total, parts, group=ctx.group)
        return total.narrow(3, 0, own), None, None


def _whole(x: Tensor, axis: int, tokens: Sequence[int], group: Any) -> Tensor:
    """The parts of all processes one behind the other, which have so many tokens."""
    parts = _gather(_padded(x, axis, max(tokens)), group)
    return torch.cat([y.narrow(axis, 0, n) for y, n in zip(parts, tokens, strict=True)], axis)


def _gather(x: Tensor, group: Any) -> list[Tensor]:
    """The tensor of each process, of one size."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _padded(x: Tensor, axis: int, tokens: int) -> Tensor:
    """Dense, with so many tokens: an exchange has one size for all."""
    if x.shape[axis] == tokens:
        return x.contiguous()
    size = [*x.shape[:axis], tokens, *x.shape[axis + 1 :]]
    padded = x.new_zeros(size)
    padded.narrow(axis, 0, x.shape[axis]).copy_(x)
    return padded
