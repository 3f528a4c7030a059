"""Every kernel that ships, as it would be launched: the public operations, run without a GPU.

Nothing here names a kernel. The operations of a room are called through their public functions on
CPU tensors whose values don't matter, in shapes that take every path (few tokens, many, grouped
heads, rows that 16-byte accesses can't reach), forward and backward; whoever replaced the launch
writes down what came (``bench.compiled_triton``, ``bench.compiled_cuda``).
"""

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from linear_vit.bench.problems import FORWARD, FORWARD_BACKWARD, Problem, make_problem
from linear_vit.bench.problems import operation as operation_of

# The module; `kernels.backends` is the function of that name.
_dispatch = importlib.import_module("linear_vit.kernels.backends")

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
    return tuple(dict.fromkeys(_dispatch._ROOMS.values()))


def operations(room: str) -> tuple[str, ...]:
    return tuple(op for op, its_room in _dispatch._ROOMS.items() if its_room == room)


def has_head_dims(room: str) -> bool:
    return room != "ripple"


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


@contextmanager
def usable(backend: str) -> Iterator[None]:
    """``kernels`` takes the backend on CPU tensors, for as long as its launches are replaced."""
    with mock.patch.dict(_dispatch._PROBES, {backend: lambda device: None}):
        _dispatch._choose.cache_clear()
        try:
            yield
        finally:
            _dispatch._choose.cache_clear()


def supported_head_dims() -> tuple[int, ...]:
    return tuple(_dispatch.HEAD_DIMS)
