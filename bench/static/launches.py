"""Every kernel that ships, as it would be launched: the public operations, run without a GPU.

Nothing here names a kernel. The operations of a folder are called through their public functions on
CPU tensors whose values don't matter, in shapes that take every path (few tokens, many, grouped
heads, rows that 16-byte accesses can't reach), forward and backward; whoever replaced the launch
writes down what came (``bench.static.triton``, ``bench.static.cuda``).
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench import problems
from linear_vit.bench.problems import Problem, make_problem
from linear_vit.bench.problems.attention import PADDING, AttentionOperation

ALIGNED, RAGGED = "aligned", "ragged"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exercise:
    """One problem to run forward and backward.

    ``layout`` says how its tensors lie in memory; ``each_alone``: backward also for each gradient
    by itself.
    """

    problem: Problem
    layout: str
    each_alone: bool = False

    def run(self, backend: str) -> None:
        """Both passes. Results are whatever was in memory, since no kernel wrote them."""
        inputs = self.problem.inputs
        alone = [(name,) for name in inputs] if self.each_alone else []
        for needed in ((), tuple(inputs), *alone):
            leaves = {n: x.detach().requires_grad_(n in needed) for n, x in inputs.items()}
            outputs = self.problem.run(leaves, backend)
            pairs = zip(outputs, self.problem.cotangents, strict=True)
            depends = {x: g for x, g in pairs if x.requires_grad}
            if depends:
                torch.autograd.backward(list(depends), list(depends.values()))


def operations(backend: str) -> tuple[str, ...]:
    """Those that have a file of the backend, and a problem."""
    return tuple(
        name
        for name, row in kernels.operations().items()
        if name in problems.operations() and importlib.util.find_spec(f"{row.package}.{backend}")
    )


def folders(backend: str) -> tuple[str, ...]:
    """The folders that have a file of the backend."""
    rows = kernels.operations()
    return tuple(dict.fromkeys(_folder(rows[name].package) for name in operations(backend)))


def inside(folder: str) -> tuple[str, ...]:
    """The operations of a folder."""
    return tuple(n for n, row in kernels.operations().items() if _folder(row.package) == folder)


def package(folder: str) -> str:
    """The dotted name of an operations' folder."""
    return kernels.operations()[inside(folder)[0]].package


def path(folder: str) -> Path:
    """Where an operations' folder is."""
    spec = importlib.util.find_spec(package(folder))
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).resolve()


def has_head_dims(folder: str) -> bool:
    """Whether a folder's kernels are written for some head dims."""
    return any(kernels.operations()[name].has_head_dim for name in inside(folder))


def exercises(
    folder: str,
    dtype: torch.dtype,
    head_dim: int | None,
    *,
    ragged: bool,
    variants: bool = True,
) -> Iterator[Exercise]:
    """Problems that between them launch every kernel of a folder for a dtype and head dim.

    Args:
        folder: one of :func:`folders`.
        dtype, head_dim: of the inputs; head_dim None for a folder that has none.
        ragged: tensors whose rows are not multiples of 16 bytes apart, rather than dense ones.
        variants: also each gradient by itself, and a mask of keys.
    """
    for name in inside(folder):
        for shape in problems.operation(name).static_shapes(head_dim or 0, ragged=ragged):
            problem = make_problem(name, shape, dtype, _CPU)
            if ragged:
                inputs = {name: _ragged(x) for name, x in problem.inputs.items()}
                problem = dataclasses.replace(problem, inputs=inputs)
            layout = RAGGED if ragged else ALIGNED
            yield Exercise(problem, layout, variants)
            of = problem.operation
            if not variants or not isinstance(of, AttentionOperation):
                continue
            if "key_mask" in of.settings:
                masked = of.run(problem.shape, key_mask=PADDING)
                yield Exercise(dataclasses.replace(problem, run=masked), layout, variants)


def _folder(package: str) -> str:
    return package.rpartition(".")[2]


def _ragged(x: Tensor) -> Tensor:
    """The same with rows an odd number of elements apart; weights (three axes) stay dense."""
    wider = torch.zeros((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)
    return wider[..., :-1].requires_grad_() if x.dim() > 3 else x
