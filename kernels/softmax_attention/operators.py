"""Shapes and gradients of softmax attention's operators, the same for every kernel backend.

A backend defines two operators in the namespace ``linear_vit``; lse is the natural logarithm of the
softmax's denominator, (B, H, N) float32, -inf where M = 0::

    <backend>_softmax_attention(Tensor q, Tensor k, Tensor v, float scale)
        -> (Tensor out, Tensor lse)
    <backend>_softmax_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
        Tensor lse, float scale) -> (Tensor dq, Tensor dk, Tensor dv)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.operators import empty_like, register


def attach(backend: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Give the backend's operators shapes and gradients; returns the function dispatch calls."""
    forward = register(
        backend,
        "softmax_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_save,
        backward=_backward,
    )

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return forward(q, k, v, scale)[0]

    return softmax_attention


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)


def _backward(
    kernel: Any, ctx: Any, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    return *kernel(dout, *ctx.saved_tensors, ctx.scale), None
