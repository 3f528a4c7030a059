"""Shapes and gradients of ripple's operators, the same for every kernel backend.

A backend defines four operators in the namespace ``linear_vit``::

    <backend>_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor
    <backend>_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis)
        -> (Tensor dx, Tensor dweight)
    <backend>_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)
        -> Tensor
    <backend>_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,
        Tensor lateral_weight, int axis)
        -> (Tensor dz, Tensor dx, Tensor dweight, Tensor dlateral_weight)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from kernels.operators import empty_like, register


class Functions(NamedTuple):
    ripple_pool: Callable[[Tensor, Tensor, int], Tensor]
    ripple_expand: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attach(backend: str) -> Functions:
    """Give the backend's operators shapes and gradients; returns the functions dispatch calls."""
    pool = register(
        backend,
        "ripple_pool",
        fake=_fake_pool,
        fake_backward=_fake_pool_backward,
        setup_context=_save,
        backward=_backward,
    )
    expand = register(
        backend,
        "ripple_expand",
        fake=_fake_expand,
        fake_backward=_fake_expand_backward,
        setup_context=_save,
        backward=_backward,
    )
    return Functions(pool, expand)


def pooled_shape(x: Tensor, axis: int) -> tuple[int, ...]:
    """The grid's shape after one stage: ⌈n/2⌉ along ``axis``."""
    batch, rows, cols, channels = x.shape
    if axis == 0:
        return batch, (rows + 1) // 2, cols, channels
    return batch, rows, (cols + 1) // 2, channels


def _fake_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return empty_like(x, pooled_shape(x, axis))


def _fake_pool_backward(
    dout: Tensor, x: Tensor, weight: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    return empty_like(x), weight.new_empty(weight.shape)


def _fake_expand(z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int) -> Tensor:
    return empty_like(x)


def _fake_expand_backward(
    dout: Tensor, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_like(z),
        empty_like(x),
        weight.new_empty(weight.shape),
        lateral_weight.new_empty(lateral_weight.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, axis = inputs
    ctx.save_for_backward(*tensors)
    ctx.axis = axis


def _backward(kernel: Any, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return *kernel(dout, *ctx.saved_tensors, ctx.axis), None
