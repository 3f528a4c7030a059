"""Linear attention of a sequence whose tokens lie on several processes.

Each sums its own keys and values into a state, the states are added up over the processes, and
each reads the sum with its own queries. So what they exchange is the state, whatever the length:
4·B·Hk·(2D² + 2D) bytes in each direction, times what an all-reduce sends for a byte.

The sum is waited for at once. Nothing is left to do meanwhile: what reads the queries reads the
sum in the same pass, and so it is backward, where one kernel makes their gradient and its part of
the sum's.
"""

from torch import Tensor
from torch import distributed as dist

from linear_vit.kernels.exchanges import rank_in, summed
from linear_vit.kernels.linear_attention import linear_attention_apply, linear_attention_state


def linear_attention_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: "dist.ProcessGroup | None" = None,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """:func:`kernels.linear_attention` of the tokens that all processes of a group hold together.

    Every process calls it, and takes part in the backward pass: with gradients on all or on none.

    Args:
        q: this process's queries (B, H, N, D), as for :func:`kernels.linear_attention`. N may
            differ from process to process, and be 0; B, H, Hk, D and dtype may not.
        k, v: its keys and values (B, Hk, M, D); M may differ, and be 0.
        group: the processes; None: all of them.
        key_mask: (B, M) bool, of this process's keys: False for those that are not there.
        eps: added to the normaliser, at least 0.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D): the rows that these queries have in the whole sequence's result. Sums differ
        from those of one process by rounding, and are the same bits in each call and process.

    Raises:
        TypeError, ValueError: as :func:`kernels.linear_attention`, before anything is exchanged.
        RuntimeError: torch.distributed is not initialised, or this process is not of the group;
            or others of it did not answer within its time-out, whose ranks are named then.
    """
    rank_in(group, "linear_attention_sharded")
    S, z = linear_attention_state(k, v, key_mask=key_mask, backend=backend)
    S, z = summed(group, S, z)
    return linear_attention_apply(q, S, z, eps=eps, backend=backend)
