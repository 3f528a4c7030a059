"""What is timed and checked: cases, their problems, and what an operation has to say of itself.

A :class:`Case` names one thing to time. Its :class:`Operation` is the only place that knows the
operation: its shapes and inputs, its least work, what the right answer is, and the sizes that the
check, the sweeps, the traffic count, the static table and the tuning take. Nothing else switches on
an operation's name.
"""

import functools
import importlib
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels.accuracy import Comparison, compare

FORWARD = "forward"
BACKWARD = "backward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Shape(ABC):
    """The sizes of a problem: a frozen dataclass of its operation's, all fields plain numbers.

    Attributes:
        B: sequences, grids or images in a call.
        tokens: N, of one sequence or grid: what a complexity plot has on its x axis.
    """

    B: int

    @property
    @abstractmethod
    def tokens(self) -> int: ...

    @property
    def dim(self) -> int | None:
        """The head dim that kernels are specialised for; None where there is none."""
        return None


@dataclass(frozen=True)
class Case:
    """One thing to time: an operation's pass, on a backend, at a size.

    ``captured`` replays the call from a CUDA graph instead of launching it anew. ``total_tokens``
    is what as many sequences as fit into it have together, where a sweep asks for that: its times
    say what length costs at the same work.
    """

    operation: str
    mode: str
    dtype: str
    shape: Shape
    backend: str
    captured: bool = False
    total_tokens: int | None = None

    @property
    def together(self) -> "Case":
        """What is alike for cases that work on the same problem and so take turns."""
        return replace(self, backend="", captured=False)


@dataclass(frozen=True)
class Wanted:
    """Cases of a special sweep: the lower ``rank``, the more important.

    ``backends`` are those of its cases where none are asked for; empty for all. ``captured``: also
    replayed from a CUDA graph. ``energy``: joules a call are measured, too, which takes a while.
    """

    rank: int
    mode: str
    dtype: str
    shape: Shape
    backends: tuple[str, ...] = ()
    captured: bool = False
    total_tokens: int | None = None
    energy: bool = False


@dataclass(frozen=True)
class Work:
    """The least an implementation has to do: bytes moved to and from memory, and FLOP."""

    bytes: int
    flop: int


@dataclass(frozen=True)
class Expected:
    """Float64 results by name ("out", "grad q", ...), and the token rows they stand for.

    ``rows[name]`` is None where all of the tensor is there, else the indices along the token axis.
    ``cotangents`` are the output gradients that the results belong to.
    """

    values: dict[str, Tensor]
    rows: dict[str, Tensor | None]
    cotangents: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of an operation, and a closure that runs it on any backend.

    ``inputs`` are leaves that ask for gradients; ``run(tensors, backend)`` returns the outputs as a
    tuple; ``cotangents`` are random output gradients of matching shape.
    """

    operation: "Operation"
    shape: Any
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    cotangents: tuple[Tensor, ...]
    run: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]

    def call(self, backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        """A closure without arguments that does one pass: what is timed.

        Forward runs on tensors that ask for no gradient, as inference does; backward is the
        gradients alone, of a forward pass that was run once; forward+backward returns the outputs
        and then the gradient of each input.
        """
        if mode == FORWARD:
            plain = {name: x.detach() for name, x in self.inputs.items()}
            return lambda: self.run(plain, backend)
        if mode == BACKWARD:
            # torch.compile otherwise forbids a second backward pass through one graph.
            importlib.import_module("torch._functorch.config").donated_buffer = False  # type: ignore[attr-defined]
            outputs, leaves = self.run(self.inputs, backend), tuple(self.inputs.values())
            if not all(x.requires_grad for x in outputs):
                raise NotOffered("its gradient is not offered")
            return lambda: torch.autograd.grad(outputs, leaves, self.cotangents, retain_graph=True)
        return lambda: self.gradients(backend, self.cotangents)

    def gradients(self, backend: str, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, then the gradient of each input.

        Raises:
            NotOffered: the backend has a forward pass alone.
        """
        outputs = self.run(self.inputs, backend)
        leaves = tuple(self.inputs.values())
        if not all(x.requires_grad for x in outputs):
            raise NotOffered("its gradient is not offered")
        try:
            found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            # An operator of torch.library, or of C++, that was given no formula.
            if isinstance(error, NotImplementedError) or "no autograd formula" in str(error):
                raise NotOffered("its gradient is not offered") from error
            raise
        gradients = []
        for (name, x), gradient in zip(self.inputs.items(), found, strict=True):
            if gradient is None and x.numel():
                raise RuntimeError(f"{name} has no gradient, and others have")
            gradients.append(torch.zeros_like(x) if gradient is None else gradient)
        return (*outputs, *gradients)

    @property
    def named_cotangents(self) -> dict[str, Tensor]:
        return dict(zip(self.output_names, self.cotangents, strict=True))

    def take(self, other: "Problem", cotangents: Sequence[Tensor]) -> None:
        """Put another draw's inputs, and these output gradients, into this problem's memory."""
        given = (*self.inputs.values(), *self.cotangents)
        for x, new in zip(given, (*other.inputs.values(), *cotangents), strict=True):
            x.detach().copy_(new.detach())

    def names(self, mode: str) -> tuple[str, ...]:
        """Names of what :meth:`call` returns."""
        gradients = tuple(f"grad {name}" for name in self.inputs)
        if mode == FORWARD:
            return self.output_names
        return gradients if mode == BACKWARD else self.output_names + gradients

    def expected(self) -> Expected:
        """The results and gradients by the reference in float64."""
        return self.operation.expected(self)

    def least_work(self, mode: str) -> Work:
        """The least traffic and work of a pass, whatever the implementation does.

        A backward pass alone is both passes less the forward.
        """
        return least_work(self.operation, mode, self.shape, self.dtype.itemsize)


