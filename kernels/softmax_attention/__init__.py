"""Softmax attention, the baseline: softmax(q kᵀ · scale) v, non-causal."""

from operator import index

from torch import Tensor

from linear_vit.kernels.backends import run
from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.validation import check_attention, check_packed, check_real, check_same


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Non-causal softmax attention, with float32 statistics.

    Args:
        q: queries (B, H, N, D); float32, float16 or bfloat16 (float64 on the reference). The last
            axis is contiguous, every other stride is free and read in place.
        k, v: keys and values (B, Hk, M, D), of q's dtype and device. H is a multiple of Hk; query
            head h reads key/value head ``h // (H // Hk)``.
        scale: multiplies q kᵀ; D^-½ by default.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D) in q's dtype and memory order; all zeros where M = 0. No N × M matrix is
        stored, except by the reference.

    Raises:
        TypeError, ValueError: a bad argument, named, before anything is launched; or a backend
            that can't run this, with the reason.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_same(q=q, k=k, v=v)
    # torch.jit.trace has a tensor for a size, and index makes it a number again.
    scale = index(q.shape[-1]) ** -0.5 if scale is None else check_real("scale", scale)
    return run("softmax_attention", backend, q, k, v, scale)


def softmax_attention_packed(
    qkv: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """:func:`softmax_attention` of one packed projection, whose gradient comes in one piece.

    Args:
        qkv: (B, N, 3, H, D), the last axis contiguous: ``linear(x).view(B, N, 3, H, D)``.
        scale: multiplies q kᵀ; D^-½ by default.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, N, H, D) in qkv's dtype and memory order. The kernel backends write the three gradients
        into one tensor of qkv's memory order, so that the projection's backward copies nothing.

    Raises:
        TypeError, ValueError: as :func:`softmax_attention`.
    """
    (qkv,) = autocast_inputs(qkv)
    check_packed(qkv)
    # torch.jit.trace has a tensor for a size, and index makes it a number again.
    scale = index(qkv.shape[-1]) ** -0.5 if scale is None else check_real("scale", scale)
    return run("softmax_attention_packed", backend, qkv, scale)
