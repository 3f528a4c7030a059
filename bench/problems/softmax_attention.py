"""Softmax attention, the baseline: all of it, and of one packed projection."""

from typing import ClassVar

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench.problems import attention
from linear_vit.bench.problems.attention import AttentionShape, square
from linear_vit.bench.problems.case import (
    FORWARD,
    FORWARD_BACKWARD,
    Expected,
    Operation,
    Problem,
    Work,
    Workload,
)
from linear_vit.bench.problems.inputs import Normal
from linear_vit.bench.problems.packed import Packed

# Above this, the float64 reference is compared on a sample of the query rows, to save minutes.
MOST_REFERENCE_FLOP = 4e10
# Those that store an N×M matrix of scores, several times over with its gradients.
_STORES_SCORES = ("reference", "sdpa_math")
_GROUPED = (64, 96)  # head dims at which grouped queries are compiled too


def _workload(mode: str, function: str) -> Workload:
    return Workload(
        "softmax_attention",
        mode,
        lambda dim: square(4, 16, 2048, dim),
        lambda dim: square(4, 6, 2048, dim),
        (function,),
    )


class _Softmax(Operation):
    """What both have in common."""

    backward_reads_outputs = True  # P is worked out again, and its row sums need out

    def shape(self, tokens: int, batch: int = 1) -> AttentionShape:
        return square(batch, attention.HEADS, tokens, attention.HEAD_DIM)

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        return attention.lengths(device_type, extent)

    def check_shapes(
        self, head_dim: int, *, interpreted: bool = False
    ) -> tuple[AttentionShape, ...]:
        # Ragged on purpose: no power of two, N ≠ M, grouped heads.
        if interpreted:
            return (AttentionShape(1, 2, 1, 37, 70, head_dim),)
        return (
            AttentionShape(2, 6, 6, 197, 197, head_dim),
            AttentionShape(1, 4, 1, 77, 130, head_dim),
        )

    def traffic_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        return (square(2, 2, 64, head_dim), square(1, 1, 512, head_dim))

    def static_shapes(self, head_dim: int, *, ragged: bool) -> tuple[AttentionShape, ...]:
        D = head_dim
        if ragged:
            return (square(1, 2, 197, D), square(1, 2, 4099, D))
        shapes = (square(1, 2, 8192, D), square(8, 6, 64, D))
        if D not in _GROUPED:
            return shapes
        return (*shapes, AttentionShape(1, 4, 1, 8192, 8192, D), AttentionShape(8, 4, 1, 64, 64, D))

    def working_set(self, mode: str, backend: str, shape: AttentionShape) -> int:
        tokens = attention.in_float32(shape)
        if backend in _STORES_SCORES:
            scores = 4 * shape.B * shape.H * shape.N * shape.M
            return scores * (3 if mode == FORWARD else 5) + tokens
        return tokens * (1 if mode == FORWARD else 3)

    def size_name(self, shape: AttentionShape) -> str:
        return attention.size_name(shape)

    def parse_size(self, text: str) -> AttentionShape | None:
        return attention.parse_size(text)


class SoftmaxAttention(_Softmax):
    name = "softmax_attention"
    title = "Softmax attention"
    quick = True
    workloads: ClassVar = {
        "softmax_attention.forward": _workload(FORWARD, "_forward"),
        "softmax_attention.query_gradient": _workload(FORWARD_BACKWARD, "_query_gradient"),
        "softmax_attention.key_value_gradient": _workload(FORWARD_BACKWARD, "_key_value_gradient"),
    }

    def problem(
        self, shape: AttentionShape, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        normal = Normal(dtype, device, seed)
        B, H, Hk, N, M, D = shape.B, shape.H, shape.Hk, shape.N, shape.M, shape.D
        inputs = {"q": normal(B, H, N, D), "k": normal(B, Hk, M, D), "v": normal(B, Hk, M, D)}

        def run(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
            return (kernels.softmax_attention(t["q"], t["k"], t["v"], backend=backend),)

        return normal.problem(self, shape, inputs, ("out",), (normal(B, H, N, D),), run)

    def least_work(self, mode: str, shape: AttentionShape, element_size: int) -> Work:
        """4·N·M·D per head forward; backward five products, 10·N·M·D, since P has to be recomputed
        where no N×M matrix is stored; it reads q, k, v, dout, out and writes dq, dk, dv."""
        backward = mode == FORWARD_BACKWARD
        queries, keys = shape.H * shape.N * shape.D, shape.Hk * shape.M * shape.D
        elements = 2 * queries + 2 * keys + backward * (4 * queries + 4 * keys)
        flop = (14 if backward else 4) * shape.H * shape.N * shape.M * shape.D
        return Work(shape.B * elements * element_size, shape.B * flop)

    def expected(self, problem: Problem) -> Expected:
        """In chunks of query rows; where even that is too long, on a sample of them."""
        q, k, v = (problem.inputs[name].detach().double() for name in "qkv")
        (cotangent,) = problem.cotangents
        shape = problem.shape
        sampled: Tensor | None = None
        if 14 * shape.B * shape.H * shape.N * shape.M * shape.D > MOST_REFERENCE_FLOP:
            # The gradient of all other rows is set to zero, so that dk and dv, which sum over the
            # queries, depend on the sampled rows alone and can be compared in full.
            sampled = attention.sample(shape.N, q.device)
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
        step = max(1, attention.CHUNK * 1024 // max(1, shape.B * shape.H * shape.M))
        for start in range(0, q.shape[2], step):
            rows = slice(start, start + step)
            part = q[:, :, rows].requires_grad_()
            result = kernels.softmax_attention(part, k, v, backend="reference")
            out[:, :, rows] = result.detach()
            gradients = torch.autograd.grad(result, (part, k, v), g[:, :, rows])
            dq[:, :, rows] = gradients[0]
            dk, dv = dk + gradients[1], dv + gradients[2]
        values = {"out": out, "grad q": dq, "grad k": dk, "grad v": dv}
        rows_of = {"out": sampled, "grad q": sampled, "grad k": None, "grad v": None}
        return Expected(values, rows_of, (cotangent,))


class SoftmaxAttentionPacked(Packed, _Softmax):
    name = "softmax_attention_packed"
    title = "Softmax attention, packed"
    of = SoftmaxAttention()


OPERATIONS = (SoftmaxAttention(), SoftmaxAttentionPacked())
