"""The whole token pyramid in one call: its shapes, its composition of single stages, and the rule
that says where a backend's fused kernels take it.

A pyramid of S stages has S + 1 levels: level 0 is the finest grid, stage s pools level s along
``axes[s]`` to level s + 1, or expands level s + 1 back to level s.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from linear_vit.kernels.operators import is_wanted

# What the fused kernels are written for. A block, or program, takes a few channels of a whole
# image, so a grid must fit in the 99 KB of shared memory of compute capability 8.6, and there must
# be images and channels enough to fill the GPU. A longer grid fills it in every stage by itself.
FUSED_STAGES = 4
FUSED_TOKENS = 1024
CHANNELS_PER_BLOCK = 64  # at most


class Functions(NamedTuple):
    ripple_pool_stages: Callable[..., Sequence[Tensor]]
    ripple_expand_stages: Callable[..., Tensor]


def compose(pool: Callable[..., Tensor], expand: Callable[..., Tensor]) -> Functions:
    """The multi-stage functions made of a backend's single-stage ones."""

    def ripple_pool_stages(
        x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]
    ) -> list[Tensor]:
        levels = []
        for weight, axis in zip(weights, axes, strict=True):
            x = pool(x, weight, axis)
            levels.append(x)
        return levels

    def ripple_expand_stages(
        z: Tensor,
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        lateral_weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> Tensor:
        for s in reversed(range(len(axes))):
            z = expand(z, levels[s], weights[s], lateral_weights[s], axes[s])
        return z

    return Functions(ripple_pool_stages, ripple_expand_stages)


def fused_where_it_fits(
    fused: Functions, composed: Functions, multiprocessors: Callable[[Any], int]
) -> Functions:
    """The multi-stage functions of a backend with fused kernels: these, or the composition.

    Args:
        fused: operators that take any pyramid that :func:`fits` lets through.
        composed: :func:`compose`'s.
        multiprocessors: of a device.
    """

    def ripple_pool_stages(
        x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]
    ) -> Sequence[Tensor]:
        functions = fused if fits(x, axes, multiprocessors(x.device)) else composed
        return functions.ripple_pool_stages(x, list(weights), list(axes))

    def ripple_expand_stages(
        z: Tensor,
        levels: Sequence[Tensor],
        weights: Sequence[Tensor],
        lateral_weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> Tensor:
        fused_too = len(axes) > 0 and fits(levels[0], axes, multiprocessors(z.device))
        functions = fused if fused_too else composed
        return functions.ripple_expand_stages(
            z, list(levels), list(weights), list(lateral_weights), list(axes)
        )

    return Functions(ripple_pool_stages, ripple_expand_stages)


def fits(x: Tensor, axes: Sequence[int], multiprocessors: int) -> bool:
    """Whether the fused kernels take the pyramid over the finest level x (B, rows, cols, C).

    One stage has nothing to fuse. A block per image and 64 channels has to reach every other
    multiprocessor at least, or the single stages, which share an image among blocks, are better.
    A DTensor goes through the single stages, whose rules say how they are cut.
    """
    batch, rows, cols, channels = x.shape
    blocks = batch * -(-channels // CHANNELS_PER_BLOCK)
    return (
        2 <= len(axes) <= FUSED_STAGES
        and 0 < rows * cols <= FUSED_TOKENS
        and batch > 0
        and 2 * blocks >= multiprocessors
        and not hasattr(x, "placements")
    )


class ExpandNeeds(NamedTuple):
    """What each stage s of an expansion makes backward."""

    coarse: tuple[bool, ...]  # the gradient of the expanded level s + 1, of z at last
    pairs: tuple[bool, ...]  # of the pair weights
    levels: tuple[bool, ...]  # of level s itself
    laterals: tuple[bool, ...]  # of the lateral weights


def pool_needs(wanted: int, stages: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Whether stage s makes, backward, the gradient of level s, and that of its weight.

    A level's is made where a finer one's, or a finer stage's weight's, is asked for.

    Args:
        wanted: of ``kernels.operators.wanted``: x's gradient, then each stage's weight's.
    """
    weights = tuple([is_wanted(wanted, 1 + s) for s in range(stages)])
    return tuple([wanted % (2 << s) != 0 for s in range(stages)]), weights


def expand_needs(wanted: int, stages: int) -> ExpandNeeds:
    """The same of an expansion.

    Args:
        wanted: z's gradient, then those of the levels, the pair weights and the lateral weights.
    """
    levels, pairs, laterals = (
        tuple([is_wanted(wanted, 1 + group * stages + s) for s in range(stages)])
        for group in range(3)
    )
    asked = [any(of_stage) for of_stage in zip(levels, pairs, laterals, strict=True)]
    coarse = tuple([is_wanted(wanted, 0) or any(asked[s + 1 :]) for s in range(stages)])
    return ExpandNeeds(coarse, pairs, levels, laterals)


def pooled_shape(shape: Sequence[int], axis: int) -> tuple[int, int, int, int]:
    """The grid's shape (B, rows, cols, C) after one stage: ⌈n/2⌉ along ``axis``."""
    batch, rows, cols, channels = shape
    if axis == 0:
        return batch, (rows + 1) // 2, cols, channels
    return batch, rows, (cols + 1) // 2, channels


def level_shapes(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The shapes of all levels, from level 0 (``shape``) to the coarsest."""
    batch, rows, cols, channels = shape
    shapes = [(batch, rows, cols, channels)]
    for axis in axes:
        shapes.append(pooled_shape(shapes[-1], axis))
    return shapes


def halving_axes(grid: tuple[int, int], stages: int) -> list[int]:
    """The axis that each stage halves: 0 (rows), 1 (columns), 0, ... passing over size 1.

    Size n becomes ceil(n / 2). Raises ValueError where the grid cannot be halved that often.
    """
    if stages < 0:
        raise ValueError(f"ripple_stages must be at least 0, got {stages}")
    size = list(grid)
    axes: list[int] = []
    while len(axes) < stages and max(size) > 1:
        axis = len(axes) % 2
        if size[axis] == 1:
            axis = 1 - axis
        size[axis] = (size[axis] + 1) // 2
        axes.append(axis)
    if len(axes) < stages:
        raise ValueError(
            f"a token grid of {grid[0]}x{grid[1]} can be halved at most {len(axes)} times, "
            f"got ripple_stages {stages}"
        )
    return axes
