"""Shapes and gradients of linear attention's operators, the same for every kernel backend.

A backend defines eight operators in the namespace ``linear_vit``::

    <backend>_linear_attention(Tensor q, Tensor k, Tensor v, float eps, bool save_state)
        -> (Tensor out, Tensor S, Tensor z)
    <backend>_linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor S,
        Tensor z, float eps, int wanted) -> (Tensor dq, Tensor dk, Tensor dv)
    <backend>_linear_attention_packed(Tensor qkv, float eps, bool save_state)
        -> (Tensor out, Tensor S, Tensor z)
    <backend>_linear_attention_packed_backward(Tensor dout, Tensor qkv, Tensor S, Tensor z,
        float eps) -> Tensor dqkv
    <backend>_linear_attention_state(Tensor k, Tensor v) -> (Tensor S, Tensor z)
    <backend>_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v, int wanted)
        -> (Tensor dk, Tensor dv)
    <backend>_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor out
    <backend>_linear_attention_apply_backward(
        Tensor dout, Tensor q, Tensor S, Tensor z, float eps, int wanted)
        -> (Tensor dq, Tensor dS, Tensor dz)

``wanted`` says which gradients are asked for (``kernels.operators.wanted``); the others come out
empty, and nothing is done for them alone: dq needs no dS, and without dk nothing needs dz. (The
CUDA kernels leave out whole launches only, where nothing but dq is asked for.)

qkv is (B, N, 3, H, D), out and dout of the packed form are (B, N, H, D), dqkv is one dense tensor
in qkv's memory order.

S (B, Hk, 2D, D) and z (B, Hk, 2D) are float32. ``save_state`` asks the forward for them; without it
they come out empty, of shape (0,), and a backward that is given empty ones works them out again
from k and v. That pays for short sequences: the state of one head is as large as the k and v of
8·D/e tokens, so below that writing and reading it costs more traffic than reading k and v twice.

Operators know no ``key_mask``: the functions around them put zeros in the place of masked keys and
values, a copy of both, for φ(0) = 0. A call without a mask costs nothing more.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from linear_vit.kernels.layout import (
    empty_like,
    needs_gradient,
    unpack_qkv,
    without_masked,
    without_masked_packed,
)
from linear_vit.kernels.operators import empty_gradients, is_wanted, register, wanted


class LinearAttention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
    ) -> Tensor: ...


class Packed(Protocol):
    def __call__(self, qkv: Tensor, eps: float, key_mask: Tensor | None = None) -> Tensor: ...


class State(Protocol):
    def __call__(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class Apply(Protocol):
    def __call__(self, q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor: ...


class Functions(NamedTuple):
    linear_attention: LinearAttention
    linear_attention_packed: Packed
    linear_attention_state: State
    linear_attention_apply: Apply


def attach(backend: str, *, recompute_tokens: int) -> Functions:
    """Give the backend's operators shapes and gradients; returns the functions dispatch calls.

    Args:
        backend: its name.
        recompute_tokens: up to this many key tokens the backward works the state out again; beyond,
            the forward saves it (where a gradient is needed at all).
    """
    fused = register(
        backend,
        "linear_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_save_inputs_and_state,
        backward=_backward,
        flops=_work,
        flops_backward=_backward_work,
        cut="bhnd,bgmd,bgmd -> bhnd,bgxd,bgx; b gh n",
        cut_backward="bhnd,bhnd,bgmd,bgmd,bgxd,bgx -> bhnd,bgmd,bgmd; b gh n+",
    )
    fused_packed = register(
        backend,
        "linear_attention_packed",
        fake=_fake_packed,
        fake_backward=_fake_packed_backward,
        setup_context=_save_inputs_and_state,
        backward=_packed_backward,
        flops=_packed_work,
        flops_backward=_packed_backward_work,
        cut="bnthd -> bnhd,bhxd,bhx; b h",
        cut_backward="bnhd,bnthd,bhxd,bhx -> bnthd; b h",
    )
    state = register(
        backend,
        "linear_attention_state",
        fake=_fake_state,
        fake_backward=_fake_state_backward,
        setup_context=_save_state_inputs,
        backward=_state_backward,
        flops=_state_work,
        flops_backward=_state_backward_work,
        cut="bgmd,bgmd -> bgxd,bgx; b g m+",
        cut_backward="bgxd,bgx,bgmd,bgmd -> bgmd,bgmd; b g m",
    )
    apply = register(
        backend,
        "linear_attention_apply",
        fake=_fake_apply,
        fake_backward=_fake_apply_backward,
        setup_context=_save_apply_inputs,
        backward=_apply_backward,
        flops=_apply_work,
        flops_backward=_apply_backward_work,
        cut="bhnd,bgxd,bgx -> bhnd; b gh n",
        cut_backward="bhnd,bhnd,bgxd,bgx -> bhnd,bgxd,bgx; b gh n+",
    )

    def linear_attention(
        q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
    ) -> Tensor:
        k, v = without_masked(key_mask, k, v)
        training = torch.is_grad_enabled() and needs_gradient(q, k, v)
        return fused(q, k, v, eps, training and k.shape[2] > recompute_tokens)[0]

    def linear_attention_packed(qkv: Tensor, eps: float, key_mask: Tensor | None = None) -> Tensor:
        qkv = without_masked_packed(key_mask, qkv)
        training = torch.is_grad_enabled() and qkv.requires_grad
        return fused_packed(qkv, eps, training and qkv.shape[1] > recompute_tokens)[0]

    def linear_attention_state(
        k: Tensor, v: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return state(*without_masked(key_mask, k, v))

    return Functions(linear_attention, linear_attention_packed, linear_attention_state, apply)


def empty_state(k: Tensor, save_state: bool) -> tuple[Tensor, Tensor]:
    """S and z for keys (B, Hk, M, D), uninitialised; of shape (0,) unless they are to be saved."""
    batch, heads, _, head_dim = k.shape
    S_shape = (batch, heads, 2 * head_dim, head_dim) if save_state else (0,)
    z_shape = S_shape[:3] if save_state else (0,)
    return k.new_empty(S_shape, dtype=torch.float32), k.new_empty(z_shape, dtype=torch.float32)


# ---- the whole operation -------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, v: Tensor, eps: float, save_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), *empty_state(k, save_state)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float, wanted: int
) -> tuple[Tensor, ...]:
    return empty_gradients(wanted, q, k, v)


def _fake_packed(qkv: Tensor, eps: float, save_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(qkv.select(2, 0)), *empty_state(unpack_qkv(qkv)[1], save_state)


def _fake_packed_backward(dout: Tensor, qkv: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
    return empty_like(qkv)


def _save_inputs_and_state(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, _ = inputs
    _, S, z = output
    ctx.save_for_backward(*tensors, S, z)
    ctx.eps = eps
    ctx.mark_non_differentiable(S, z)
    ctx.set_materialize_grads(False)  # zeros for S and z would be written for nobody to read


def _backward(
    kernel: Any, ctx: Any, dout: Tensor, dS: None, dz: None
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    mask = wanted(ctx.needs_input_grad[:3])
    return *kernel(dout, *ctx.saved_tensors, ctx.eps, mask), None, None


def _packed_backward(
    kernel: Any, ctx: Any, dout: Tensor, dS: None, dz: None
) -> tuple[Tensor, None, None]:
    return kernel(dout, *ctx.saved_tensors, ctx.eps), None, None


# Per key token and head 4·D² for S, per query token as much to apply it. Backward twice that: per
# query token S g (of dq and dz) and dS, per key token dk and dv.


def _work(q: Tensor, k: Tensor, *_: object) -> int:
    return 4 * k.shape[-1] * (q.numel() + k.numel())


def _backward_work(dout: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    dq, dk, dv = (is_wanted(rest[-1], i) for i in range(3))
    queries, keys = _apply_work(q), _state_work(k)
    return queries * ((dq or dk) + (dk or dv)) + keys * (dk + dv)


def _packed_work(qkv: Tensor, *_: object) -> int:
    return _work(*unpack_qkv(qkv)[:2])


def _packed_backward_work(dout: Tensor, qkv: Tensor, *_: object) -> int:
    return 2 * _packed_work(qkv)


def _state_work(k: Tensor, *_: object) -> int:
    return 4 * k.shape[-1] * k.numel()


def _state_backward_work(dS: Tensor, dz: Tensor, k: Tensor, v: Tensor, wanted: int) -> int:
    return _state_work(k) * (is_wanted(wanted, 0) + is_wanted(wanted, 1))


def _apply_work(q: Tensor, *_: object) -> int:
    return 4 * q.shape[-1] * q.numel()


def _apply_backward_work(dout: Tensor, q: Tensor, *rest: Any) -> int:
    dq, dS, dz = (is_wanted(rest[-1], i) for i in range(3))
    return _apply_work(q) * ((dq or dz) + dS)


# ---- its two halves ------------------------------------------------------------------------------


def _fake_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_state(k, True)


def _fake_state_backward(
    dS: Tensor, dz: Tensor, k: Tensor, v: Tensor, wanted: int
) -> tuple[Tensor, ...]:
    return empty_gradients(wanted, k, v)


def _save_state_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _state_backward(kernel: Any, ctx: Any, dS: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    k, v = ctx.saved_tensors
    return kernel(dS, dz, k, v, wanted(ctx.needs_input_grad))


def _fake_apply(q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
    return empty_like(q)


def _fake_apply_backward(
    dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float, wanted: int
) -> tuple[Tensor, ...]:
    # dS and dz are contiguous, whatever S and z are.
    return empty_gradients(wanted, q, S.new_empty(S.shape), z.new_empty(z.shape))


def _save_apply_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, S, z, eps = inputs
    ctx.save_for_backward(q, S, z)
    ctx.eps = eps


def _apply_backward(kernel: Any, ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, S, z = ctx.saved_tensors
    return *kernel(dout, q, S, z, ctx.eps, wanted(ctx.needs_input_grad[:3])), None
