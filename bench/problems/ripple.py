"""Ripple pooling and expansion: one stage, and the whole pyramid in one call."""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from linear_vit import kernels
from linear_vit.bench.problems.case import (
    FORWARD,
    FORWARD_BACKWARD,
    Shape,
    Wanted,
    Work,
    Workload,
)
from linear_vit.bench.problems.inputs import Drawn, Normal, Run, Tensors
from linear_vit.kernels.ripple.stages import halving_axes

T = TypeVar("T")
CHANNELS = 384
_STAGES = 3  # the module's, as it is configured by default
# Grids from 8×8 to 64×64 tokens; --tokens may name others.
_GRIDS = {"quick": (64, 256, 512, 1024, 4096), "full": tuple(2**i for i in range(6, 13))}


@dataclass(frozen=True)
class RippleShape(Shape):
    """Batch, token grid, channels, and the axis (0 rows, 1 columns) that is halved.

    A pyramid has the module's three stages, or as many as the grid has halvings.
    """

    B: int
    rows: int
    cols: int
    C: int
    axis: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.cols

    @property
    def coarse(self) -> tuple[int, int]:
        """The grid after one halving along ``axis``."""
        if self.axis == 0:
            return (self.rows + 1) // 2, self.cols
        return self.rows, (self.cols + 1) // 2

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis that each stage of the pyramid halves."""
        most = (self.rows - 1).bit_length() + (self.cols - 1).bit_length()
        return tuple(halving_axes((self.rows, self.cols), min(_STAGES, most)))

    @property
    def levels(self) -> list[tuple[int, int]]:
        """The pyramid's grids, finest first."""
        grids = [(self.rows, self.cols)]
        for axis in self.axes:
            grids.append(replace(self, rows=grids[-1][0], cols=grids[-1][1], axis=axis).coarse)
        return grids


# Grids on which a kernel's time is seen, and fewer of them that launch the same.
_STAGE = (partial(RippleShape, 128, 32, 32), partial(RippleShape, 16, 32, 32))
_PYRAMID = (partial(RippleShape, 128, 8, 8), partial(RippleShape, 16, 8, 8))


