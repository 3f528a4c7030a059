"""The packed form of an attention operation: one (B, N, 3, H, D) projection and its gradient."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from linear_vit.bench.problems.attention import AttentionOperation, AttentionShape, square
from linear_vit.bench.problems.case import Expected, Operation, Problem, Shape, Work
from linear_vit.bench.problems.inputs import Normal, Tensors
from linear_vit.kernels.layout import unpack_qkv


class Packed(AttentionOperation):
    """Mixed into a packed operation; ``of`` is the operation on q, k and v."""

    of: Operation
    token_axis = 1

    def drawn(self, normal: Normal, shape: AttentionShape) -> tuple[Tensors, Tensors]:
        if shape.Hk != shape.H or shape.M != shape.N:
            raise ValueError(f"{self.name} takes as many keys as queries, got {shape}")
        B, H, N, D = shape.B, shape.H, shape.N, shape.D
        return {"qkv": normal(B, N, 3, H, D)}, {"out": normal(B, N, H, D)}

    def check_shapes(
        self, head_dim: int, *, interpreted: bool = False
    ) -> tuple[AttentionShape, ...]:
        if interpreted:
            return (square(1, 2, 37, head_dim),)
        return (square(2, 6, 197, head_dim),)

    def edge_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        sizes = ((0, 2, 5), (2, 2, 0), (1, 1, 2), (1, 2, 300))
        return tuple(square(*size, head_dim) for size in sizes)

    def draw_shape(self, drawn: random.Random, head_dim: int) -> AttentionShape:
        return square(drawn.randint(1, 3), drawn.randint(1, 4), drawn.randint(2, 150), head_dim)

    def smaller(self, shape: AttentionShape) -> Iterator[AttentionShape]:
        for size in dict.fromkeys((1, shape.B // 2)):
            if 0 < size < shape.B:
                yield replace(shape, B=size)
        if shape.H > 1:
            yield replace(shape, H=1, Hk=1)
        for size in dict.fromkeys((2, 3, shape.N // 2, shape.N - 1)):
            if 1 < size < shape.N:
                yield replace(shape, N=size, M=size)

    def traffic_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        return _alike(super().traffic_shapes(head_dim))

    def static_shapes(self, head_dim: int, *, ragged: bool) -> tuple[AttentionShape, ...]:
        return _alike(super().static_shapes(head_dim, ragged=ragged))

    def least_work(self, mode: str, shape: AttentionShape, element_size: int) -> Work:
        """The operation's own: the same tensors, lying otherwise."""
        return self.of.least_work(mode, shape, element_size)

    def working_set(self, mode: str, backend: str, shape: AttentionShape) -> int:
        return self.of.working_set(mode, backend, shape)

    def expected(self, problem: Problem) -> Expected:
        """By way of the operation on q, k and v."""
        q, k, v = (x.detach() for x in unpack_qkv(problem.inputs["qkv"]))
        unpacked = replace(
            problem,
            operation=self.of,
            inputs={"q": q, "k": k, "v": v},
            cotangents=tuple(g.transpose(1, 2) for g in problem.cotangents),
        )
        expected = self.of.expected(unpacked)
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


def _alike(shapes: Sequence[Shape]) -> tuple[AttentionShape, ...]:
    """Those that can be packed: as many keys and heads of them as queries."""
    return tuple(s for s in shapes if isinstance(s, AttentionShape) and s.Hk == s.H and s.M == s.N)
