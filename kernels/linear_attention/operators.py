"""Shapes and gradients of linear attention's operators, the same for every kernel backend.

A backend defines four operators in the namespace ``linear_vit``::

    <backend>_linear_attention_state(Tensor k, Tensor v) -> (Tensor S, Tensor z)
    <backend>_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v)
        -> (Tensor dk, Tensor dv)
    <backend>_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor out
    <backend>_linear_attention_apply_backward(
        Tensor dout, Tensor q, Tensor S, Tensor z, float eps) -> (Tensor dq, Tensor dS, Tensor dz)

Linear attention is their composition. That costs no traffic over one fused operator: forward reads
k and v, then q, and writes out; backward reads dout and q and writes dq, then reads k and v and
writes dk and dv; S and z are kept from the forward.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.operators import empty_like, register


class LinearAttention(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor: ...


class State(Protocol):
    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Apply(Protocol):
    def __call__(self, q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor: ...


class Functions(NamedTuple):
    linear_attention: LinearAttention
    linear_attention_state: State
    linear_attention_apply: Apply


def attach(backend: str) -> Functions:
    """Give the backend's operators shapes and gradients; returns the functions dispatch calls."""
    state = register(
        backend,
        "linear_attention_state",
        fake=_fake_state,
        fake_backward=_fake_state_backward,
        setup_context=_save_state_inputs,
        backward=_state_backward,
    )
    apply = register(
        backend,
        "linear_attention_apply",
        fake=_fake_apply,
        fake_backward=_fake_apply_backward,
        setup_context=_save_apply_inputs,
        backward=_apply_backward,
    )

    def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        S, z = state(k, v)
        return apply(q, S, z, eps)

    return Functions(linear_attention, state, apply)


def _fake_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = k.shape
    S = k.new_empty((batch, heads, 2 * head_dim, head_dim), dtype=torch.float32)
    return S, k.new_empty((batch, heads, 2 * head_dim), dtype=torch.float32)


def _fake_state_backward(dS: Tensor, dz: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(k), empty_like(v)


def _save_state_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _state_backward(kernel: Any, ctx: Any, dS: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    k, v = ctx.saved_tensors
    return kernel(dS, dz, k, v)


def _fake_apply(q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
    return empty_like(q)


def _fake_apply_backward(
    dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dS = S.new_empty(S.shape)
    return empty_like(q), dS, z.new_empty(z.shape)


def _save_apply_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, S, z, eps = inputs
    ctx.save_for_backward(q, S, z)
    ctx.eps = eps


def _apply_backward(kernel: Any, ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, S, z = ctx.saved_tensors
    return *kernel(dout, q, S, z, ctx.eps), None
