"""Shapes and gradients of softmax attention's operators, the same for every kernel backend.

A backend defines four operators in the namespace ``linear_vit``; lse is the natural logarithm of
the softmax's denominator, (B, H, N) float32, -inf where M = 0::

    <backend>_softmax_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale)
        -> (Tensor out, Tensor lse)
    <backend>_softmax_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
        Tensor? key_mask, Tensor out, Tensor lse, float scale, int wanted)
        -> (Tensor dq, Tensor dk, Tensor dv)
    <backend>_softmax_attention_packed(Tensor qkv, Tensor? key_mask, float scale)
        -> (Tensor out, Tensor lse)
    <backend>_softmax_attention_packed_backward(Tensor dout, Tensor qkv, Tensor? key_mask,
        Tensor out, Tensor lse, float scale) -> Tensor dqkv

``wanted`` says which gradients are asked for (``kernels.operators.wanted``); the others come out
empty, and nothing is done for them alone.

``key_mask`` (B, M) bool takes the keys where it is False out of the softmax; a row of none has an
out of 0 and an lse of -inf. The functions around the operators have put zeros in the place of
masked keys and values (a copy of both, of masked calls only), and drop their gradients: an operator
may leave anything in these.

qkv is (B, N, 3, H, D), out and dout of the packed form are (B, N, H, D), dqkv is one dense tensor
in qkv's memory order.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from linear_vit.kernels.layout import (
    empty_like,
    unpack_qkv,
    without_masked,
    without_masked_packed,
)
from linear_vit.kernels.operators import empty_gradients, is_wanted, register, wanted


class SoftmaxAttention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
    ) -> Tensor: ...


class Packed(Protocol):
    def __call__(self, qkv: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor: ...


class Functions(NamedTuple):
    softmax_attention: SoftmaxAttention
    softmax_attention_packed: Packed


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
        cut="bhnd,bgmd,bgmd,bm -> bhnd,bhn; b gh n",
        cut_backward="bhnd,bhnd,bgmd,bgmd,bm,bhnd,bhn -> bhnd,bgmd,bgmd; b gh n+",
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
        cut="bnthd,bn -> bnhd,bhn; b h",
        cut_backward="bnhd,bnthd,bn,bnhd,bhn -> bnthd; b h",
    )

    def softmax_attention(
        q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
    ) -> Tensor:
        return forward(q, *without_masked(key_mask, k, v), key_mask, scale)[0]

    def softmax_attention_packed(
        qkv: Tensor, scale: float, key_mask: Tensor | None = None
    ) -> Tensor:
        return packed(without_masked_packed(key_mask, qkv), key_mask, scale)[0]

    return Functions(softmax_attention, softmax_attention_packed)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    return empty_gradients(wanted, q, k, v)


def _fake_packed(qkv: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, _ = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    return empty_like(qkv.select(2, 0)), lse


def _fake_packed_backward(
    dout: Tensor, qkv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
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
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    mask = wanted(ctx.needs_input_grad[:3])
    return *kernel(dout, *ctx.saved_tensors, ctx.scale, mask), None, None


def _packed_backward(kernel: Any, ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor, None, None]:
    return kernel(dout, *ctx.saved_tensors, ctx.scale), None, None


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
