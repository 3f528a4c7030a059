"""Ripple pooling and expansion: a token pyramid on a channels-last grid, a stage or all at once."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from linear_vit.kernels.backends import run
from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.ripple.stages import level_shapes
from linear_vit.kernels.validation import check_axis, check_same, check_size, check_tensor

_GRID = "(B, rows, cols, C)"


def ripple_pool(x: Tensor, weight: Tensor, *, axis: int, backend: str | None = None) -> Tensor:
    """Halve a token grid along one axis: depthwise 3×3 cross-correlation, zero padding 1.

    Stride 2 along ``axis`` and 1 along the other: n tokens become ⌈n/2⌉.

    Args:
        x: the grid (B, rows, cols, C), channels last; float32, float16 or bfloat16 (float64 on the
            reference). The last axis is contiguous, every other stride is free.
        weight: (C, 3, 3), of x's dtype and device.
        axis: 0 halves rows, 1 halves columns.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        The coarser grid, in x's dtype and memory order, accumulated in float32.

    Raises:
        TypeError, ValueError: a bad argument, named, before anything is launched; or a backend
            that can't run this, with the reason.
    """
    x, weight = autocast_inputs(x, weight)
    check_tensor("x", x, _GRID)
    _check_weight("weight", weight, x)
    axis = check_axis(axis)
    check_same(x=x, weight=weight)
    return run("ripple_pool", backend, x, weight, axis)


def ripple_expand(
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    lateral_weight: Tensor,
    *,
    axis: int,
    backend: str | None = None,
) -> Tensor:
    """Double a token grid along one axis, adding the finer level's own local detail.

    Token j along ``axis`` is ``weight[j % 2] * z[j // 2]`` plus the depthwise 3×3
    cross-correlation (zero padding 1, stride 1) of x with ``lateral_weight`` at j. An odd finer
    size cuts the last pair.

    Args:
        z: the coarser grid, (B, ⌈rows/2⌉, cols, C) for axis 0, (B, rows, ⌈cols/2⌉, C) for axis 1.
        x: the finer level's own input (B, rows, cols, C), as for :func:`ripple_pool`.
        weight: (2, C), for even and odd tokens along ``axis``.
        lateral_weight: (C, 3, 3).
        axis: 0 doubles rows, 1 doubles columns.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        The finer grid (B, rows, cols, C), in x's dtype and memory order.

    Raises:
        TypeError, ValueError: as :func:`ripple_pool`.
    """
    z, x, weight, lateral_weight = autocast_inputs(z, x, weight, lateral_weight)
    check_tensor("z", z, _GRID)
    check_tensor("x", x, _GRID)
    axis = check_axis(axis)
    check_tensor("weight", weight, "(2, C)")
    check_size("weight", weight, 0, 2, "even and odd tokens")
    check_size("weight", weight, 1, x.shape[3], "x's channels")
    _check_weight("lateral_weight", lateral_weight, x)
    for grid_axis, meaning in ((0, "x's batch"), (1, "rows"), (2, "columns"), (3, "x's channels")):
        expected = x.shape[grid_axis]
        if grid_axis == axis + 1:
            expected, meaning = (expected + 1) // 2, f"half of x's {meaning}, rounded up"
        check_size("z", z, grid_axis, expected, meaning)
    check_same(x=x, z=z, weight=weight, lateral_weight=lateral_weight)
    return run("ripple_expand", backend, z, x, weight, lateral_weight, axis)


def ripple_pool_stages(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    axes: Sequence[int],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """A whole pyramid: :func:`ripple_pool` along ``axes[0]``, of its result along ``axes[1]``, ...

    Args:
        x: level 0, as for :func:`ripple_pool`.
        weights: one (C, 3, 3) a stage, finest first.
        axes: the axis that each stage halves, 0 (rows) or 1 (columns); any number of stages.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one. A backend
            with fused kernels takes them where a grid fits, else single stages.

    Returns:
        Levels 1, 2, ...: each stage's result, finest first, rounded to x's dtype like a single
        stage's before the next one reads it. x itself is not among them.

    Raises:
        TypeError, ValueError: as :func:`ripple_pool`; or weights and axes that differ in number.
    """
    axes = _check_stages(axes, weights=weights)
    x, *filters = autocast_inputs(x, *weights)
    check_tensor("x", x, _GRID)
    for s, weight in enumerate(filters):
        _check_weight(f"weights[{s}]", weight, x)
        check_same(**{"x": x, f"weights[{s}]": weight})
    return tuple(run("ripple_pool_stages", backend, x, filters, axes))


def ripple_expand_stages(
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    *,
    axes: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Back up a whole pyramid: :func:`ripple_expand` along ``axes[-1]``, ..., along ``axes[0]``.

    Args:
        z: the coarsest grid, level S of S stages.
        levels: the finer levels' own inputs, finest first: (x, level 1, ..., level S - 1), where
            ``levels[s]`` halved along ``axes[s]`` has the size of ``levels[s + 1]``, and the last
            one that of z.
        weights: one (2, C) a stage, finest first.
        lateral_weights: one (C, 3, 3) a stage, finest first.
        axes: the axis that each stage doubles, finest first, as for :func:`ripple_pool_stages`.
        backend: as for :func:`ripple_pool_stages`.

    Returns:
        The finest grid, of the shape, dtype and memory order of ``levels[0]``; z for no stages.
        Between stages a fused kernel keeps float32 where single stages round.

    Raises:
        TypeError, ValueError: as :func:`ripple_expand`; or lists that differ in number.
    """
    axes = _check_stages(axes, levels=levels, weights=weights, lateral_weights=lateral_weights)
    count = len(axes)
    z, *tensors = autocast_inputs(z, *levels, *weights, *lateral_weights)
    check_tensor("z", z, _GRID)
    grids, pairs, laterals = (tensors[i * count : (i + 1) * count] for i in range(3))
    for s, (x, weight, lateral_weight) in enumerate(zip(grids, pairs, laterals, strict=True)):
        check_tensor(f"levels[{s}]", x, _GRID)
        check_tensor(f"weights[{s}]", weight, "(2, C)")
        check_size(f"weights[{s}]", weight, 0, 2, "even and odd tokens")
        check_size(f"weights[{s}]", weight, 1, z.shape[3], "z's channels")
        _check_weight(f"lateral_weights[{s}]", lateral_weight, z)
        named = {f"levels[{s}]": x, f"weights[{s}]": weight}
        check_same(z=z, **named, **{f"lateral_weights[{s}]": lateral_weight})
    if grids:
        shapes = level_shapes(grids[0].shape, axes)
        names = (*(f"levels[{s}]" for s in range(count)), "z")
        for s, (name, x) in enumerate(zip(names, (*grids, z), strict=True)):
            for grid_axis, expected in enumerate(shapes[s]):
                check_size(name, x, grid_axis, expected, f"levels[0]'s after {s} halvings")
    return run("ripple_expand_stages", backend, z, grids, pairs, laterals, axes)


def _check_stages(axes: Sequence[int], **lists: Sequence[Tensor]) -> tuple[int, ...]:
    """The axes, checked, with as many of everything else."""
    if isinstance(axes, int) or not _is_sequence(axes):
        raise TypeError(f"axes must be a sequence of 0 (rows) and 1 (columns), got {axes!r}")
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not _is_sequence(tensors):
            raise TypeError(
                f"{name} must be a sequence of tensors, one a stage, got {type(tensors).__name__}"
            )
        if len(tensors) != len(axes):
            raise ValueError(f"{name} must be {len(axes)}, one a stage of axes, got {len(tensors)}")
    return tuple(check_axis(axis) for axis in axes)


def _is_sequence(x: object) -> bool:
    """Also an ``nn.ParameterList`` or an array, which ``Sequence`` doesn't know as its own."""
    return hasattr(x, "__len__") and hasattr(x, "__getitem__") and not isinstance(x, Mapping)


def _check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    check_tensor(name, weight, "(C, 3, 3)")
    check_size(name, weight, 0, x.shape[3], "x's channels")
    check_size(name, weight, 1, 3, "the window's rows")
    check_size(name, weight, 2, 3, "the window's columns")
