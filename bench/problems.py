"""One instance of an operation: its tensors, its least work, and what the right answer is.

A :class:`Problem` is shared by the benchmarks and the cross-check, by every backend and both
passes, so that all are given the same numbers and held to the same float64 reference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.attention.ripple import halving_axes
from linear_vit.bench import peers
from linear_vit.kernels.accuracy import Comparison, compare
from linear_vit.kernels.layout import unpack_qkv

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
# Packed form -> the operation it is of. Tokens are axis 1 there, and axis 2 elsewhere.
PACKED = {
    "linear_attention_packed": "linear_attention",
    "softmax_attention_packed": "softmax_attention",
}

# The whole pyramid in one call, and its stages in the module as it is configured by default.
PYRAMIDS = ("ripple_pool_stages", "ripple_expand_stages")
_STAGES = 3

# Tokens of one float64 reference chunk: 8,192 x 6 heads x 128 features is 50 MB.
_CHUNK = 8192
# Above these, the reference is compared on a sample of the token rows: the float64 results of
# longer sequences fill the memory, and those of a quadratic operation take minutes.
_MOST_ROWS = 131_072
_MOST_REFERENCE_FLOP = 4e10
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class AttentionShape:
    """Batch, query heads, key/value heads, query tokens, key/value tokens, head dimension."""

    B: int
    H: int
    Hk: int
    N: int
    M: int
    D: int


@dataclass(frozen=True)
class RippleShape:
    """Batch, token grid, channels, and the axis (0 rows, 1 columns) that is halved.

    A pyramid has the module's three stages, or as many as the grid has halvings.
    """

    B: int
    rows: int
    cols: int
    C: int
    axis: int = 0

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


Shape = AttentionShape | RippleShape


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

    operation: str
    shape: Shape
    dtype: torch.dtype
    inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    cotangents: tuple[Tensor, ...]
    run: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]

    def call(self, backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        """A closure without arguments that does one pass: what is timed.

        Forward runs on tensors that ask for no gradient, as inference does; forward+backward
        returns the outputs and then the gradient of each input.
        """
        if mode == FORWARD:
            plain = {name: x.detach() for name, x in self.inputs.items()}
            return lambda: self.run(plain, backend)
        return lambda: self.gradients(backend, self.cotangents)

    def gradients(self, backend: str, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = self.run(self.inputs, backend)
        leaves = tuple(self.inputs.values())
        return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

    def names(self, mode: str) -> tuple[str, ...]:
        """Names of what :meth:`call` returns."""
        if mode == FORWARD:
            return self.output_names
        return self.output_names + tuple(f"grad {name}" for name in self.inputs)


def make_problem(
    operation: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Random inputs of zero mean and unit variance (ripple weights as a model initialises them).

    Args:
        operation: one of ``kernels.OPERATIONS``.
        shape: an :class:`AttentionShape`, or a :class:`RippleShape` for the ripple operations.
        dtype: of every input, except the float32 state.
        device: where they live. Values are drawn there, so the seed gives other ones elsewhere.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs: dict[str, Tensor]
    output_names: tuple[str, ...] = ("out",)
    cotangents: tuple[Tensor, ...]
    run: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]

    if isinstance(shape, RippleShape):
        B, rows, cols, C = shape.B, shape.rows, shape.cols, shape.C
        axis, coarse = shape.axis, shape.coarse
        if operation == "ripple_pool":
            inputs = {
                "x": normal(B, rows, cols, C),
                "weight": (0.05 * normal(C, 3, 3, dtype=torch.float32) + 1 / 9).to(dtype),
            }
            cotangents = (normal(B, *coarse, C),)

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                return (kernels.ripple_pool(t["x"], t["weight"], axis=axis, backend=backend),)
        elif operation == "ripple_expand":
            inputs = {
                "z": normal(B, *coarse, C),
                "x": normal(B, rows, cols, C),
                "weight": (1 + 0.1 * normal(2, C, dtype=torch.float32)).to(dtype),
                "lateral_weight": (0.1 * normal(C, 3, 3, dtype=torch.float32)).to(dtype),
            }
            cotangents = (normal(B, rows, cols, C),)

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                z, x, w, lateral = t["z"], t["x"], t["weight"], t["lateral_weight"]
                return (kernels.ripple_expand(z, x, w, lateral, axis=axis, backend=backend),)
        elif operation in PYRAMIDS:
            axes = shape.axes
            stages = range(len(axes))
            levels = [normal(B, *grid, C) for grid in shape.levels]

            def filters(mean: float, std: float, *size: int) -> list[Tensor]:
                return [(mean + std * normal(*size, dtype=torch.float32)).to(dtype) for _ in stages]

            if operation == "ripple_pool_stages":
                inputs = {"x": levels[0]} | _numbered("weight", filters(1 / 9, 0.05, C, 3, 3))
                output_names = tuple(_numbered("level", levels[1:]))
                cotangents = tuple(levels[1:])  # random tensors of the right sizes

                def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                    weights = [t[f"weight {s}"] for s in stages]
                    return kernels.ripple_pool_stages(t["x"], weights, axes=axes, backend=backend)
            else:
                inputs = {"z": levels[-1]} | _numbered("x", levels[:-1])
                inputs |= _numbered("weight", filters(1, 0.1, 2, C))
                inputs |= _numbered("lateral weight", filters(0, 0.1, C, 3, 3))
                cotangents = (normal(B, rows, cols, C),)

                def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                    lists = [
                        [t[f"{n} {s}"] for s in stages] for n in ("x", "weight", "lateral weight")
                    ]
                    return (
                        kernels.ripple_expand_stages(t["z"], *lists, axes=axes, backend=backend),
                    )
        else:
            raise ValueError(f"{operation} does not take a token grid: give it an AttentionShape")
    else:
        B, H, Hk, N, M, D = shape.B, shape.H, shape.Hk, shape.N, shape.M, shape.D
        if operation in ("linear_attention", "softmax_attention"):
            inputs = {
                "q": normal(B, H, N, D),
                "k": normal(B, Hk, M, D),
                "v": normal(B, Hk, M, D),
            }
            cotangents = (normal(B, H, N, D),)
            function = getattr(kernels, operation)

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                return (function(t["q"], t["k"], t["v"], backend=backend),)
        elif operation in PACKED:
            if Hk != H or M != N:
                raise ValueError(f"{operation} takes as many keys as queries, got {shape}")
            inputs = {"qkv": normal(B, N, 3, H, D)}
            cotangents = (normal(B, N, H, D),)
            packed_function = getattr(kernels, operation)

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                return (packed_function(t["qkv"], backend=backend),)
        elif operation == "linear_attention_state":
            inputs = {"k": normal(B, Hk, M, D), "v": normal(B, Hk, M, D)}
            output_names = ("S", "z")
            cotangents = (
                normal(B, Hk, 2 * D, D, dtype=torch.float32),
                normal(B, Hk, 2 * D, dtype=torch.float32),
            )

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                return kernels.linear_attention_state(t["k"], t["v"], backend=backend)
        elif operation == "linear_attention_apply":
            # A state that tokens made: a random z could be negative, and divide by nothing.
            S, z = kernels.linear_attention_state(
                normal(B, Hk, 256, D), normal(B, Hk, 256, D), backend="reference"
            )
            inputs = {"q": normal(B, H, N, D), "S": S, "z": z}
            cotangents = (normal(B, H, N, D),)

            def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
                return (kernels.linear_attention_apply(t["q"], t["S"], t["z"], backend=backend),)
        else:
            known = ", ".join(kernels.OPERATIONS)
            raise ValueError(f"unknown operation {operation!r}; there are {known}")
    for x in inputs.values():
        x.requires_grad_()

    def run_any(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        if backend in peers.NAMES:
            return peers.run(backend, operation, tensors)
        return run(tensors, backend)

    return Problem(operation, shape, dtype, inputs, output_names, cotangents, run_any)


def _numbered(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name} {s}": x for s, x in enumerate(tensors)}


def least_work(operation: str, mode: str, shape: Shape, element_size: int) -> Work:
    """The least traffic and work of one call, whatever the implementation does.

    Linear attention: each of q, k, v read once and out written once, 4·D² FLOP per key token and
    4·D² per query token; backward reads q, k, v, dout, writes dq, dk, dv, and does twice that (S
    and z kept). Softmax: 4·N·M·D per head forward; backward five products, 10·N·M·D, since P has to
    be recomputed where no N×M matrix is stored; it reads q, k, v, dout, out and writes dq, dk, dv.
    Ripple: every tensor argument and result once, a multiply and an add per tap; backward twice
    that.
    """
    operation = PACKED.get(operation, operation)
    backward = mode == FORWARD_BACKWARD
    e = element_size
    if isinstance(shape, RippleShape):
        fine = shape.B * shape.rows * shape.cols * shape.C
        coarse = shape.B * math.prod(shape.coarse) * shape.C
        weights = (9 if operation == "ripple_pool" else 11) * shape.C
        # Backward reads every input and dout, and writes a gradient per input.
        if operation in PYRAMIDS:
            sizes = [shape.B * math.prod(grid) * shape.C for grid in shape.levels]
            per_stage = 9 if operation == "ripple_pool_stages" else 11
            weights = per_stage * shape.C * len(shape.axes)
            if operation == "ripple_pool_stages":
                read, written, flop = fine + weights, sum(sizes[1:]), 18 * sum(sizes[1:])
            else:
                read, written, flop = sum(sizes) + weights, fine, 20 * sum(sizes[:-1])
        elif operation == "ripple_pool":
            read, written, flop = fine + weights, coarse, 18 * coarse
        else:
            read, written, flop = coarse + fine + weights, fine, 20 * fine
        elements = read + written + backward * (read + written + read)
        return Work(elements * e, flop * (3 if backward else 1))

    B, H, Hk, N, M, D = shape.B, shape.H, shape.Hk, shape.N, shape.M, shape.D
    queries, keys = H * N * D, Hk * M * D
    state = 4 * Hk * (2 * D * D + 2 * D)
    if operation == "linear_attention":
        elements = 2 * queries + 2 * keys + backward * (3 * queries + 4 * keys)
        work = Work(elements * e, 4 * D * (queries + keys) * (3 if backward else 1))
    elif operation == "linear_attention_state":
        elements = 2 * keys + backward * 4 * keys
        work = Work(
            elements * e + state * (2 if backward else 1), 4 * D * keys * (3 if backward else 1)
        )
    elif operation == "linear_attention_apply":
        elements = 2 * queries + backward * 3 * queries
        work = Work(
            elements * e + state * (3 if backward else 1), 4 * D * queries * (3 if backward else 1)
        )
    elif operation == "softmax_attention":
        elements = 2 * queries + 2 * keys + backward * (4 * queries + 4 * keys)
        work = Work(elements * e, (14 if backward else 4) * H * N * M * D)
    else:
        raise ValueError(f"no work formula for {operation!r}")
    return Work(B * work.bytes, B * work.flop)


def expected_results(problem: Problem) -> Expected:
    """The problem's results and gradients by the reference in float64.

    Worked out in chunks of tokens, so that no N×M matrix or feature map of a long sequence is held:
    states of disjoint token ranges add up, and query rows are independent of one another. Where
    even that is too long, on a sample of the rows (see :class:`Expected`).
    """
    if problem.operation in PACKED:
        return _expected_packed(problem)
    double = {name: x.detach().double() for name, x in problem.inputs.items()}
    if problem.operation in ("linear_attention", "softmax_attention"):
        assert isinstance(problem.shape, AttentionShape)
        if problem.operation == "linear_attention":
            return _expected_linear_attention(problem, double)
        return _expected_softmax_attention(problem, double)
    leaves = {name: x.requires_grad_() for name, x in double.items()}
    outputs = problem.run(leaves, "reference")
    cotangents = tuple(g.double() for g in problem.cotangents)
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents)
    results = (*(x.detach() for x in outputs), *gradients)
    values = dict(zip(problem.names(FORWARD_BACKWARD), results, strict=True))
    return Expected(values, dict.fromkeys(values), problem.cotangents)


def expected_of_peer(problem: Problem, name: str) -> Expected:
    """Float64 results of the function that a peer computes instead of the operation's."""
    leaves = [x.detach().double().requires_grad_() for x in problem.inputs.values()]
    out = peers.expected(name)(*leaves)
    gradients = torch.autograd.grad(out, leaves, [g.double() for g in problem.cotangents])
    values = dict(zip(problem.names(FORWARD_BACKWARD), (out.detach(), *gradients), strict=True))
    return Expected(values, dict.fromkeys(values), problem.cotangents)


