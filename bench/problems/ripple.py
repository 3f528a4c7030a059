"""Ripple pooling and expansion: one stage, and the whole pyramid in one call."""

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from linear_vit import kernels
from linear_vit.bench.problems.case import (
    EXTENTS,
    FORWARD,
    FORWARD_BACKWARD,
    Problem,
    Shape,
    Wanted,
    Work,
    Workload,
)
from linear_vit.bench.problems.inputs import Drawn, Normal
from linear_vit.kernels.ripple.stages import halving_axes

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


def _workload(operation: str, mode: str, side: int, function: str) -> Workload:
    return Workload(
        operation,
        mode,
        lambda channels: RippleShape(128, side, side, channels),
        lambda channels: RippleShape(16, side, side, channels),
        (function,),
    )


class _Ripple(Drawn):
    """What the four have in common."""

    quick = True

    def shape(self, tokens: int, batch: int = 1) -> RippleShape:
        """The squarest grid of N tokens."""
        rows = next(r for r in range(int(tokens**0.5), 0, -1) if tokens % r == 0)
        return RippleShape(batch, rows, tokens // rows, CHANNELS)

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        assert extent in EXTENTS
        return _GRIDS[extent]

    def check_shapes(self, head_dim: int, *, interpreted: bool = False) -> tuple[RippleShape, ...]:
        if interpreted:
            return (RippleShape(1, 5, 4, 8, axis=0), RippleShape(1, 4, 5, 8, axis=1))
        return (RippleShape(2, 8, 8, 48, axis=0), RippleShape(1, 7, 5, 33, axis=1))

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
        "ripple.pool": _workload("ripple_pool", FORWARD, 32, "_pool"),
        "ripple.pool_backward": _workload("ripple_pool", FORWARD_BACKWARD, 32, "_pool_backward"),
        "ripple.sum_partials": _workload("ripple_pool", FORWARD_BACKWARD, 32, "_sum_partials"),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> Problem:
        B, C, axis = shape.B, shape.C, shape.axis
        inputs = {
            "x": normal(B, shape.rows, shape.cols, C),
            "weight": normal.around(1 / 9, 0.05, C, 3, 3),
        }

        def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            return (kernels.ripple_pool(t["x"], t["weight"], axis=axis, backend=backend),)

        cotangents = (normal(B, *shape.coarse, C),)
        return normal.problem(self, shape, inputs, ("out",), cotangents, run)

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """A multiply and an add per tap of the coarse grid's tokens."""
        coarse = shape.B * math.prod(shape.coarse) * shape.C
        read = shape.B * shape.tokens * shape.C + 9 * shape.C
        return self.work_of(mode, read, coarse, 18 * coarse, element_size)


class RippleExpand(_Stage):
    name = "ripple_expand"
    workloads: ClassVar = {
        "ripple.expand": _workload("ripple_expand", FORWARD, 32, "_expand"),
        "ripple.expand_backward": _workload(
            "ripple_expand", FORWARD_BACKWARD, 32, "_expand_backward"
        ),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> Problem:
        B, C, axis = shape.B, shape.C, shape.axis
        inputs = {
            "z": normal(B, *shape.coarse, C),
            "x": normal(B, shape.rows, shape.cols, C),
            "weight": normal.around(1, 0.1, 2, C),
            "lateral_weight": normal.around(0, 0.1, C, 3, 3),
        }

        def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            z, x, w, lateral = t["z"], t["x"], t["weight"], t["lateral_weight"]
            return (kernels.ripple_expand(z, x, w, lateral, axis=axis, backend=backend),)

        cotangents = (normal(B, shape.rows, shape.cols, C),)
        return normal.problem(self, shape, inputs, ("out",), cotangents, run)

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """Nine taps and the scaled coarse token, for each token of the finer grid."""
        fine = shape.B * shape.tokens * shape.C
        read = shape.B * math.prod(shape.coarse) * shape.C + fine + 11 * shape.C
        return self.work_of(mode, read, fine, 20 * fine, element_size)


class _Pyramid(_Ripple):
    """All stages in one call."""

    quick = False

    def roundings(self, shape: RippleShape) -> int:
        """A backend without a fused form rounds between the stages."""
        return len(shape.axes)


class RipplePoolStages(_Pyramid):
    name = "ripple_pool_stages"
    workloads: ClassVar = {
        "ripple.pool_stages": _workload("ripple_pool_stages", FORWARD, 8, "_pool"),
        "ripple.pool_stages_backward": _workload(
            "ripple_pool_stages", FORWARD_BACKWARD, 8, "_pool_backward"
        ),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> Problem:
        axes, stages = shape.axes, range(len(shape.axes))
        levels = [normal(shape.B, *grid, shape.C) for grid in shape.levels]
        filters = [normal.around(1 / 9, 0.05, shape.C, 3, 3) for _ in stages]
        inputs = {"x": levels[0]} | _numbered("weight", filters)

        def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            weights = [t[f"weight {s}"] for s in stages]
            return kernels.ripple_pool_stages(t["x"], weights, axes=axes, backend=backend)

        outputs = tuple(_numbered("level", levels[1:]))
        # The coarser levels are random tensors of the right sizes.
        return normal.problem(self, shape, inputs, outputs, tuple(levels[1:]), run)

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """The finest grid read, every other level written, each its pooling's work."""
        fine, *coarser = (shape.B * math.prod(grid) * shape.C for grid in shape.levels)
        read = fine + 9 * shape.C * len(shape.axes)
        return self.work_of(mode, read, sum(coarser), 18 * sum(coarser), element_size)


class RippleExpandStages(_Pyramid):
    name = "ripple_expand_stages"
    workloads: ClassVar = {
        "ripple.expand_stages": _workload("ripple_expand_stages", FORWARD, 8, "_expand"),
        "ripple.expand_stages_backward": _workload(
            "ripple_expand_stages", FORWARD_BACKWARD, 8, "_expand_backward"
        ),
    }

    def drawn(self, normal: Normal, shape: RippleShape) -> Problem:
        axes, stages, C = shape.axes, range(len(shape.axes)), shape.C
        levels = [normal(shape.B, *grid, C) for grid in shape.levels]
        inputs = {"z": levels[-1]} | _numbered("x", levels[:-1])
        inputs |= _numbered("weight", [normal.around(1, 0.1, 2, C) for _ in stages])
        laterals = [normal.around(0, 0.1, C, 3, 3) for _ in stages]
        inputs |= _numbered("lateral weight", laterals)

        def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            lists = [[t[f"{n} {s}"] for s in stages] for n in ("x", "weight", "lateral weight")]
            return (kernels.ripple_expand_stages(t["z"], *lists, axes=axes, backend=backend),)

        cotangents = (normal(shape.B, shape.rows, shape.cols, C),)
        return normal.problem(self, shape, inputs, ("out",), cotangents, run)

    def least_work(self, mode: str, shape: RippleShape, element_size: int) -> Work:
        """Every level read, the finest grid written, each finer level its expansion's work."""
        sizes = [shape.B * math.prod(grid) * shape.C for grid in shape.levels]
        read = sum(sizes) + 11 * shape.C * len(shape.axes)
        return self.work_of(mode, read, sizes[0], 20 * sum(sizes[:-1]), element_size)


OPERATIONS = (RipplePool(), RippleExpand(), RipplePoolStages(), RippleExpandStages())


def _numbered(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name} {s}": x for s, x in enumerate(tensors)}
