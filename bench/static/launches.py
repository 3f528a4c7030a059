"""Every kernel that ships, as it would be launched: the public operations, run without a GPU.

Nothing here names a kernel. The operations of a room are called through their public functions on
CPU tensors whose values don't matter, in shapes that take every path (few tokens, many, grouped
heads, rows that 16-byte accesses can't reach), forward and backward; whoever replaced the launch
writes down what came (``bench.static.triton``, ``bench.static.cuda``).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    PACKED,
    AttentionShape,
    Problem,
    RippleShape,
    Shape,
    make_problem,
)
from linear_vit.kernels import rows

ALIGNED, RAGGED = "aligned", "ragged"
# Head dims at which grouped queries are compiled too: the commonest, and HydraAttention's four
# branches of dim 384.
_GROUPED = (64, 96)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exercise:
    """One problem to run forward and backward; ``layout`` says how its tensors lie in memory."""

    problem: Problem
    layout: str

    def run(self, backend: str) -> None:
        """Both passes. Results are whatever was in memory, since no kernel wrote them."""
        for mode in (FORWARD, FORWARD_BACKWARD):
            self.problem.call(backend, mode)()


def rooms() -> tuple[str, ...]:
    """The folders of ``kernels`` that operations live in."""
    return tuple(dict.fromkeys(row.family for row in rows.OPERATION_ROWS))


def operations(room: str) -> tuple[str, ...]:
    return tuple(row.name for row in _rows(room))


def has_head_dims(room: str) -> bool:
    return any(row.has_head_dim for row in _rows(room))


def _rows(room: str) -> list[rows.Operation]:
    return [row for row in rows.OPERATION_ROWS if row.family == room]


def exercises(
    room: str, dtype: torch.dtype, head_dim: int | None, *, ragged: bool
) -> Iterator[Exercise]:
    """Problems that between them launch every kernel of a room for a dtype and head dim.

    Args:
        room: one of :func:`rooms`.
        dtype, head_dim: of the inputs; head_dim None for a room that has none.
        ragged: tensors whose rows are not multiples of 16 bytes apart, rather than dense ones.
    """
    for operation in operations(room):
        for shape in _shapes(operation, head_dim, ragged):
            problem = make_problem(operation, shape, dtype, _CPU)
            if ragged:
                inputs = {name: _ragged(x) for name, x in problem.inputs.items()}
                problem = dataclasses.replace(problem, inputs=inputs)
            yield Exercise(problem, RAGGED if ragged else ALIGNED)


def _shapes(operation: str, head_dim: int | None, ragged: bool) -> tuple[Shape, ...]:
    if head_dim is None:
        if ragged:
            return tuple(RippleShape(b, 7, 5, 33, axis) for b in (1, 128) for axis in (0, 1))
        # The grids of a ViT-S on 32x32 and 64x64 images, with images enough for a pyramid in one
        # launch; and one past any shared memory.
        grids = ((32, 8), (32, 16), (1, 128))
        return tuple(RippleShape(b, n, n, 384, axis) for b, n in grids for axis in (0, 1))
    D = head_dim
    if ragged:
        return (AttentionShape(1, 2, 2, 197, 197, D), AttentionShape(1, 2, 2, 4099, 4099, D))
    shapes = [AttentionShape(1, 2, 2, 8192, 8192, D), AttentionShape(8, 6, 6, 64, 64, D)]
    if operation == "linear_attention":
        # One launch, of several tiles that are read again for the state; and of a kept state.
        shapes += [AttentionShape(1, 2, 2, 200, 200, D), AttentionShape(26, 6, 6, 260, 260, D)]
    if operation not in PACKED and D in _GROUPED:
        shapes += [AttentionShape(1, 4, 1, 8192, 8192, D), AttentionShape(8, 4, 1, 64, 64, D)]
    return tuple(shapes)


def _ragged(x: Tensor) -> Tensor:
    """The same with rows an odd number of elements apart; weights (three axes) stay dense."""
    wider = torch.zeros((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)
    return wider[..., :-1].requires_grad_() if x.dim() > 3 else x


def supported_head_dims() -> tuple[int, ...]:
    return rows.HEAD_DIMS
