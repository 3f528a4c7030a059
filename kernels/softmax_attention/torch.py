"""Softmax attention as PyTorch users have it: ``scaled_dot_product_attention``.

PyTorch has several kernels for it, and an order in which it tries them: FlashAttention-2, then the
memory-efficient one, which is also the only one for float32. From Hopper on cuDNN's is the fastest
for half precision, so a call large enough to pay for the choice asks for it first (inside
``torch.compile`` the order is PyTorch's own). :func:`implementation` names the kernel that ran.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_vit.kernels.layout import (
    attended,
    gradients_in_order,
    in_order_of,
    unpack_qkv,
    without_masked,
)
from linear_vit.kernels.precision import guarded


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    if q.dtype == torch.float32:
        return guarded(_softmax_attention, q, k, v, scale, key_mask)
    return _softmax_attention(q, k, v, scale, key_mask)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> Tensor:
    query, key, value = gradients_in_order(q, k, v)
    key, value = without_masked(key_mask, key, value)
    seen = attended(key_mask)
    if q.shape[1] == k.shape[1]:
        with _fastest_first(q, k):
            out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    elif q.is_cuda and q.dtype == torch.float32:
        out = grouped_as_rows(query, key, value, scale, seen)
    else:
        with _fastest_first(q, k):
            out = F.scaled_dot_product_attention(
                query, key, value, seen, scale=scale, enable_gqa=True
            )
    return in_order_of(q, out)


def grouped_as_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None
) -> Tensor:
    """Grouped queries for the kernels that do not know them: a group's heads as rows of one head.

    No kernel for float32 knows them; PyTorch would store the N × M matrix.
    """
    rows = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1] * q.shape[2], q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v, seen, scale=scale).reshape(q.shape)


def softmax_attention_packed(qkv: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    (packed,) = gradients_in_order(qkv)
    return softmax_attention(*unpack_qkv(packed), scale, key_mask).transpose(1, 2)


def implementation(op: str, *tensors: Tensor) -> str:
    """The SDPA kernel PyTorch runs for these tensors, from the operators its profiler records."""
    q, k, v = unpack_qkv(tensors[0]) if op.endswith("_packed") else tensors[:3]
    with torch.autograd.profiler.profile(use_kineto=True) as profile:
        softmax_attention(q, k, v, q.shape[-1] ** -0.5)
    prefix = "aten::_scaled_dot_product_"
    events = profile.function_events or []
    ran = sorted({e.name.removeprefix(prefix) for e in events if e.name.startswith(prefix)})
    return f"scaled_dot_product_attention: {', '.join(ran) or 'no fused operator recorded'}"


def _fastest_first(q: Tensor, k: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which SDPA tries its kernels for these tensors from the fastest on."""
    if (
        q.is_cuda
        and q.dtype != torch.float32
        and 4 * q.numel() * k.shape[2] >= _WORTH_CHOOSING
        and not torch.compiler.is_compiling()
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
    ):
        kernel = torch.nn.attention.SDPBackend
        half_first = [kernel.CUDNN_ATTENTION, kernel.FLASH_ATTENTION]
        others = [kernel.EFFICIENT_ATTENTION, kernel.MATH]
        return torch.nn.attention.sdpa_kernel(half_first + others, set_priority=True)
    return contextlib.nullcontext()


# FLOP of a call, 4·B·H·N·M·D. Changing PyTorch's order and back takes the host about 0.1 ms, what
# a GPU with 450 TFLOP/s needs for 4.5e10: below a few times that it could cost more than it saves.
_WORTH_CHOOSING = 2e11
