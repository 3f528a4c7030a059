"""Linear attention as a good PyTorch user writes it: composed operations, float32 accumulation.

The products are batched matrix products in float32, since a half-precision normaliser overflows
(float16) or loses its last bits (bfloat16) from a few thousand tokens on. φ is written to memory:
2D float32 features for every key and every query token.
"""

import math

import torch
from torch import Tensor

from linear_vit.kernels.layout import (
    gradients_in_order,
    in_order_of,
    unpack_qkv,
    without_masked,
)
from linear_vit.kernels.precision import product

_LEAST_EPS = 1e-15  # of which a half-precision gradient over it is a float32


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    q_in, k, v = gradients_in_order(q, k, v)
    state, normaliser = _state(k, v, key_mask)
    return in_order_of(q, _apply(q_in, state, normaliser, eps))


def linear_attention_packed(qkv: Tensor, eps: float, key_mask: Tensor | None = None) -> Tensor:
    (packed,) = gradients_in_order(qkv)
    q, k, v = unpack_qkv(packed)
    out = in_order_of(q, _apply(q, *_state(k, v, key_mask), eps))
    return out.transpose(1, 2)


def linear_attention_state(
    k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    k, v = gradients_in_order(k, v)
    state, normaliser = _state(k, v, key_mask)
    return state.contiguous(), normaliser


def linear_attention_apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    (q_in,) = gradients_in_order(q)
    return in_order_of(q, _apply(q_in, state, normaliser, eps))


def _feature_map(x: Tensor) -> Tensor:
    x = x.float()
    return torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)


def _state(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = without_masked(key_mask, k, v)
    phi_k = _feature_map(k)
    # Sᵀ = vᵀ φ(k): PyTorch's gradient of a transposed factor comes out transposed, to be copied to
    # its input's order, so the factor to transpose is v and not φ(k), of twice the size.
    state = product(v.float().transpose(-2, -1), phi_k).transpose(-2, -1)
    return state, phi_k.sum(dim=-2)


def _apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    heads, kv_heads = q.shape[1], state.shape[1]
    phi_q = _feature_map(q)
    if heads != kv_heads:
        phi_q = phi_q.unflatten(1, (kv_heads, heads // kv_heads))
        state, normaliser = state.unsqueeze(2), normaliser.unsqueeze(2)
    numerator = product(phi_q, state)
    met = product(phi_q, normaliser.unsqueeze(-1))
    denominator = met + eps
    if eps < _LEAST_EPS:
        # A query that meets no key comes out 0, not 0/0, and has no gradient. So does one whose
        # denominator is below the normal numbers. With a larger eps both are so by themselves.
        least = max(0.0, torch.finfo(met.dtype).tiny - eps)
        denominator = torch.where(met.abs() <= least, math.inf, denominator)
    out = (numerator / denominator).to(q.dtype)
    return out.flatten(1, 2) if heads != kv_heads else out
