"""Softmax attention, the baseline: all of it, and of one packed projection."""

import functools
from typing import ClassVar

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
)
from linear_vit.bench.problems.packed import Packed

# Above this, the float64 reference is compared on a sample of the query rows, to save minutes.
MOST_REFERENCE_FLOP = 4e10
# Those that store an N×M matrix of scores, several times over with its gradients.
_STORES_SCORES = ("reference", "sdpa_math")


# Sizes at which a kernel's time is seen, and smaller ones that launch the same.
_SIZES = (functools.partial(square, 4, 16, 2048), functools.partial(square, 4, 6, 2048))


class _Softmax(AttentionOperation):
    """What both have in common."""

    settings: ClassVar = {"scale": (None, 0.05, 0.5), "key_mask": (None, attention.PADDING)}
    backward_reads_outputs = True  # P is worked out again, and its row sums need out

    def traffic_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        return (square(2, 2, 64, head_dim), square(1, 1, 512, head_dim))

    def working_set(self, mode: str, backend: str, shape: AttentionShape) -> int:
        tokens = attention.in_float32(shape)
        if backend in _STORES_SCORES:
            scores = 4 * shape.B * shape.H * shape.N * shape.M
            return scores * (3 if mode == FORWARD else 5) + tokens
        return tokens * (1 if mode == FORWARD else 3)


class SoftmaxAttention(_Softmax):
    name = "softmax_attention"
    quick = True
    workloads: ClassVar = {
        "softmax_attention.forward": Workload(name, FORWARD, *_SIZES, ("_forward",)),
        "softmax_attention.query_gradient": Workload(
            name, FORWARD_BACKWARD, *_SIZES, ("_query_gradient",)
        ),
        "softmax_attention.key_value_gradient": Workload(
            name, FORWARD_BACKWARD, *_SIZES, ("_key_value_gradient",)
        ),
    }

    def special(self, sweep: str) -> list[Wanted]:
        if sweep == "gpu":
            return list(attention.on_gpu(attention.GPU_RANKS))
        # Beyond, a quadratic operation takes seconds a call.
        return list(attention.on_cpu((64, 128, 256, 1024), 0, ("torch",)))

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
    of = SoftmaxAttention()


OPERATIONS = (SoftmaxAttention(), SoftmaxAttentionPacked())
