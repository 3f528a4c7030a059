"""Softmax attention by its definition, in eager PyTorch; stores the N × M matrix."""

import torch
from torch import Tensor

from linear_vit.kernels.layout import gradients_in_order, in_order_of, unpack_qkv
from linear_vit.kernels.precision import product


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    query, key, value = (x.to(accumulate) for x in gradients_in_order(q, k, v))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    weights = torch.softmax(product(query, key.transpose(-2, -1)) * scale, dim=-1)
    out = product(weights, value)
    return in_order_of(q, out.to(q.dtype))


def softmax_attention_packed(qkv: Tensor, scale: float) -> Tensor:
    (qkv,) = gradients_in_order(qkv)
    return softmax_attention(*unpack_qkv(qkv), scale).transpose(1, 2)
