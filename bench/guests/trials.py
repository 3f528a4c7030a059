"""Trials of a kernel: a size, how its tensors lie, their scale, and what else an operation takes.

Which there are follows from the operation's problem file. First those that have a name, then drawn
ones.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from linear_vit.bench import problems
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    Expected,
    Operation,
    Problem,
    Shape,
    judge,
)
from linear_vit.bench.problems.inputs import Drawn
from linear_vit.kernels.accuracy import Comparison, compare

Tensors = dict[str, Tensor]
WAYS = ("as it is", "under no_grad", "in inference mode")
# Of the float32-accumulating composition's error, where gradients cancel (SPEC, "Accuracy").
_NO_WORSE = 1.5


# ---- how tensors lie -----------------------------------------------------------------------------


def _contiguous(inputs: Tensors) -> Tensors:
    return inputs


def _transposed(inputs: Tensors) -> Tensors:
    """The second and third axes change places in memory: tokens outside heads."""
    return {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}


def _odd(inputs: Tensors) -> Tensors:
    """Rows of an odd length from an odd offset, with NaN between them: no 16-byte access."""
    return {n: _within_nan(x) for n, x in inputs.items()}


def _within_nan(x: Tensor) -> Tensor:
    size = x.shape[-1]
    wider = torch.full((*x.shape[:-1], size + 3), torch.nan, dtype=x.dtype, device=x.device)
    wider[..., 1 : size + 1] = x
    return wider[..., 1 : size + 1]


def _expanded(inputs: Tensors) -> Tensors:
    """One head stands for all of them, of every tensor but the first."""
    first, *others = inputs.items()
    return dict([first, *((n, x[:, :1].expand_as(x)) for n, x in others)])


def _shared(inputs: Tensors) -> Tensors:
    """Tensors of one shape are views of one, row by row, as those of a packed projection."""
    shapes = {tuple(x.shape) for x in inputs.values()}
    found: Tensors = {}
    for shape in shapes:
        names = [n for n, x in inputs.items() if tuple(x.shape) == shape]
        packed = torch.stack([inputs[n] for n in names], -2)
        found |= dict(zip(names, packed.unbind(-2), strict=True))
    return {name: found[name] for name in inputs}


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "odd": _odd,
    "expanded": _expanded,
    "shared": _shared,
}


# ---- a trial -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One problem to try a kernel on.

    Attributes:
        operation, shape, dtype: by name, and its sizes.
        layout: one of ``LAYOUTS``.
        scale, mean: of the inputs; see :meth:`Operation.rescale`.
        settings: further arguments of the operation, by name.
        poisoned: the input that has a NaN in it; "" for none.
        seed: of the numbers.
    """

    operation: str
    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"
    scale: float = 1.0
    mean: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()
    poisoned: str = ""
    seed: int = 0

    @property
    def of(self) -> Operation:
        return problems.operation(self.operation)

    def problem(self, device: torch.device | str = "cpu", draw: int = 0) -> Problem:
        """The numbers of this seed; of another one for each further ``draw``."""
        where, of = torch.device(device), self.of
        made = of.problem(self.shape, DTYPES[self.dtype], where, self.seed + draw)
        inputs = {name: x.detach() for name, x in made.inputs.items()}
        if (self.scale, self.mean) != (1.0, 0.0):
            of.rescale(inputs, self.scale, self.mean)
        if self.poisoned:
            inputs[self.poisoned].view(-1)[inputs[self.poisoned].numel() // 2] = torch.nan
        # Weights, of few axes, stay dense.
        wide = {name: x for name, x in inputs.items() if x.dim() > 3}
        inputs |= LAYOUTS[self.layout](wide) if wide else {}
        leaves = {name: inputs[name].detach().requires_grad_() for name in made.inputs}
        run = of.run(self.shape, **dict(self.settings)) if isinstance(of, Drawn) else made.run
        return replace(made, inputs=leaves, run=run)

    def expected(self, problem: Problem) -> Expected:
        """All of it in float64: a trial is small."""
        return Operation.expected(self.of, problem)

    def judge(
        self, problem: Problem, mode: str, results: Sequence[Tensor], expected: Expected
    ) -> dict[str, Comparison]:
        """By the accuracy rule; NaN has to be where it is in the reference, and nowhere else.

        On inputs of other scales, at most 1.5 times the error of PyTorch's composition.
        """
        if self.poisoned:
            return _judge_with_nan(problem, mode, results, expected)
        verdicts = judge(problem, mode, results, expected)
        if (self.scale, self.mean) == (1.0, 0.0) or all(v.passed for v in verdicts.values()):
            return verdicts
        composed = problem.gradients("torch", problem.cotangents)
        bounds = judge(problem, FORWARD_BACKWARD, [x.detach() for x in composed], expected)
        return {name: _no_worse(v, bounds[name], problem) for name, v in verdicts.items()}

    def verdicts(self, backend: str, mode: str = FORWARD) -> dict[str, Comparison]:
        """What a kernel of this process makes of it: for a debugger."""
        problem = self.problem()
        expected = self.expected(problem)
        results = tuple(x.detach() for x in problem.call(backend, mode)())
        return self.judge(problem, mode, results, expected)

    def __str__(self) -> str:
        words = [str(self.shape), self.dtype, f"{self.layout} in memory"]
        words += [f"{name}={value}" for name, value in self.settings]
        if (self.scale, self.mean) != (1.0, 0.0):
            words.append(f"scale {self.scale}, mean {self.mean}")
        if self.poisoned:
            words.append(f"NaN in {self.poisoned}")
        return ", ".join(words)

    def __repr__(self) -> str:
        """As it is written: without what is as usual."""
        usual = Trial(self.operation, self.shape)
        given = {n: v for n, v in vars(self).items() if v != getattr(usual, n)}
        more = "".join(f", {name}={value!r}" for name, value in given.items())
        return f"Trial({self.operation!r}, {self.shape!r}{more})"


def touched(problem: Problem, seed: int) -> Problem:
    """The same numbers but for one row of each input: who looks at a few of them sees no other."""
    drawn = random.Random(seed)
    copies: dict[int, Tensor] = {}
    inputs: Tensors = {}
    for name, x in problem.inputs.items():
        storage = x.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage)
            copies[storage.data_ptr()] = whole.clone()
        copy = copies[storage.data_ptr()].as_strided(x.shape, x.stride(), x.storage_offset())
        if x.numel():
            row = tuple(drawn.randrange(size) for size in x.shape[:-1])
            copy[row] = 1.25 * copy[row].flip(-1)  # a normaliser stays positive
        inputs[name] = copy
    return replace(problem, inputs={name: x.requires_grad_() for name, x in inputs.items()})


