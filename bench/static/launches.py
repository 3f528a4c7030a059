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

from linear_vit.bench.problems import FORWARD, FORWARD_BACKWARD, Problem, make_problem
from linear_vit.bench.problems import operation as operation_of
from linear_vit.kernels import rows

ALIGNED, RAGGED = "aligned", "ragged"
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
    for name in operations(room):
        for shape in operation_of(name).static_shapes(head_dim or 0, ragged=ragged):
            problem = make_problem(name, shape, dtype, _CPU)
            if ragged:
                inputs = {name: _ragged(x) for name, x in problem.inputs.items()}
                problem = dataclasses.replace(problem, inputs=inputs)
            yield Exercise(problem, RAGGED if ragged else ALIGNED)


def _ragged(x: Tensor) -> Tensor:
    """The same with rows an odd number of elements apart; weights (three axes) stay dense."""
    wider = torch.zeros((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)
    return wider[..., :-1].requires_grad_() if x.dim() > 3 else x


def supported_head_dims() -> tuple[int, ...]:
    return rows.HEAD_DIMS
