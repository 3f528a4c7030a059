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

and, where it has fused kernels for a pyramid of two stages or more, another four. ``levels`` are
the finer levels' own inputs, finest first, so ``levels[0]`` is x and the coarsest is not among
them; the gradients come in one list, in the order of the arguments::

    <backend>_ripple_pool_stages(Tensor x, Tensor[] weights, int[] axes) -> Tensor[]
        (levels 1 to S)
    <backend>_ripple_pool_stages_backward(Tensor[] dlevels, Tensor[] levels, Tensor[] weights,
        int[] axes) -> Tensor[]
        (dx, then a dweight a stage; dlevels are of levels 1 to S)
    <backend>_ripple_expand_stages(Tensor z, Tensor[] levels, Tensor[] weights,
        Tensor[] lateral_weights, int[] axes) -> Tensor
    <backend>_ripple_expand_stages_backward(Tensor dout, Tensor z, Tensor[] levels,
        Tensor[] weights, Tensor[] lateral_weights, int[] axes) -> Tensor[]
        (dz, then the levels', the weights' and the lateral weights' gradients)
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from linear_vit.kernels.layout import empty_like
from linear_vit.kernels.operators import register
from linear_vit.kernels.ripple import stages
from linear_vit.kernels.ripple.stages import level_shapes, pooled_shape


class Functions(NamedTuple):
    ripple_pool: Callable[[Tensor, Tensor, int], Tensor]
    ripple_expand: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attach(backend: str) -> Functions:
    """Give the backend's operators shapes and gradients; returns the functions dispatch calls."""
    pool = register(
        backend,
        "ripple_pool",
        fake=_fake_pool,
        flops=_pool_work,
        flops_backward=_pool_backward_work,
        fake_backward=_fake_pool_backward,
        setup_context=_save,
        backward=_backward,
        batch_first=False,
    )
    expand = register(
        backend,
        "ripple_expand",
        fake=_fake_expand,
        flops=_expand_work,
        flops_backward=_expand_backward_work,
        fake_backward=_fake_expand_backward,
        setup_context=_save,
        backward=_backward,
        batch_first=False,
    )
    return Functions(pool, expand)


def attach_stages(backend: str) -> stages.Functions:
    """The same for the fused operators."""
    pool = register(
        backend,
        "ripple_pool_stages",
        fake=_fake_pool_stages,
        flops=_pool_stages_work,
        flops_backward=_pool_stages_backward_work,
        fake_backward=_fake_pool_stages_backward,
        setup_context=_save_pool_stages,
        backward=_stages_backward,
        batch_first=False,
        pack=_in_lists(1),
        pack_backward=_in_lists(0),
    )
    expand = register(
        backend,
        "ripple_expand_stages",
        fake=_fake_expand_stages,
        flops=_expand_stages_work,
        flops_backward=_expand_stages_backward_work,
        fake_backward=_fake_expand_stages_backward,
        setup_context=_save_expand_stages,
        backward=_stages_backward,
        batch_first=False,
        pack=_in_lists(1),
        pack_backward=_in_lists(2),
    )

    def ripple_pool_stages(
        x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]
    ) -> Sequence[Tensor]:
        return pool(axes, x, *weights)

    def ripple_expand_stages(
        z: Tensor,
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        lateral_weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> Tensor:
        return expand(axes, z, *levels, *weights, *lateral_weights)

    return stages.Functions(ripple_pool_stages, ripple_expand_stages)


# ---- one stage -----------------------------------------------------------------------------------


def _fake_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return empty_like(x, pooled_shape(x.shape, axis))


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


# ---- a pyramid -----------------------------------------------------------------------------------


def _fake_pool_stages(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    return [empty_like(x, shape) for shape in level_shapes(x.shape, axes)[1:]]


def _fake_pool_stages_backward(
    dlevels: Sequence[Tensor],
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    axes: Sequence[int],
) -> list[Tensor]:
    return [empty_like(levels[0]), *(w.new_empty(w.shape) for w in weights)]


def _fake_expand_stages(
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
) -> Tensor:
    return empty_like(levels[0])


def _fake_expand_stages_backward(
    dout: Tensor,
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
) -> list[Tensor]:
    filters = [w.new_empty(w.shape) for w in (*weights, *lateral_weights)]
    return [empty_like(z), *(empty_like(x) for x in levels), *filters]


def _in_lists(alone: int) -> Callable[..., tuple[Any, ...]]:
    """From (axes, *tensors) to the operator's arguments: ``alone`` tensors, then lists of one a
    stage, then the axes."""

    def pack(axes: Sequence[int], *tensors: Tensor) -> tuple[Any, ...]:
        starts = range(alone, len(tensors), len(axes))
        lists = [list(tensors[start : start + len(axes)]) for start in starts]
        return *tensors[:alone], *lists, axes

    return pack


def _save_pool_stages(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.axes, x, *weights = inputs
    ctx.save_for_backward(x, *output[:-1], *weights)


def _save_expand_stages(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axes, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _stages_backward(kernel: Any, ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    return None, *kernel(ctx.axes, *gradients, *ctx.saved_tensors)


# ---- least work: nine products and sums an element, one more for the pair; twice that backward --


def _pool_work(x: Tensor, weight: Tensor, axis: int) -> int:
    return 18 * prod(pooled_shape(x.shape, axis))


def _pool_backward_work(dout: Tensor, x: Tensor, weight: Tensor, axis: int) -> int:
    return 2 * _pool_work(x, weight, axis)


def _expand_work(z: Tensor, x: Tensor, *_: object) -> int:
    return 20 * x.numel()


def _expand_backward_work(dout: Tensor, z: Tensor, x: Tensor, *_: object) -> int:
    return 40 * x.numel()


def _pool_stages_work(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> int:
    return sum(18 * prod(shape) for shape in level_shapes(x.shape, axes)[1:])


def _pool_stages_backward_work(
    dlevels: Sequence[Tensor], levels: Sequence[Tensor], weights: Sequence[Tensor], axes: list[int]
) -> int:
    return 2 * _pool_stages_work(levels[0], weights, axes)


def _expand_stages_work(z: Tensor, levels: Sequence[Tensor], *_: object) -> int:
    return sum(20 * x.numel() for x in levels)


def _expand_stages_backward_work(
    dout: Tensor, z: Tensor, levels: Sequence[Tensor], *_: object
) -> int:
    return 2 * _expand_stages_work(z, levels)