def _judge_with_nan(
    problem: Problem, mode: str, results: Sequence[Tensor], expected: Expected
) -> dict[str, Comparison]:
    found = {}
    for name, actual in zip(problem.names(mode), results, strict=True):
        right = expected.values[name]
        actual = actual.cpu()
        verdict = compare(actual.nan_to_num(), right.nan_to_num(), gradient=name.startswith("grad"))
        if not torch.equal(actual.isnan(), right.cpu().isnan()):
            verdict = replace(verdict, rms_error=torch.nan, max_error=torch.nan, passed=False)
        found[name] = verdict
    return found


def _no_worse(verdict: Comparison, composed: Comparison, problem: Problem) -> Comparison:
    # Both round their result once; below that, a float32 composition has noise of its own.
    allowed = max(_NO_WORSE * composed.rms_error, torch.finfo(problem.dtype).eps / 4)
    passed = verdict.passed or verdict.rms_error <= allowed
    return replace(verdict, rms_tolerance=max(allowed, verdict.rms_tolerance), passed=passed)


# ---- which there are -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """A trial, the pass, and how it is called."""

    trial: Trial
    mode: str = FORWARD
    way: str = "as it is"


def named(operation: Operation, dtype: str, head_dims: Sequence[int]) -> Iterator[Attempt]:
    """Every way to call it, edges, layouts, settings, scales, NaN; passes with gradients last."""
    head_dim = head_dims[0]
    base, *_ = operation.check_shapes(head_dim, interpreted=True)
    plain = Trial(operation.name, base, dtype)
    trials = [plain]
    trials += [replace(plain, shape=shape) for shape in operation.edge_shapes(head_dim)]
    trials += [replace(plain, layout=layout) for layout in LAYOUTS if layout != plain.layout]
    for name, values in operation.settings.items():
        trials += [replace(plain, settings=((name, value),)) for value in values]
    trials += [replace(plain, scale=s, mean=m) for s, m in operation.scales]
    for dim in head_dims[1:]:
        shapes = operation.check_shapes(dim, interpreted=True)
        trials += [replace(plain, shape=shape) for shape in shapes]
    yield from (Attempt(plain, FORWARD, way) for way in WAYS)
    yield from (Attempt(trial, FORWARD_BACKWARD) for trial in trials)
    inputs = operation.problem(base, torch.float32, torch.device("cpu")).inputs
    poisoned = [name for name in inputs if name in operation.poisoned]
    yield from (Attempt(replace(plain, poisoned=name)) for name in poisoned)


def drawn(
    operation: Operation, dtype: str, head_dims: Sequence[int], seed: int
) -> Iterator[Attempt]:
    """One after another, without end; other ones for another seed."""
    of = random.Random(f"{operation.name} {dtype} {seed}")
    while True:
        trial = Trial(
            operation.name,
            operation.draw_shape(of, of.choice(head_dims)),
            dtype,
            of.choice(list(LAYOUTS)),
            settings=tuple((n, of.choice(v)) for n, v in operation.settings.items()),
            seed=of.randrange(10**6),
        )
        mode = of.choice((FORWARD, FORWARD_BACKWARD))
        yield Attempt(trial, mode, of.choice(WAYS) if mode == FORWARD else WAYS[0])


def simpler(trial: Trial) -> Iterator[Trial]:
    """What a failing trial may be reduced to, the simplest first."""
    usual = Trial(trial.operation, trial.shape)
    for name in ("layout", "settings", "seed"):
        if getattr(trial, name) != getattr(usual, name):
            yield replace(trial, **{name: getattr(usual, name)})
    if (trial.scale, trial.mean) != (usual.scale, usual.mean):
        yield replace(trial, scale=usual.scale, mean=usual.mean)
    yield from (replace(trial, shape=shape) for shape in trial.of.smaller(trial.shape))
