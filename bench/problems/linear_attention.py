"""Linear attention: all of it, of one packed projection, its state, and reading a state."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench.problems import attention
from linear_vit.bench.problems.attention import AttentionOperation, AttentionShape, square
from linear_vit.bench.problems.case import (
    FORWARD,
    FORWARD_BACKWARD,
    Expected,
    Problem,
    Wanted,
    Work,
    Workload,
    own_kernels,
)
from linear_vit.bench.problems.inputs import Normal, Tensors
from linear_vit.bench.problems.packed import Packed

_PROBE_REPEATS = 200_000


def _state_bytes(shape: AttentionShape) -> int:
    """Of S and z of one sequence, in float32."""
    return 4 * shape.Hk * (2 * shape.D**2 + 2 * shape.D)


# Sizes at which a kernel's time is seen, and smaller ones that launch the same.
_LONG = (functools.partial(square, 1, 16, 65_536), functools.partial(square, 1, 6, 8192))
_ONE = (functools.partial(square, 1, 1, 16_384), functools.partial(square, 1, 1, 8192))
_SHORT = (functools.partial(square, 128, 6, 256), functools.partial(square, 16, 6, 256))


class _Linear(AttentionOperation):
    """What the four have in common."""

    settings: ClassVar[Mapping[str, Sequence[Any]]] = {
        "eps": (1e-6, 1e-3, 0.0),
        "key_mask": (None, attention.PADDING),
    }
    scales: ClassVar[Sequence[tuple[float, float]]] = ((1e-2, 0.0), (1.0, 1.0), (30.0, 1.0))

    def probes(self, device: torch.device) -> dict[str, Callable[[], float]]:
        """FMAs on registers, FMAs that each load a vector from the L1 cache, any instructions."""
        if device.type != "cpu" or kernels.backends(self.name, device)["cpu"] is not None:
            return {}
        importlib.import_module("linear_vit.kernels.linear_attention.cpu")  # defines the operator
        probe = torch.ops.linear_vit.cpu_linear_attention_probe
        names = ("fma", "load", "instructions")  # in the order of the operator's numbers
        return {n: functools.partial(probe, i, _PROBE_REPEATS) for i, n in enumerate(names)}

    def traffic_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        return (square(2, 2, 64, head_dim), square(1, 2, 4096, head_dim))

    def working_set(self, mode: str, backend: str, shape: AttentionShape) -> int:
        tokens = attention.in_float32(shape)
        if own_kernels(backend):
            return tokens + 64 * shape.B * _state_bytes(shape)
        return tokens * (5 if mode == FORWARD else 12)  # φ of every token, and its gradients


class LinearAttention(_Linear):
    name = "linear_attention"
    quick = True
    workloads: ClassVar = {
        "linear_attention.short_forward": Workload(name, FORWARD, *_SHORT, ("_short_forward",)),
        "linear_attention.short_backward": Workload(
            name, FORWARD_BACKWARD, *_SHORT, ("_short_backward",)
        ),
    }

    def special(self, sweep: str) -> list[Wanted]:
        if sweep == "gpu":
            return list(attention.on_gpu(attention.GPU_RANKS))
        lengths = (64, 128, 256, 1024, 4096, 16_384, 65_536)
        at_the_same_work = attention.on_cpu(lengths, 0, ("cpu", "compiled"))
        scaling = [
            Wanted(200 + i, FORWARD, "float32", self.shape(1024 << i), ("cpu",)) for i in range(11)
        ]
        return [*at_the_same_work, *scaling]

    def traffic_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        short, long = super().traffic_shapes(head_dim)
        # Several tiles in one launch; and query heads that share keys and values, as
        # HydraAttention's.
        middle = square(1, 2, 200, head_dim)
        return (short, middle, long, AttentionShape(1, 4, 1, 1024, 1024, head_dim))

    def static_shapes(self, head_dim: int, *, ragged: bool) -> tuple[AttentionShape, ...]:
        shapes = super().static_shapes(head_dim, ragged=ragged)
        if ragged:
            return shapes
        # One launch, of several tiles that are read again for the state; and of a kept state.
        more = (square(1, 2, 200, head_dim), square(26, 6, 260, head_dim))
        return (*shapes[:2], *more, *shapes[2:])

    def least_work(self, mode: str, shape: AttentionShape, element_size: int) -> Work:
        """Each of q, k, v read once and out written once, 4·D² FLOP per key token and 4·D² per
        query token; backward reads q, k, v, dout, writes dq, dk, dv, and does twice that (S and z
        kept)."""
        backward = mode == FORWARD_BACKWARD
        queries, keys = shape.H * shape.N * shape.D, shape.Hk * shape.M * shape.D
        elements = 2 * queries + 2 * keys + backward * (3 * queries + 4 * keys)
        flop = 4 * shape.D * (queries + keys) * (3 if backward else 1)
        return Work(shape.B * elements * element_size, shape.B * flop)

    def expected(self, problem: Problem) -> Expected:
        """In chunks of tokens, so that no feature map of a long sequence is held: states of
        disjoint token ranges add up, and query rows are independent of one another."""
        return _expected_in_chunks(problem)


class LinearAttentionPacked(Packed, _Linear):
    name = "linear_attention_packed"
    of = LinearAttention()


class _Part(_Linear):
    """The state, or reading it: on a CPU, timed for the roofline.

    Attributes:
        per_fma: what the C++ kernels take of the processor beside an FMA, as cpu_simd.cpp's header
            counts it for AVX-512.
    """

    per_fma: ClassVar[dict[str, float]]

    def special(self, sweep: str) -> list[Wanted]:
        if sweep != "cpu":
            return []
        return list(attention.on_cpu((1024, 65_536), 300, ("cpu",), (FORWARD,), ("float32",)))

    def fresh_bytes(self, shape: AttentionShape) -> float:
        """Of an output that is too large to be reused memory."""
        return 0

    def needs(self, backend: str, mode: str, shape: AttentionShape) -> dict[str, float]:
        """Half of the dense work: the rows that a sign picks."""
        if backend != "cpu" or mode != FORWARD:
            return {}
        done = self.least_work(mode, shape, 4).flop / 2
        taken = {name: done * n for name, n in self.per_fma.items()}
        return {**taken, "fresh": self.fresh_bytes(shape)}


class LinearAttentionState(_Part):
    name = "linear_attention_state"
    settings: ClassVar = {"key_mask": (None, attention.PADDING)}
    per_fma: ClassVar = {"fma": 1, "load": 6 / 8, "instructions": 18 / 8}
    workloads: ClassVar = {
        "linear_attention.state": Workload(name, FORWARD, *_LONG, ("_state", "_feature_outer")),
        # Partial sums are float32 always.
        "linear_attention.reduce": Workload(name, FORWARD, *_ONE, ("_reduce",), torch.float32),
        "linear_attention.key_value_gradient": Workload(
            name, FORWARD_BACKWARD, *_LONG, ("_key_value_gradient",)
        ),
    }

    def drawn(self, normal: Normal, shape: AttentionShape) -> tuple[Tensors, Tensors]:
        B, Hk, M, D = shape.B, shape.Hk, shape.M, shape.D
        inputs = {"k": normal(B, Hk, M, D), "v": normal(B, Hk, M, D)}
        sizes = {"S": (B, Hk, 2 * D, D), "z": (B, Hk, 2 * D)}
        return inputs, {n: normal(*size, dtype=torch.float32) for n, size in sizes.items()}

    def least_work(self, mode: str, shape: AttentionShape, element_size: int) -> Work:
        """k and v read once, S and z written; backward reads them again with dS and dz and writes
        dk, dv."""
        backward = mode == FORWARD_BACKWARD
        keys = shape.Hk * shape.M * shape.D
        elements = 2 * keys + backward * 4 * keys
        states = _state_bytes(shape) * (2 if backward else 1)
        flop = 4 * shape.D * keys * (3 if backward else 1)
        return Work(shape.B * (elements * element_size + states), shape.B * flop)


class LinearAttentionApply(_Part):
    name = "linear_attention_apply"
    settings: ClassVar = {"eps": (1e-6, 1e-3, 0.0)}
    scales: ClassVar = ()
    per_fma: ClassVar = {"fma": 1, "load": 4 / 4, "instructions": 8 / 4}
    workloads: ClassVar = {
        "linear_attention.apply": Workload(name, FORWARD, *_LONG, ("_apply",)),
        "linear_attention.query_gradient": Workload(
            name, FORWARD_BACKWARD, *_LONG, ("_query_gradient",)
        ),
        "linear_attention.query_sums": Workload(
            name, FORWARD_BACKWARD, *_LONG, ("_feature_outer",)
        ),
    }

    def fresh_bytes(self, shape: AttentionShape) -> float:
        return 4 * shape.B * shape.H * shape.N * shape.D

    def drawn(self, normal: Normal, shape: AttentionShape) -> tuple[Tensors, Tensors]:
        B, H, Hk, N, D = shape.B, shape.H, shape.Hk, shape.N, shape.D
        # A state that tokens made: a random z could be negative, and divide by nothing.
        S, z = kernels.linear_attention_state(
            normal(B, Hk, 256, D), normal(B, Hk, 256, D), backend="reference"
        )
        return {"q": normal(B, H, N, D), "S": S, "z": z}, {"out": normal(B, H, N, D)}

    def least_work(self, mode: str, shape: AttentionShape, element_size: int) -> Work:
        """q, S and z read once, out written; backward reads them again with dout and writes dq, dS
        and dz."""
        backward = mode == FORWARD_BACKWARD
        queries = shape.H * shape.N * shape.D
        elements = 2 * queries + backward * 3 * queries
        states = _state_bytes(shape) * (3 if backward else 1)
        flop = 4 * shape.D * queries * (3 if backward else 1)
        return Work(shape.B * (elements * element_size + states), shape.B * flop)


OPERATIONS = (
    LinearAttention(),
    LinearAttentionPacked(),
    LinearAttentionState(),
    LinearAttentionApply(),
)


def _expected_in_chunks(problem: Problem) -> Expected:
    chunk = attention.CHUNK
    q, k, v = (problem.inputs[name].detach().double() for name in "qkv")
    (g,) = (x.double() for x in problem.cotangents)
    query_rows, key_rows = (
        attention.sample(x.shape[2], x.device) if x.shape[2] > attention.MOST_ROWS else None
        for x in (q, k)
    )

    def state(rows: slice) -> tuple[Tensor, Tensor]:
        return kernels.linear_attention_state(k[:, :, rows], v[:, :, rows], backend="reference")

    S, z = state(slice(0, chunk))
    for start in range(chunk, k.shape[2], chunk):
        more_S, more_z = state(slice(start, start + chunk))
        S, z = S + more_S, z + more_z
    S, z = S.requires_grad_(), z.requires_grad_()

    out, dq = torch.empty_like(q), torch.empty_like(q)
    dS, dz = torch.zeros_like(S), torch.zeros_like(z)
    for start in range(0, q.shape[2], chunk):
        rows = slice(start, start + chunk)
        part = q[:, :, rows].requires_grad_()
        result = kernels.linear_attention_apply(part, S, z, backend="reference")
        out[:, :, rows] = result.detach()
        dq[:, :, rows], more_dS, more_dz = torch.autograd.grad(result, (part, S, z), g[:, :, rows])
        dS, dz = dS + more_dS, dz + more_dz

    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for start in range(0, k.shape[2], chunk):
        rows = slice(start, start + chunk)
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
