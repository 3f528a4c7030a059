"""A vision transformer over several processes, each with a band of the token grid's rows.

Linear attention exchanges its state, and softmax attention gathers keys and values (PyTorch's
context parallelism, which moves them round a ring, takes its own CUDA kernels alone). What reads
neighbours, a 3x3 filter or a stage of the pyramid, exchanges the rows at the bands' edges: a band
goes through the same kernels as a whole grid, with its neighbours' rows put to it before and cut
off after.

All exchanges have their gradients. So what a process finds of a loss that all of the group
compute is its part of the gradient of the sum of their losses, and the mean over the processes,
which is what data parallelism takes, is the gradient of one of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from linear_vit.attention.baseline import BaselineAttention
from linear_vit.attention.hydra import HydraAttention
from linear_vit.attention.layers import Grid, LocalBranch
from linear_vit.attention.linear import LinearAttention
from linear_vit.attention.ripple import RippleAttention, RippleStage
from linear_vit.attention.vit import DropPath, VisionTransformer
from linear_vit.kernels import (
    linear_attention_sharded,
    ripple_expand,
    ripple_pool,
    softmax_attention_sharded,
)
from linear_vit.kernels.exchanges import exchanged, rank_in, summed
from linear_vit.kernels.functions import transformable
from linear_vit.kernels.layout import unpack_qkv
from linear_vit.kernels.ripple.stages import halving_axes


def shard_sequence(model: VisionTransformer, group: Any = None) -> VisionTransformer:
    """Makes a model sequence-parallel, in place: every process of a group has a band of patch rows.

    Every process calls the model with the same images, whole, and gets the same logits. It keeps
    the activations of its own band alone. Parameters and their names stay as they are, so that
    checkpoints are those of one process. The mean of the gradients over the processes is that of
    one process with the whole grid: DistributedDataParallel or FSDP over all processes, those of
    data parallelism among them, takes it, and needs to know of nothing.

    Images whose branch is dropped (``drop_path``) are the same in a group, as its first process
    draws them. Dropout is drawn by each process for its own tokens: give them seeds that differ.

    Args:
        model: with attention of :mod:`linear_vit.attention`. ``torch.compile`` it afterwards, by
            ``model.compile()``; the graph breaks where ``drop_path`` draws, and nowhere else.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for all processes. Bands
            start where every halving of rows divides, are as even as that allows, and may differ.

    Returns:
        The model.

    Raises:
        TypeError: a model or an attention that is none of ours, or is sharded already.
        ValueError: a mesh of more dimensions, or fewer rows than the processes need.
        RuntimeError: torch.distributed is not initialised, or this process is not of the group. A
            call of the model raises it where others do not answer, with their ranks.
    """
    unknown = [type(m) for m in _attention(model) if type(m) not in _SHARDED]
    if type(model) is not VisionTransformer or unknown:
        name = (unknown or [type(model)])[0].__name__
        raise TypeError(
            f"shard_sequence takes a VisionTransformer, once, with attention of "
            f"{', '.join(kind.__name__ for kind in _ATTENTION)}; got {name}"
        )
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, got {group.ndim}")
        group = group.get_group()
    rank = rank_in(group, "shard_sequence")
    group = dist.group.WORLD if group is None else group
    halvings = max(map(_row_halvings, _attention(model), [model.grid] * len(model.blocks)))
    band = Band(group, rank, _starts(model.grid, halvings, dist.get_world_size(group)))
    modules: list[Any] = list(model.modules())
    for module in modules:
        if sharded := _SHARDED.get(type(module)):
            module.__class__ = sharded
            module.band = band
    for module in modules:
        if isinstance(module, _Ripple):
            module.take_axes(model.grid)
        elif isinstance(module, _DropPath):
            # In a graph nothing would keep this exchange, which reads no activation, in the same
            # place among the others in every process. Not as a decorator, which imports Dynamo.
            module.drawn = torch.compiler.disable(module.drawn)  # type: ignore[method-assign]
    return model


@dataclass(frozen=True)
class Band:
    """The rows of a token grid that a process has: ``starts[rank]`` to ``starts[rank + 1]``."""

    group: "dist.ProcessGroup"
    rank: int
    starts: tuple[int, ...]  # of each process's rows, and the number of rows

    @property
    def rows(self) -> slice:
        return slice(self.starts[self.rank], self.starts[self.rank + 1])

    @property
    def counts(self) -> list[int]:
        """The rows of each process."""
        return [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]

    @property
    def neighbours(self) -> list[int]:
        """How many rows each process exchanges with this one, one or none."""
        return [int(abs(rank - self.rank) == 1) for rank in range(len(self.counts))]

    @property
    def edges(self) -> tuple[int, int]:
        """Whether there is a process with rows above these, and one with rows below, as 0 or 1."""
        return int(self.rank > 0), int(self.rank < len(self.counts) - 1)

    def halved(self, axis: int) -> "Band":
        """The same rows where an axis of the grid was halved, 0 for the rows themselves."""
        if axis == 1:
            return self
        return Band(self.group, self.rank, tuple((start + 1) // 2 for start in self.starts))


def _starts(grid: Grid, halvings: int, processes: int) -> tuple[int, ...]:
    rows, unit = grid[0], 2**halvings
    units = -(-rows // unit)
    if units < processes:
        raise ValueError(
            f"a token grid of {grid[0]}x{grid[1]}, whose rows are halved {halvings} times, has "
            f"{units} bands of {unit} rows at most, too few for {processes} processes"
        )
    return tuple(min(rows, unit * (units * rank // processes)) for rank in range(processes + 1))


def _row_halvings(attention: nn.Module, grid: Grid) -> int:
    stages = len(attention.stages) if isinstance(attention, RippleAttention) else 0
    return halving_axes(grid, stages).count(0)


# ---- rows of neighbours --------------------------------------------------------------------------


def _above(band: Band, axis: int) -> int:
    """Rows put above a band for a stage along an axis: the neighbour's, and where rows go in pairs
    one of zeros before it."""
    return band.edges[0] * (2 - axis)


class _Extended(torch.autograd.Function):
    """A band (B, rows, cols, C) with its neighbours' rows: one exchange, and one of the gradients.

    At the image's own edge there is no such row, and the kernels pad as ever. By hand, as autograd
    would make a grid of zeros for each row.
    """

    @staticmethod
    def forward(level: Tensor, band: Band, axis: int) -> Tensor:
        above, below = band.edges
        rows = [level[:, :1]] * above + [level[:, -1:]] * below
        there = _swapped(rows, band)
        zeros = [torch.zeros_like(row) for row in there[: _above(band, axis) - above]]
        return torch.cat([*zeros, *there[:above], level, *there[above:]], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.band, ctx.axis = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        above, below = ctx.band.edges
        first, last = _above(ctx.band, ctx.axis), gradient.shape[1] - below
        rows = [gradient[:, first - 1 : first]] * above + [gradient[:, last:]] * below
        there = _swapped(rows, ctx.band)
        whole = gradient[:, first:last].clone()
        if above:
            whole[:, :1] += there[0]
        if below:
            whole[:, -1:] += there[-1]
        return whole, None, None


_extend = transformable(_Extended)


def _swapped(rows: list[Tensor], band: Band) -> list[Tensor]:
    """The neighbours' rows for these (B, 1, cols, C), the upper neighbour's first."""
    if not rows:
        return rows
    both = exchanged(torch.stack(rows), band.neighbours, band.neighbours, band.group)
    return list(both.unbind(0))


def _extended(level: Tensor, band: Band, axis: int = 1) -> Tensor:
    return _extend(level, band, axis)


def _cropped(level: Tensor, band: Band, axis: int = 1) -> Tensor:
    """What is left of a band that was extended."""
    return level[:, _above(band, axis) : level.shape[1] - band.edges[1]]


# ---- the modules ---------------------------------------------------------------------------------


class _Baseline(BaselineAttention):
    band: Band

    def attend(self, qkv: Tensor) -> Tensor:
        columns = qkv.shape[1] // self.band.counts[self.band.rank]
        tokens = [rows * columns for rows in self.band.counts]
        q, k, v = unpack_qkv(qkv)
        out = softmax_attention_sharded(
            q, k, v, self.band.group, tokens=tokens, backend=self.backend
        )
        return out.transpose(1, 2)


class _Linear(LinearAttention):
    band: Band

    def attend(self, qkv: Tensor) -> Tensor:
        return _linear_attention(qkv, self.band, self.backend)


class _Hydra(HydraAttention):
    band: Band

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention_sharded(q, k, v, self.band.group, backend=self.backend)


class _Ripple(RippleAttention):
    band: Band
    axes: list[int]

    def take_axes(self, grid: Grid) -> None:
        """The axes that the stages halve of the whole grid, not of a band."""
        self.axes = halving_axes(grid, len(self.stages))
        if isinstance(self.local, _LocalBranch):  # it is on the coarsest grid
            for axis in self.axes:
                self.local.band = self.local.band.halved(axis)

    def pyramid(self, level: Tensor) -> Tensor:
        of = [stage for stage in self.stages if isinstance(stage, RippleStage)]
        band, passed = self.band, []
        for stage, axis in zip(of, self.axes, strict=True):
            wide = _extended(level, band, axis)
            level = ripple_pool(wide, stage.pool_weight, axis=axis, backend=self.backend)
            level = _cropped(level, band)
            passed.append((stage, axis, band, wide))
            band = band.halved(axis)
        level = self.at_the_top(level)
        for stage, axis, band, wide in reversed(passed):
            coarse = F.pad(level, (0, 0, 0, 0, *band.edges))  # for rows that are cut off again
            weights = stage.expand_weight, stage.lateral_weight
            level = ripple_expand(coarse, wide, *weights, axis=axis, backend=self.backend)
            level = _cropped(level, band, axis)
        return level

    def attend(self, qkv: Tensor) -> Tensor:
        return _linear_attention(qkv, self.band, self.backend)


def _linear_attention(qkv: Tensor, band: Band, backend: str | None) -> Tensor:
    q, k, v = unpack_qkv(qkv)
    return linear_attention_sharded(q, k, v, band.group, backend=backend).transpose(1, 2)


class _LocalBranch(LocalBranch):
    band: Band

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        wide = _extended(x.unflatten(1, grid), self.band)
        size = (wide.shape[1], wide.shape[2])
        out = super().forward(wide.flatten(1, 2), size).unflatten(1, size)
        return _cropped(out, self.band).flatten(1, 2)


class _DropPath(DropPath):
    band: Band

    def drawn(self, x: Tensor, keep: float) -> Tensor:
        mine = super().drawn(x, keep)
        return summed(self.band.group, mine if self.band.rank == 0 else mine.zero_())[0]


class _VisionTransformer(VisionTransformer):
    band: Band

    def forward(self, images: Tensor) -> Tensor:
        self.check_images(images)
        rows, cols, side = self.band.rows, self.grid[1], self.patch_embedding.patch_size
        band = images[:, :, rows.start * side : rows.stop * side]
        positions = self.positions[:, rows.start * cols : rows.stop * cols]
        x = self.dropout(self.patch_embedding(band) + positions)
        for block in self.blocks:
            x = block(x, (rows.stop - rows.start, cols))
        x = self.norm(x)
        # A sum in half precision would round what the mean doesn't, and may overflow.
        part = x.sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        (whole,) = summed(self.band.group, part)
        return self.head((whole / (self.grid[0] * cols)).to(x.dtype))


_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    BaselineAttention: _Baseline,
    LinearAttention: _Linear,
    HydraAttention: _Hydra,
    RippleAttention: _Ripple,
}
_SHARDED: dict[type[nn.Module], type[nn.Module]] = {
    **_ATTENTION,
    LocalBranch: _LocalBranch,
    DropPath: _DropPath,
    VisionTransformer: _VisionTransformer,
}


def _attention(model: nn.Module) -> list[nn.Module]:
    return [block.attention for block in getattr(model, "blocks", ())]