def check(problem: Problem, backend: str, mode: str, expected: Expected) -> dict[str, Comparison]:
    """Run one pass and compare everything it returns; the verdicts by name."""
    if mode == FORWARD:
        results = problem.call(backend, mode)()
    else:
        results = problem.gradients(backend, expected.cotangents)
    # A backend without a fused form rounds between the stages.
    roundings = 1
    if problem.operation in PYRAMIDS:
        assert isinstance(problem.shape, RippleShape)
        roundings = len(problem.shape.axes)
    verdicts = {}
    for name, actual in zip(problem.names(mode), results, strict=True):
        rows = expected.rows[name]
        if rows is not None:
            actual = actual.index_select(1 if problem.operation in PACKED else 2, rows)
        # A gradient of the float32 state is made of half-precision factors that may be rounded
        # once.
        dtype = problem.dtype if name.startswith("grad") else None
        verdicts[name] = compare(
            actual,
            expected.values[name],
            gradient=name.startswith("grad"),
            dtype=dtype,
            roundings=roundings,
        )
    return verdicts


def worst(verdicts: dict[str, Comparison]) -> tuple[str, Comparison]:
    """The verdict nearest to, or furthest past, its tolerance."""

    def strain(item: tuple[str, Comparison]) -> float:
        c = item[1]
        ratio = max(c.rms_error / c.rms_tolerance, c.max_error / c.max_tolerance)
        return math.inf if math.isnan(ratio) or not c.passed else ratio

    return max(verdicts.items(), key=strain)


