"""Softmax attention by its definition, in eager PyTorch; stores the N × M matrix."""

import math

import torch
from torch import Tensor

from linear_vit.kernels.layout import (
    attended,
    gradients_in_order,
    in_order_of,
    unpack_qkv,
    without_masked,
)
from linear_vit.kernels.precision import product


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    query, key, value = (x.to(accumulate) for x in gradients_in_order(q, k, v))
    key, value = without_masked(key_mask, key, value)
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = product(query, key.transpose(-2, -1)) * scale
    seen = attended(key_mask)
    weights = torch.softmax(scores if seen is None else scores.where(seen, -math.inf), dim=-1)
    out = product(weights, value)
    return in_order_of(q, out.to(q.dtype))


def softmax_attention_packed(qkv: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    (qkv,) = gradients_in_order(qkv)
    return softmax_attention(*unpack_qkv(qkv), scale, key_mask).transpose(1, 2)
