"""Softmax attention of a sequence whose tokens lie on several processes.

Every query reads every key, so each process gathers the keys and values of all: what they exchange
grows with the length, where linear attention exchanges a state. It is what that is compared with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit.kernels.exchanges import exchanged, gathered, rank_in
from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.softmax_attention import softmax_attention
from linear_vit.kernels.validation import check_attention, check_key_mask, check_same


def softmax_attention_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    tokens: Sequence[int] | None = None,
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
        tokens: M of each process, where all know it; None: they ask one another, which takes an
            exchange more, that the host waits for.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D): the rows that these queries have in the whole sequence's result.

    Raises:
        TypeError, ValueError: as :func:`kernels.softmax_attention`, before anything is exchanged.
        RuntimeError: torch.distributed is not initialised, or this process is not of the group.
    """
    rank_in(group, "softmax_attention_sharded")
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_same(q=q, k=k, v=v)
    check_key_mask(key_mask, k, k.shape[2])
    counts = _counts(k, group) if tokens is None else tokens
    kv = torch.stack((k, v)).movedim(3, 0)
    keys, values = gathered(kv, counts, group).movedim(0, 3)
    if key_mask is not None:
        key_mask = gathered(key_mask.byte().T, counts, group).T.bool()
    return softmax_attention(q, keys, values, key_mask=key_mask, scale=scale, backend=backend)


def _counts(k: Tensor, group: "dist.ProcessGroup | None") -> list[int]:
    """How many keys each process has."""
    once = [1] * dist.get_world_size(group)
    own = torch.full((len(once),), k.shape[2], device=k.device)
    found: list[int] = exchanged(own, once, once, group).tolist()
    return found
