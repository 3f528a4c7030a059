"""Shapes and gradients of softmax attention's operators, the same for every kernel backend.

A backend defines four operators in the namespace ``linear_vit``; lse is the natural logarithm of
the softmax's denominator, (B, H, N) float32, -inf where M = 0::

    <backend>_softmax_attention(Tensor q, Tensor k, Tensor v, float scale)
        -> (Tensor out, Tensor lse)
    <backend>_softmax_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
        Tensor lse, float scale, int wanted) -> (Tensor dq, Tensor dk, Tensor dv)
    <backend>_softmax_attention_packed(Tensor qkv, float scale) -> (Tensor out, Tensor lse)
    <backend>_softmax_attention_packed_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse,
        float scale) -> Tensor dqkv

``wanted`` says which gradients are asked for (``kernels.operators.wanted``); the others come out
empty, and nothing is done for them alone.

qkv is (B, N, 3, H, D), out and dout of the packed form are (B, N, H, D), dqkv is one dense tensor
in qkv's memory order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_vit.kernels.layout import empty_like, unpack_qkv
from linear_vit.kernels.operators import empty_gradients, is_wanted, register, wanted


class Functions(NamedTuple):
    softmax_attention: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    softmax_attention_packed: Callable[[Tensor, float], Tensor]


def attach(backend: str) -> Functions:
    """Give the backend's operators shapes and gradients; returns the functions dispatch calls."""
    forward = register(
        backend,
        "softmax_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_save,
        backward=_backward,
        flops=_work,
        flops_backward=_backward_work,
    )
    packed = register(
        backend,
        "softmax_attention_packed",
        fake=_fake_packed,
        fake_backward=_fake_packed_backward,
        setup_context=_save,
        backward=_packed_backward,
        flops=_packed_work,
        flops_backward=_packed_backward_work,
    )

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return forward(q, k, v, scale)[0]

    def softmax_attention_packed(qkv: Tensor, scale: float) -> Tensor:
        return packed(qkv, scale)[0]

    return Functions(softmax_attention, softmax_attention_packed)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    return empty_gradients(wanted, q, k, v)


def _fake_packed(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, _ = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    return empty_like(qkv.select(2, 0)), lse


def _fake_packed_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    return empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # zeros for lse would be written for nobody to read


def _backward(
    kernel: Any, ctx: Any, dout: Tensor, dlse: None
) -> tuple[Tensor, Tensor, Tensor, None]:
    return *kernel(dout, *ctx.saved_tensors, ctx.scale, wanted(ctx.needs_input_grad[:3])), None


def _packed_backward(kernel: Any, ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor, None]:
    return kernel(dout, *ctx.saved_tensors, ctx.scale), None


# Two products of N × M × D forward, five backward: q kᵀ again, dout vᵀ (of dq and dk), dq, dk, dv.


def _work(q: Tensor, k: Tensor, *_: object) -> int:
    return 4 * q.numel() * k.shape[2]


def _backward_work(dout: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    dq, dk, dv = (is_wanted(rest[-1], i) for i in range(3))
    return 2 * q.numel() * k.shape[2] * (1 + (dq or dk) + dq + dk + dv)


def _packed_work(qkv: Tensor, *_: object) -> int:
    return _work(*unpack_qkv(qkv)[:2])


def _packed_backward_work(dout: Tensor, qkv: Tensor, *_: object) -> int:
    return _backward_work(dout, *unpack_qkv(qkv)[:2], 0b111)
