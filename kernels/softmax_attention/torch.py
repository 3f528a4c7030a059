"""Softmax attention as PyTorch users have it: ``scaled_dot_product_attention``.

PyTorch chooses among its kernels (flash, memory-efficient, cuDNN, math) by device, dtype and shape;
:func:`implementation` names the one it took.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import gradients_in_order, in_order_of, unpack_qkv


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    query, key, value = gradients_in_order(q, k, v)
    if q.shape[1] == k.shape[1]:
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    return in_order_of(q, out)


def softmax_attention_packed(qkv: Tensor, scale: float) -> Tensor:
    (packed,) = gradients_in_order(qkv)
    return softmax_attention(*unpack_qkv(packed), scale).transpose(1, 2)


def implementation(op: str, q: Tensor, k: Tensor, v: Tensor, *_: object) -> str:
    """The SDPA kernel PyTorch runs for these tensors, from the operators its profiler records."""
    del op
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        softmax_attention(q, k, v, q.shape[-1] ** -0.5)
    prefix = "aten::_scaled_dot_product_"
    events = profile.events() or []
    ran = sorted({e.name.removeprefix(prefix) for e in events if e.name.startswith(prefix)})
    return f"scaled_dot_product_attention: {', '.join(ran) or 'no fused operator recorded'}"