@dataclass(frozen=True)
class Workload:
    """What shows a tuned kernel's time: a pass at a size that takes that kernel.

    ``shape(dim)`` has this head dim, or so many channels; ``functions`` are the Triton functions
    that the kernel's options may choose; ``dtype`` is what its rules are asked for where that is
    not the inputs'.
    """

    operation: str
    mode: str
    shape: Callable[[int], Shape]
    smaller: Callable[[int], Shape]  # launches the same kernels and fits any machine
    functions: tuple[str, ...]
    dtype: torch.dtype | None = None


class Operation(ABC):
    """What the suite has to know of an operation to check, time and report it.

    Attributes:
        name: as in ``kernels.operations()``.
        quick: whether a quick sweep has it. One that is made of the same kernels as another is
            left to the full one.
        token_axis: of outputs and gradients whose rows are sampled (see :class:`Expected`).
        backward_reads_outputs: whether the least traffic of the backward pass includes them.
        workloads: of the tuning table's kernels that belong to this operation's folder, by name.
        modes: the passes that are timed.
        budget: of the seconds that a sweep spends on a case, how many times as many.
        test: the test in ``bench/`` that its cases are of.
        has_reference: whether something says what is right, and how much work is least: see
            :class:`TimedOnly`.
        usual_backends: those of a sweep over lengths where none are asked for; empty for all.
        settings: of the public function's other arguments, values that a strict check draws from.
        scales: of its inputs, and means, for the strict check: see :meth:`rescale`.
        poisoned: inputs in which a NaN has to come out where it does in the reference.
    """

    name: str
    quick: bool = False
    token_axis: int = 2
    backward_reads_outputs: bool = False
    workloads: ClassVar[Mapping[str, Workload]] = {}
    modes: tuple[str, ...] = PASSES
    budget: float = 1.0
    test: str = "test_kernel"
    has_reference: bool = True
    usual_backends: tuple[str, ...] = ()
    settings: ClassVar[Mapping[str, Sequence[Any]]] = {}
    scales: ClassVar[Sequence[tuple[float, float]]] = ()
    poisoned: ClassVar[Sequence[str]] = ()

    @property
    def title(self) -> str:
        """For tables and plots."""
        return kernels.operations()[self.name].title

    # Sizes and inputs.

    @abstractmethod
    def shape(self, tokens: int, batch: int = 1) -> Shape:
        """What is timed at N tokens."""

    @abstractmethod
    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        """Random inputs of zero mean and unit variance, drawn on the device."""

    @abstractmethod
    def lengths(self, device_type: str, extent: str) -> Sequence[int]:
        """Token counts of a sweep, "quick" or "full"; what takes too long is left out of it."""

    def rehearsal(self, shape: Any) -> Shape:
        """A tiny size in the place of ``shape``, to walk through the code that that takes."""
        return self.check_shapes(16, interpreted=True)[0]

    def probes(self, device: torch.device) -> dict[str, Callable[[], float]]:
        """What is measured of a device for :meth:`needs`: calls that return how much they did."""
        return {}

    def special(self, sweep: str) -> Sequence[Wanted]:
        """What a special sweep ("gpu", "cpu") has of this operation."""
        return ()

    def dtypes(self, device_type: str, chosen: Sequence[str]) -> Sequence[str]:
        """Names of the dtypes that are timed, of those chosen."""
        return chosen

    def backends(self, device: torch.device, asked: Sequence[str]) -> dict[str, str | None]:
        """Backends by name, and why one can't run here: of those asked for, or of all."""
        known = kernels.backends(self.name, device, head_dim=self.shape(64).dim)
        return {name: why for name, why in known.items() if not asked or name in asked}

    def unusable(self, shape: Any, backend: str, device: torch.device) -> str | None:
        """Why a usable backend can't do this size; None where it can."""
        return None

    def sizes(
        self, device_type: str, extent: str, tokens: Sequence[int], total_tokens: int | None
    ) -> Iterator[Shape]:
        """The shapes of a sweep, "quick" or "full": of these token counts, or of its own.

        With ``total_tokens``, as many sequences as have that many together: none, where one has
        more.
        """
        for count in sorted(set(tokens or self.lengths(device_type, extent))):
            yield self.shape(count, total_tokens // count if total_tokens else 1)

    def turn_key(self, shape: Any) -> object:
        """Cases take turns where this is alike; a training step's model is left out of it."""
        return shape

    def can_be_captured(self, backend: str) -> bool:
        """Whether a call can go into a CUDA graph (if the device is one)."""
        row = kernels.backend_rows().get(backend)
        return row is None or not row.compiles

    @abstractmethod
    def check_shapes(self, head_dim: int, *, interpreted: bool = False) -> Sequence[Shape]:
        """Ragged sizes that results are checked at. ``interpreted``: small enough for Triton's
        interpreter, which takes seconds for what a GPU does in microseconds."""

    def edge_shapes(self, head_dim: int) -> Sequence[Shape]:
        """Sizes at the edge of what there is, for the strict check: nothing at all, one of each."""
        return ()

    def draw_shape(self, drawn: random.Random, head_dim: int) -> Shape:
        """Any small size, for the strict check."""
        return drawn.choice(self.check_shapes(head_dim, interpreted=True))

    def smaller(self, shape: Any) -> Iterator[Shape]:
        """Sizes that are simpler than this one, the simplest first: what fails is reduced to them.

        Of every field 1, 2, 3, a half and one less, where the operation takes it.
        """
        for name, size in asdict(shape).items():
            for less in dict.fromkeys((1, 2, 3, size // 2, size - 1)):
                if 0 < less < size:
                    yield replace(shape, **{name: less})

    def rescale(self, inputs: dict[str, Tensor], scale: float, mean: float) -> None:
        """Give inputs another scale and mean, in place: one of ``scales``."""
        raise NotImplementedError(f"{self.name} has no scales")

    def traffic_shapes(self, head_dim: int) -> Sequence[Shape]:
        """Sizes that take the operation's different kernels, small enough to be interpreted."""
        return self.check_shapes(head_dim, interpreted=True)

    def static_shapes(self, head_dim: int, *, ragged: bool) -> Sequence[Shape]:
        """Sizes that between them launch every kernel; ``ragged``: rows that are no multiples of
        16 bytes."""
        return self.check_shapes(head_dim)

    # What is least, and what is right.

    @abstractmethod
    def least_work(self, mode: str, shape: Any, element_size: int) -> Work:
        """The least traffic and work of one call, whatever the implementation does."""

    def working_set(self, mode: str, backend: str, shape: Any) -> int:
        """About how many bytes an implementation holds beyond inputs and outputs."""
        return 8 * self.least_work(mode, shape, 1).bytes

    def expected(self, problem: Problem) -> Expected:
        """The problem's results and gradients by the reference in float64."""
        leaves = {n: x.detach().double().requires_grad_() for n, x in problem.inputs.items()}
        outputs = problem.run(leaves, "reference")
        cotangents = tuple(g.double() for g in problem.cotangents)
        gradients = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents)
        results = (*(x.detach() for x in outputs), *gradients)
        values = dict(zip(problem.names(FORWARD_BACKWARD), results, strict=True))
        return Expected(values, dict.fromkeys(values), problem.cotangents)

    def roundings(self, shape: Any) -> int:
        """How often a result may be rounded to the dtype on its way."""
        return 1

    def needs(self, backend: str, mode: str, shape: Any) -> dict[str, float]:
        """How much of each limit (``probes`` by name, ``fresh`` bytes) an implementation takes,
        beside traffic and work; empty where nobody has counted it."""
        return {}

    def facts(self, case: Case, median_s: float) -> dict[str, Any]:
        """What a saved case says beyond its shape, work and time."""
        return {}

    # How a case is named, in a test's id and a saved run.

    def case_name(self, case: Case) -> str:
        """The whole name: linear_attention-forward-float32-N64-torch."""
        size = self.size_name(case.shape)
        if case.total_tokens and case.shape.B == 1:
            size = f"B1-{size}"  # apart from one sequence of the same length in its own right
        text = f"{case.operation}-{case.mode}-{case.dtype}-{size}-{case.backend}"
        return f"{text}-graph" if case.captured else text

    def size_name(self, shape: Any) -> str:
        """The size in a case's name: N64, B1024-N64."""
        return f"B{shape.B}-N{shape.tokens}" if shape.B > 1 else f"N{shape.tokens}"

    def group(self, case: Case) -> str:
        """What pytest-benchmark groups the case by."""
        return f"{self.name} {case.mode} {case.dtype} B={case.shape.B} N={case.shape.tokens}"

    def parse_size(self, text: str) -> Shape | None:
        """The shape of this :meth:`size_name`; None where it is none."""
        match = re.fullmatch(r"(?:B(\d+)-)?N(\d+)", text)
        return self.shape(int(match[2]), int(match[1] or 1)) if match else None


class TimedOnly(Operation):
    """One that nothing here says what is right of, nor how much work is least."""

    has_reference = False

    def check_shapes(self, head_dim: int, *, interpreted: bool = False) -> Sequence[Shape]:
        """None: it is made of operations that are checked."""
        return ()

    def can_be_captured(self, backend: str) -> bool:
        return False

    def least_work(self, mode: str, shape: Any, element_size: int) -> Work:
        """Not counted."""
        return Work(0, 0)


def no_inputs(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """What :class:`Problem` runs where its inputs are not its own."""
    raise TypeError("it makes its own inputs: take Problem.call")


def least_work(operation: Operation, mode: str, shape: Any, element_size: int) -> Work:
    """An operation's least work, of a backward pass alone too: both passes less the forward."""
    if mode != BACKWARD:
        return operation.least_work(mode, shape, element_size)
    both = operation.least_work(FORWARD_BACKWARD, shape, element_size)
    forward = operation.least_work(FORWARD, shape, element_size)
    return Work(both.bytes - forward.bytes, both.flop - forward.flop)


class NotOffered(Exception):
    """A pass that a backend does not have, and need not: the gradient of a forward alone."""


class WrongResult(Exception):
    """A case whose answer the accuracy rule refuses, or that another implementation gave."""


class ChangedInput(Exception):
    """A pass wrote over what it was given; the others are given what there was."""


def check(problem: Problem, backend: str, mode: str, expected: Expected) -> dict[str, Comparison]:
    """Run one pass and compare everything it returns; the verdicts by name.

    Raises:
        ChangedInput: an input or output gradient is not what it was.
    """
    both = functools.partial(problem.gradients, backend, expected.cotangents)
    call = both if mode == FORWARD_BACKWARD else problem.call(backend, mode)
    return check_call(problem, mode, call, expected)


def check_call(
    problem: Problem, mode: str, call: Callable[[], tuple[Tensor, ...]], expected: Expected
) -> dict[str, Comparison]:
    """As :func:`check`, of a call that makes the pass on the problem's tensors."""
    given = {n: x.detach() for n, x in problem.inputs.items()}
    given |= {f"the gradient of {n}": x for n, x in problem.named_cotangents.items()}
    before = {name: x.clone() for name, x in given.items()}
    try:
        results = call()
    finally:
        changed = [n for n, x in given.items() if not _same(x, before[n])]
        for name in changed:
            given[name].copy_(before[name])
    if changed:
        raise ChangedInput(f"it writes over its input: {', '.join(changed)}")
    return judge(problem, mode, results, expected)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def judge(
    problem: Problem, mode: str, results: Sequence[Tensor], expected: Expected
) -> dict[str, Comparison]:
    """Compare what a pass returned with what is right; the verdicts by name."""
    operation, verdicts = problem.operation, {}
    for name, actual in zip(problem.names(mode), results, strict=True):
        rows = expected.rows[name]
        if rows is not None:
            actual = actual.index_select(operation.token_axis, rows)
        # A gradient of a float32 state is made of half-precision factors that may be rounded once.
        dtype = problem.dtype if name.startswith("grad") else None
        verdicts[name] = compare(
            actual,
            expected.values[name],
            gradient=name.startswith("grad"),
            dtype=dtype,
            roundings=operation.roundings(problem.shape),
        )
    return verdicts


def worst(verdicts: Mapping[str, Comparison]) -> tuple[str, Comparison]:
    """The verdict nearest to, or furthest past, its tolerance."""

    def strain(item: tuple[str, Comparison]) -> float:
        c = item[1]
        ratio = max(c.rms_error / c.rms_tolerance, c.max_error / c.max_tolerance)
        return math.inf if math.isnan(ratio) or not c.passed else ratio

    return max(verdicts.items(), key=strain)


def own_kernels(backend: str) -> bool:
    """Whether a backend is kernels of this project, and not composed of PyTorch's operators."""
    row = kernels.backend_rows().get(backend)
    return row is not None and row.own
