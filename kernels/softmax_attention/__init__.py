"""Softmax attention, the baseline: softmax(q kᵀ · scale) v, non-causal."""

from operator import index

from torch import Tensor

from linear_vit.kernels.backends import run
from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.validation import (
    check_attention,
    check_key_mask,
    check_packed,
    check_real,
    check_same,
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Non-causal softmax attention, with float32 statistics.

    Args:
        q: queries (B, H, N, D); float32, float16 or bfloat16 (float64 on the reference). The last
            axis is contiguous, every other stride is free and read in place.
        k, v: keys and values (B, Hk, M, D), of q's dtype and device. H is a multiple of Hk; query
            head h reads key/value head ``h // (H // Hk)``.
        key_mask: (B, M) bool, False for keys that are not there, of padding for one: what they and
            their values hold (NaN too) is not seen, and their gradients are exactly 0. None: all
            are there.
        scale: multiplies q kᵀ; D^-½ by default.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D) in q's dtype and memory order; all zeros where no key is there. No N × M
        matrix is stored, except by the reference.

    Raises:
        TypeError, ValueError: a bad argument, named, before anything is launched; or a backend
            that can't run this, with the reason.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_same(q=q, k=k, v=v)
    check_key_mask(key_mask, k, k.shape[2])
    # torch.jit.trace has a tensor for a size, and index makes it a number again.
    scale = index(q.shape[-1]) ** -0.5 if scale is None else check_real("scale", scale)
    return run("softmax_attention", backend, q, k, v, scale, key_mask=key_mask)


def softmax_attention_packed(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`softmax_attention` of one packed projection, whose gradient comes in one piece.

    Args:
        qkv: (B, N, 3, H, D), the last axis contiguous: ``linear(x).view(B, N, 3, H, D)``.
        key_mask: (B, N) bool, as for :func:`softmax_attention`; every query is there.
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
    check_key_mask(key_mask, qkv, qkv.shape[1])
    # torch.jit.trace has a tensor for a size, and index makes it a number again.
    scale = index(qkv.shape[-1]) ** -0.5 if scale is None else check_real("scale", scale)
    return run("softmax_attention_packed", backend, qkv, scale, key_mask=key_mask)
