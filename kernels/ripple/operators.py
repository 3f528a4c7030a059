"""Shapes and gradients of ripple's operators, the same for every kernel backend.

A backend defines four operators in the namespace ``linear_vit``::

    <backend>_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor
    <backend>_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis, int wanted)
        -> (Tensor dx, Tensor dweight)
    <backend>_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)
        -> Tensor
    <backend>_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,
        Tensor lateral_weight, int axis, int wanted)
        -> (Tensor dz, Tensor dx, Tensor dweight, Tensor dlateral_weight)

and, where it has fused kernels for a pyramid of two stages or more, another four. ``levels`` are
the finer levels' own inputs, finest first, so ``levels[0]`` is x and the coarsest is not among
them; the gradients come in one list, in the order of the arguments::

    <backend>_ripple_pool_stages(Tensor x, Tensor[] weights, int[] axes) -> Tensor[]
        (levels 1 to S)
    <backend>_ripple_pool_stages_backward(Tensor[] dlevels, Tensor[] levels, Tensor[] weights,
        int[] axes, int wanted) -> Tensor[]
        (dx, then a dweight a stage; dlevels are of levels 1 to S)
    <backend>_ripple_expand_stages(Tensor z, Tensor[] levels, Tensor[] weights,
        Tensor[] lateral_weights, int[] axes) -> Tensor
    <backend>_ripple_expand_stages_backward(Tensor dout, Tensor z, Tensor[] levels,
        Tensor[] weights, Tensor[] lateral_weights, int[] axes, int wanted) -> Tensor[]
        (dz, then the levels', the weights' and the lateral weights' gradients)

``wanted`` says which gradients are asked for (``kernels.operators.wanted``), in the order in which
they come out. The others come out empty, and nothing is done for them alone: without a weight's
gradient x is not read, and a pyramid goes no further than the last level that is asked for. (The
CUDA kernels skip less: what they make in one launch; see ``cuda.cu``.)
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from linear_vit.kernels.layout import empty_like
from linear_vit.kernels.operators import empty_gradients, is_wanted, register, wanted
from linear_vit.kernels.ripple import stages
from linear_vit.kernels.ripple.stages import expand_needs, level_shapes, pool_needs, pooled_shape


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
        cut="brsc,cij -> brsc; b c",
        cut_backward="brsc,brsc,cij -> brsc,cij; b+ c",
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
        cut="brsc,brsc,pc,cij -> brsc; b c",
        cut_backward="brsc,brsc,brsc,pc,cij -> brsc,brsc,pc,cij; b+ c",
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
        pack_backward=_in_lists(0, numbers=1),
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
        pack_backward=_in_lists(2, numbers=1),
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


def empty_gradients_of(
    mask: int, grids: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Memory for those asked for: the grids' in their memory orders, then the weights', dense."""
    of_weights = [
        w.new_empty(w.shape if is_wanted(mask, i) else (0,))
        for i, w in enumerate(weights, start=len(grids))
    ]
    return [*empty_gradients(mask, *grids), *of_weights]


# ---- one stage -----------------------------------------------------------------------------------


def _fake_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return empty_like(x, pooled_shape(x.shape, axis))


def _fake_pool_backward(
    dout: Tensor, x: Tensor, weight: Tensor, axis: int, wanted: int
) -> tuple[Tensor, ...]:
    return tuple(empty_gradients_of(wanted, [x], [weight]))


def _fake_expand(z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int) -> Tensor:
    return empty_like(x)


def _fake_expand_backward(
    dout: Tensor, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int,
    wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(empty_gradients_of(wanted, [z, x], [weight, lateral_weight]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, axis = inputs
    ctx.save_for_backward(*tensors)
    ctx.axis = axis


def _backward(kernel: Any, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return *kernel(dout, *ctx.saved_tensors, ctx.axis, wanted(ctx.needs_input_grad[:-1])), None


# ---- a pyramid -----------------------------------------------------------------------------------


def _fake_pool_stages(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    return [empty_like(x, shape) for shape in level_shapes(x.shape, axes)[1:]]


def _fake_pool_stages_backward(
    dlevels: Sequence[Tensor],
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    axes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    return empty_gradients_of(wanted, levels[:1], weights)


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
    wanted: int,
) -> list[Tensor]:
    return empty_gradients_of(wanted, [z, *levels], [*weights, *lateral_weights])


def _in_lists(alone: int, numbers: int = 0) -> Callable[..., tuple[Any, ...]]:
    """From (axes, *numbers, *tensors) to the operator's arguments: ``alone`` tensors, then lists of
    one a stage, then the axes and the numbers."""

    def pack(axes: Sequence[int], *inputs: Any) -> tuple[Any, ...]:
        tensors = inputs[numbers:]
        starts = range(alone, len(tensors), len(axes))
        lists = [list(tensors[start : start + len(axes)]) for start in starts]
        return *tensors[:alone], *lists, axes, *inputs[:numbers]

    return pack


def _save_pool_stages(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.axes, x, *weights = inputs
    ctx.save_for_backward(x, *output[:-1], *weights)


def _save_expand_stages(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.axes, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _stages_backward(kernel: Any, ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    mask = wanted(ctx.needs_input_grad[1:])
    return None, *kernel(ctx.axes, mask, *gradients, *ctx.saved_tensors)


# ---- least work: nine products and sums an element, one more for the pair; backward as much for
# each side of a product, as far as it is asked for ------------------------------------------------


def _pool_work(x: Tensor, weight: Tensor, axis: int) -> int:
    return _pool_stages_work(x, [weight], [axis])


def _pool_backward_work(dout: Tensor, x: Tensor, weight: Tensor, axis: int, wanted: int) -> int:
    return _pool_stages_backward_work([dout], [x], [weight], [axis], wanted)


def _expand_work(z: Tensor, x: Tensor, *_: object) -> int:
    return _expand_stages_work(z, [x])


def _expand_backward_work(dout: Tensor, z: Tensor, x: Tensor, *rest: Any) -> int:
    return _expand_stages_backward_work(dout, z, [x], rest[-1])


def _pool_stages_work(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> int:
    return sum(18 * prod(shape) for shape in level_shapes(x.shape, axes)[1:])


def _pool_stages_backward_work(
    dlevels: Sequence[Tensor], levels: Sequence[Tensor], weights: Sequence[Tensor],
    axes: Sequence[int], wanted: int,
) -> int:  # fmt: skip
    coarser = level_shapes(levels[0].shape, axes)[1:]
    needs = zip(*pool_needs(wanted, len(axes)), strict=True)
    return sum(
        18 * prod(shape) * (level + weight)
        for shape, (level, weight) in zip(coarser, needs, strict=True)
    )


def _expand_stages_work(z: Tensor, levels: Sequence[Tensor], *_: object) -> int:
    return sum(20 * x.numel() for x in levels)


def _expand_stages_backward_work(
    dout: Tensor, z: Tensor, levels: Sequence[Tensor], *rest: Any
) -> int:
    needs = zip(*expand_needs(rest[-1], len(levels)), strict=True)
    return sum(
        x.numel() * (2 * (coarse + pair) + 18 * (level + lateral))
        for x, (coarse, pair, level, lateral) in zip(levels, needs, strict=True)
    )