class _Ripple(Drawn):
    """What the four have in common."""

    quick = True
    poisoned: ClassVar[Sequence[str]] = ("x",)

    def shape(self, tokens: int, batch: int = 1) -> RippleShape:
        """The squarest grid of N tokens."""
        rows = next(r for r in range(int(tokens**0.5), 0, -1) if tokens % r == 0)
        return RippleShape(batch, rows, tokens // rows, CHANNELS)

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        return _GRIDS[extent]

    def check_shapes(self, head_dim: int, *, interpreted: bool = False) -> tuple[RippleShape, ...]:
        if interpreted:
            return (RippleShape(1, 5, 4, 8, axis=0), RippleShape(1, 4, 5, 8, axis=1))
        return (RippleShape(2, 8, 8, 48, axis=0), RippleShape(1, 7, 5, 33, axis=1))

    def edge_shapes(self, head_dim: int) -> tuple[RippleShape, ...]:
        return (RippleShape(1, 1, 1, 1), RippleShape(1, 1, 7, 3, axis=1))

    def draw_shape(self, drawn: random.Random, head_dim: int) -> RippleShape:
        rows, cols, channels = drawn.randint(1, 9), drawn.randint(1, 9), drawn.randint(1, 70)
        return RippleShape(drawn.randint(1, 3), rows, cols, channels, drawn.randint(0, 1))

    def traffic_shapes(self, head_dim: int) -> tuple[RippleShape, ...]:
        return tuple(RippleShape(2, 8, 8, 64, axis) for axis in (0, 1))

    def static_shapes(self, head_dim: int, *, ragged: bool) -> tuple[RippleShape, ...]:
        if ragged:
            return tuple(RippleShape(b, 7, 5, 33, axis) for b in (1, 128) for axis in (0, 1))
        # The grids of a ViT-S on 32x32 and 64x64 images, with images enough for a pyramid in one
        # launch; and one past any shared memory.
        grids = ((32, 8), (32, 16), (1, 128))
        return tuple(RippleShape(b, n, n, 384, axis) for b, n in grids for axis in (0, 1))

    def working_set(self, mode: str, backend: str, shape: RippleShape) -> int:
        elements = self.least_work(mode, shape, 1).bytes
        return 4 * elements * (10 if backend == "reference" else 2)

    def work_of(self, mode: str, read: int, written: int, flop: int, element_size: int) -> Work:
        """Every tensor argument and result once; backward reads every input and dout, writes a
        gradient per input, and does twice the forward's work."""
        backward = mode == FORWARD_BACKWARD
        elements = read + written + backward * (read + written + read)
        return Work(elements * element_size, flop * (3 if backward else 1))

    def size_name(self, shape: RippleShape) -> str:
        usual = self.shape(shape.tokens, shape.B)
        text = super().size_name(shape)
        if (shape.rows, shape.cols) != (usual.rows, usual.cols):
            text += f"-R{shape.rows}"
        if shape.C != CHANNELS:
            text += f"-C{shape.C}"
        return text + (f"-A{shape.axis}" if shape.axis else "")

    def parse_size(self, text: str) -> RippleShape | None:
        match = re.fullmatch(r"((?:B\d+-)?N\d+)(?:-R(\d+))?(?:-C(\d+))?(?:-A(1))?", text)
        shape = super().parse_size(match[1]) if match else None
        if match is None or not isinstance(shape, RippleShape):
            return None
        rows = int(match[2] or shape.rows)
        channels = int(match[3] or CHANNELS)
        return RippleShape(shape.B, rows, shape.tokens // rows, channels, int(match[4] or 0))


class _Stage(_Ripple):
    """One stage, up or down."""

    def options(self, shape: RippleShape) -> dict[str, Any]:
        return {"axis": shape.axis}

    def special(self, sweep: str) -> list[Wanted]:
        if sweep != "cpu":
            return []
        total = 8192
        return [
            Wanted(
                100 + number,
                FORWARD_BACKWARD,
                "float32",
                RippleShape(max(1, total // side**2), side, side, CHANNELS),
                ("cpu", "torch"),
                total_tokens=total,
            )
            for number, side in enumerate((8, 16, 32, 64))
        ]


class RipplePool(_Stage):
    name = "ripple_pool"
    workloads: ClassVar = {
        "ripple.pool": Workload(name, FORWARD, *_STAGE, ("_pool",)),
        "ripple.pool_backward": Workload(name, FORWARD_BACKWARD, *_STAGE, ("_pool_backward",)),
        "ripple.sum_partials": Workload(name, FORWARD_BACKWARD, *_STAGE, ("_sum_partials",)),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> tuple[Tensors, Tensors]:
        B, C = shape.B, shape.C
        x = normal(B, shape.rows, shape.cols, C)
        inputs = {"x": x, "weight": normal.around(1 / 9, 0.05, C, 3, 3)}
        return inputs, {"out": normal(B, *shape.coarse, C)}

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """A multiply and an add per tap of the coarse grid's tokens."""
        coarse = shape.B * math.prod(shape.coarse) * shape.C
        read = shape.B * shape.tokens * shape.C + 9 * shape.C
        return self.work_of(mode, read, coarse, 18 * coarse, element_size)


class RippleExpand(_Stage):
    name = "ripple_expand"
    workloads: ClassVar = {
        "ripple.expand": Workload(name, FORWARD, *_STAGE, ("_expand",)),
        "ripple.expand_backward": Workload(name, FORWARD_BACKWARD, *_STAGE, ("_expand_backward",)),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> tuple[Tensors, Tensors]:
        B, C = shape.B, shape.C
        inputs = {
            "z": normal(B, *shape.coarse, C),
            "x": normal(B, shape.rows, shape.cols, C),
            "weight": normal.around(1, 0.1, 2, C),
            "lateral_weight": normal.around(0, 0.1, C, 3, 3),
        }
        return inputs, {"out": normal(B, shape.rows, shape.cols, C)}

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """Nine taps and the scaled coarse token, for each token of the finer grid."""
        fine = shape.B * shape.tokens * shape.C
        read = shape.B * math.prod(shape.coarse) * shape.C + fine + 11 * shape.C
        return self.work_of(mode, read, fine, 20 * fine, element_size)


class _Pyramid(_Ripple):
    """All stages in one call.

    Attributes:
        lists: arguments, after the first, that have a tensor a stage.
    """

    quick = False
    lists: tuple[str, ...]

    def edge_shapes(self, head_dim: int) -> tuple[RippleShape, ...]:
        return (RippleShape(1, 1, 7, 3),)

    def draw_shape(self, drawn: random.Random, head_dim: int) -> RippleShape:
        """A grid that can be halved."""
        return replace(super().draw_shape(drawn, head_dim), rows=drawn.randint(2, 9), axis=0)

    def smaller(self, shape: RippleShape) -> Iterator[RippleShape]:
        for less in super().smaller(shape):
            if isinstance(less, RippleShape) and less.tokens > 1:
                yield less

    def run(self, shape: RippleShape, **settings: Any) -> Run:
        axes, names = shape.axes, [_numbered(name, shape.axes) for name in self.lists]

        def run(t: Tensors, backend: str) -> tuple[Tensor, ...]:
            first, lists = next(iter(t.values())), [[t[n] for n in of] for of in names]
            out = getattr(kernels, self.name)(first, *lists, axes=axes, backend=backend, **settings)
            return out if isinstance(out, tuple) else (out,)

        return run

    def roundings(self, shape: RippleShape) -> int:
        """A backend without a fused form rounds between the stages."""
        return len(shape.axes)


class RipplePoolStages(_Pyramid):
    name = "ripple_pool_stages"
    workloads: ClassVar = {
        "ripple.pool_stages": Workload(name, FORWARD, *_PYRAMID, ("_pool",)),
        "ripple.pool_stages_backward": Workload(
            name, FORWARD_BACKWARD, *_PYRAMID, ("_pool_backward",)
        ),
    }
    lists = ("weight",)

    def drawn(self, normal: Normal, shape: RippleShape) -> tuple[Tensors, Tensors]:
        fine, *coarser = (normal(shape.B, *grid, shape.C) for grid in shape.levels)
        filters = (normal.around(1 / 9, 0.05, shape.C, 3, 3) for _ in shape.axes)
        # The coarser levels are random tensors of the right sizes.
        return {"x": fine} | _numbered("weight", filters), _numbered("level", coarser)

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """The finest grid read, every other level written, each its pooling's work."""
        fine, *coarser = (shape.B * math.prod(grid) * shape.C for grid in shape.levels)
        read = fine + 9 * shape.C * len(shape.axes)
        return self.work_of(mode, read, sum(coarser), 18 * sum(coarser), element_size)


class RippleExpandStages(_Pyramid):
    name = "ripple_expand_stages"
    workloads: ClassVar = {
        "ripple.expand_stages": Workload(name, FORWARD, *_PYRAMID, ("_expand",)),
        "ripple.expand_stages_backward": Workload(
            name, FORWARD_BACKWARD, *_PYRAMID, ("_expand_backward",)
        ),
    }
    lists = ("x", "weight", "lateral weight")

    def drawn(self, normal: Normal, shape: RippleShape) -> tuple[Tensors, Tensors]:
        C, stages = shape.C, shape.axes
        *finer, coarsest = (normal(shape.B, *grid, C) for grid in shape.levels)
        inputs = {"z": coarsest} | _numbered("x", finer)
        inputs |= _numbered("weight", (normal.around(1, 0.1, 2, C) for _ in stages))
        inputs |= _numbered("lateral weight", (normal.around(0, 0.1, C, 3, 3) for _ in stages))
        return inputs, {"out": normal(shape.B, shape.rows, shape.cols, C)}

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """Every level read, the finest grid written, each finer level its expansion's work."""
        sizes = [shape.B * math.prod(grid) * shape.C for grid in shape.levels]
        read = sum(sizes) + 11 * shape.C * len(shape.axes)
        return self.work_of(mode, read, sizes[0], 20 * sum(sizes[:-1]), element_size)


OPERATIONS = (RipplePool(), RippleExpand(), RipplePoolStages(), RippleExpandStages())


def _numbered(name: str, of_stages: Iterable[T]) -> dict[str, T]:
    return {f"{name} {s}": x for s, x in enumerate(of_stages)}