def _expected_linear_attention(problem: Problem, double: dict[str, Tensor]) -> Expected:
    q, k, v = double["q"], double["k"], double["v"]
    (g,) = (x.double() for x in problem.cotangents)
    query_rows = _sample(q.shape[2], q.device) if q.shape[2] > _MOST_ROWS else None
    key_rows = _sample(k.shape[2], k.device) if k.shape[2] > _MOST_ROWS else None

    def state(rows: slice) -> tuple[Tensor, Tensor]:
        return kernels.linear_attention_state(k[:, :, rows], v[:, :, rows], backend="reference")

    def apply(q: Tensor) -> Tensor:
        return kernels.linear_attention_apply(q, S, z, backend="reference")

    S, z = state(slice(0, _CHUNK))
    for start in range(_CHUNK, k.shape[2], _CHUNK):
        more_S, more_z = state(slice(start, start + _CHUNK))
        S, z = S + more_S, z + more_z
    S, z = S.requires_grad_(), z.requires_grad_()

    out, dq = torch.empty_like(q), torch.empty_like(q)
    dS, dz = torch.zeros_like(S), torch.zeros_like(z)
    for start in range(0, q.shape[2], _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = q[:, :, rows].requires_grad_()
        result = apply(part)
        out[:, :, rows] = result.detach()
        dq[:, :, rows], more_dS, more_dz = torch.autograd.grad(result, (part, S, z), g[:, :, rows])
        dS, dz = dS + more_dS, dz + more_dz

    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for start in range(0, k.shape[2], _CHUNK):
        rows = slice(start, start + _CHUNK)
        parts = (k[:, :, rows].requires_grad_(), v[:, :, rows].requires_grad_())
        states = kernels.linear_attention_state(*parts, backend="reference")
        dk[:, :, rows], dv[:, :, rows] = torch.autograd.grad(states, parts, (dS, dz))

    picked = {
        "out": (out, query_rows),
        "grad q": (dq, query_rows),
        "grad k": (dk, key_rows),
        "grad v": (dv, key_rows),
    }
    values = {n: x if rows is None else x[:, :, rows] for n, (x, rows) in picked.items()}
    return Expected(values, {n: rows for n, (_, rows) in picked.items()}, problem.cotangents)


def _expected_softmax_attention(problem: Problem, double: dict[str, Tensor]) -> Expected:
    q, k, v = double["q"], double["k"], double["v"]
    (cotangent,) = problem.cotangents
    shape = problem.shape
    assert isinstance(shape, AttentionShape)
    sampled: Tensor | None = None
    if 14 * shape.B * shape.H * shape.N * shape.M * shape.D > _MOST_REFERENCE_FLOP:
        # The gradient of all other rows is set to zero, so that dk and dv, which sum over the
        # queries, depend on the sampled rows alone and can be compared in full.
        sampled = _sample(shape.N, q.device)
        sparse = torch.zeros_like(cotangent)
        sparse[:, :, sampled] = cotangent[:, :, sampled]
        cotangent, q = sparse, q[:, :, sampled]
        g = cotangent[:, :, sampled].double()
    else:
        g = cotangent.double()

    k, v = k.requires_grad_(), v.requires_grad_()
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    # Chunks that keep the reference's matrix of scores near 64 MB.
    step = max(1, _CHUNK * 1024 // max(1, shape.B * shape.H * shape.M))
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        part = q[:, :, rows].requires_grad_()
        result = kernels.softmax_attention(part, k, v, backend="reference")
        out[:, :, rows] = result.detach()
        dq[:, :, rows], more_dk, more_dv = torch.autograd.grad(result, (part, k, v), g[:, :, rows])
        dk, dv = dk + more_dk, dv + more_dv
    values = {"out": out, "grad q": dq, "grad k": dk, "grad v": dv}
    rows_of = {"out": sampled, "grad q": sampled, "grad k": None, "grad v": None}
    return Expected(values, rows_of, (cotangent,))


def _expected_packed(problem: Problem) -> Expected:
    """By way of the operation on q, k and v."""
    q, k, v = (x.detach() for x in unpack_qkv(problem.inputs["qkv"]))
    unpacked = replace(
        problem,
        operation=PACKED[problem.operation],
        inputs={"q": q, "k": k, "v": v},
        cotangents=tuple(g.transpose(1, 2) for g in problem.cotangents),
    )
    expected = expected_results(unpacked)
    rows = expected.rows["grad k"]
    gradients = [expected.values[f"grad {name}"] for name in "qkv"]
    if rows is None and expected.rows["grad q"] is not None:
        # Sampled queries: the gradient of all other rows was set to zero, so theirs is zero.
        dq = torch.zeros_like(gradients[1])
        dq[:, :, expected.rows["grad q"]] = gradients[0]
        gradients[0] = dq
    return Expected(
        {
            "out": expected.values["out"].transpose(1, 2),
            "grad qkv": torch.stack(gradients).permute(1, 3, 0, 2, 4),
        },
        {"out": expected.rows["out"], "grad qkv": rows},
        tuple(g.transpose(1, 2) for g in expected.cotangents),
    )


def _sample(tokens: int, device: torch.device) -> Tensor:
    """Rows spread over the sequence, the first and the last among them: tiles end there."""
    count = min(tokens, _SAMPLED_ROWS)
    spread = torch.linspace(0, tokens - 1, count, dtype=torch.float64)
    return spread.round().long().to(device)
