"""Linear attention by its definition, in eager PyTorch: the oracle the other backends are held to.

    S = Σₘ φ(kₘ) vₘᵀ      z = Σₘ φ(kₘ)      outₙ = φ(qₙ)ᵀ S / (φ(qₙ)·z + eps)

Any floating dtype; sums are float32, or float64 for float64.
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


def feature_map(x: Tensor) -> Tensor:
    """φ(x) = [relu(x), relu(-x)] along the last axis: (…, D) to (…, 2D), non-negative."""
    return torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    return linear_attention_apply(q, *linear_attention_state(k, v, key_mask), eps)


def linear_attention_packed(qkv: Tensor, eps: float, key_mask: Tensor | None = None) -> Tensor:
    (qkv,) = gradients_in_order(qkv)
    return linear_attention(*unpack_qkv(qkv), eps, key_mask).transpose(1, 2)


def linear_attention_state(
    k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    k, v = without_masked(key_mask, *gradients_in_order(k, v))
    phi_k = feature_map(k.to(_accumulation_dtype(k)))
    state = product(phi_k.transpose(-2, -1), v.to(phi_k.dtype))
    return state, phi_k.sum(dim=2)


def linear_attention_apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    (query,) = gradients_in_order(q)
    group = q.shape[1] // state.shape[1]
    state = state.repeat_interleave(group, dim=1)
    normaliser = normaliser.repeat_interleave(group, dim=1)
    phi_q = feature_map(query.to(state.dtype))
    numerator = product(phi_q, state)
    met = product(phi_q, normaliser.unsqueeze(-1))
    # A query that meets no key comes out 0, not 0/0, and has no gradient, whatever eps is. So does
    # one whose denominator is below the normal numbers.
    least = max(0.0, torch.finfo(met.dtype).tiny - eps)
    out = numerator / torch.where(met.abs() <= least, math.inf, met + eps)
    return in_order_of(q, out.to(q.dtype))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
