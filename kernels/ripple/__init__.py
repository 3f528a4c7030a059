"""Ripple pooling and expansion: one stage of a token pyramid on a channels-last grid."""

from torch import Tensor

from kernels.backends import run
from kernels.layout import autocast_inputs
from kernels.validation import check_axis, check_same, check_size, check_tensor

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
    check_axis(axis)
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
    check_axis(axis)
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


def _check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    check_tensor(name, weight, "(C, 3, 3)")
    check_size(name, weight, 0, x.shape[3], "x's channels")
    check_size(name, weight, 1, 3, "the window's rows")
    check_size(name, weight, 2, 3, "the window's columns")
