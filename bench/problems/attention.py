"""What attention operations share: shapes, inputs, and the rows compared where there are many."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from linear_vit.bench.problems.case import BACKWARD, DTYPES, FORWARD, PASSES, Shape, Wanted
from linear_vit.bench.problems.inputs import Drawn, Normal, Run, Tensors

# One sequence, six heads of 64: time against N is then the scaling of one attention layer of a
# ViT-S.
HEADS, HEAD_DIM = 6, 64

# Tokens of one float64 reference chunk: 8,192 x 6 heads x 128 features is 50 MB.
CHUNK = 8192
# Above this, the reference is compared on a sample of the token rows: the float64 results of longer
# sequences fill the memory.
MOST_ROWS = 131_072
SAMPLED_ROWS = 64
_LONGEST = {("cpu", "quick"): 16_384}
_LONGEST_ELSE = 1_048_576
# Head dims at which grouped queries are compiled too: the commonest, and HydraAttention's four
# branches of dim 384.
_GROUPED = (64, 96)


@dataclass(frozen=True)
class AttentionShape(Shape):
    """Batch, query heads, key/value heads, query tokens, key/value tokens, head dimension."""

    B: int
    H: int
    Hk: int
    N: int
    M: int
    D: int

    @property
    def tokens(self) -> int:
        return self.N

    @property
    def dim(self) -> int:
        return self.D


def square(batch: int, heads: int, tokens: int, head_dim: int) -> AttentionShape:
    """As many key/value heads as query heads, and as many keys as queries."""
    return AttentionShape(batch, heads, heads, tokens, tokens, head_dim)


# Of the setting key_mask: each sequence ends with keys that are not there.
PADDING = "padding"


def _present(shape: AttentionShape, sequence: int) -> int:
    """How many keys a padded sequence has: half of them or more, and another number in each."""
    return shape.M - (shape.M // 2) * (sequence + 1) // shape.B


class AttentionOperation(Drawn):
    """An operation on queries, keys and values, or on what is made of them."""

    poisoned: ClassVar[Sequence[str]] = ("q", "k", "v", "qkv")

    def run(self, shape: AttentionShape, **settings: Any) -> Run:
        """``key_mask=PADDING`` is a mask of the problem's batch and keys."""
        if settings.get("key_mask") != PADDING:
            return super().run(shape, **settings)
        counts = torch.tensor([_present(shape, sequence) for sequence in range(shape.B)])
        present = torch.arange(shape.M) < counts.view(-1, 1)

        def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
            mask = present.to(next(iter(tensors.values())).device)
            whole = super(AttentionOperation, self).run(shape, **{**settings, "key_mask": mask})
            return whole(tensors, backend)

        return run

    def shape(self, tokens: int, batch: int = 1) -> AttentionShape:
        return square(batch, HEADS, tokens, HEAD_DIM)

    def drawn(self, normal: Normal, shape: AttentionShape) -> tuple[Tensors, Tensors]:
        """Of q, k and v."""
        B, H, Hk, N, M, D = shape.B, shape.H, shape.Hk, shape.N, shape.M, shape.D
        inputs = {"q": normal(B, H, N, D), "k": normal(B, Hk, M, D), "v": normal(B, Hk, M, D)}
        return inputs, {"out": normal(B, H, N, D)}

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        """Powers of two from 64 on."""
        longest = _LONGEST.get((device_type, extent), _LONGEST_ELSE)
        return tuple(2**i for i in range(6, longest.bit_length()))

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

    def edge_shapes(self, head_dim: int) -> tuple[AttentionShape, ...]:
        """No sequence, no query, no key; one of each; grouped heads; more than a tile of both."""
        sizes = ((0, 2, 2, 5, 5), (2, 2, 1, 0, 5), (1, 2, 2, 5, 0), (1, 1, 1, 1, 2))
        more = ((2, 6, 2, 33, 70), (1, 2, 2, 300, 290))
        return tuple(AttentionShape(*size, head_dim) for size in (*sizes, *more))

    def draw_shape(self, drawn: random.Random, head_dim: int) -> AttentionShape:
        heads = drawn.randint(1, 3)
        B, H = drawn.randint(1, 3), heads * drawn.randint(1, 3)
        return AttentionShape(B, H, heads, drawn.randint(1, 150), drawn.randint(2, 150), head_dim)

    def smaller(self, shape: AttentionShape) -> Iterator[AttentionShape]:
        """Of the same head dim, and those that the accuracy rule is made for: two keys or more."""
        if shape.Hk != shape.H:
            yield replace(shape, H=shape.Hk)
        elif shape.H > 1:
            yield replace(shape, H=1, Hk=1)
        for less in super().smaller(shape):
            assert isinstance(less, AttentionShape)
            if less.H % less.Hk == 0 and less.D == shape.D and (less.M > 1 or less.M == shape.M):
                yield less

    def rescale(self, inputs: Tensors, scale: float, mean: float) -> None:
        """q and k times the scale, v plus the mean."""
        for name, x in inputs.items():
            if name in ("q", "k"):
                x.mul_(scale)
            elif name == "v":
                x.add_(mean)
            elif name == "qkv":
                x[:, :, :2] *= scale
                x[:, :, 2] += mean

    def static_shapes(self, head_dim: int, *, ragged: bool) -> tuple[AttentionShape, ...]:
        D = head_dim
        if ragged:
            return (square(1, 2, 197, D), square(1, 2, 4099, D))
        shapes = (square(1, 2, 8192, D), square(8, 6, 64, D))
        if D not in _GROUPED:
            return shapes
        return (*shapes, AttentionShape(1, 4, 1, 8192, 8192, D), AttentionShape(8, 4, 1, 64, 64, D))

    def size_name(self, shape: AttentionShape) -> str:
        """B128-H16-N64-D32, of which what is as usual is left out."""
        s = shape
        parts = {"B": s.B, "H": s.H, "K": s.Hk, "N": s.N, "M": s.M, "D": s.D}
        usual = {"B": 1, "H": HEADS, "K": s.H, "M": s.N, "D": HEAD_DIM}
        return "-".join(f"{x}{size}" for x, size in parts.items() if size != usual.get(x))

    def parse_size(self, text: str) -> AttentionShape | None:
        n = r"(\d+)"
        form = rf"(?:B{n}-)?(?:H{n}-)?(?:K{n}-)?N{n}(?:-M{n})?(?:-D{n})?"
        match = re.fullmatch(form, text)
        if match is None:
            return None
        B, H, Hk, N, M, D = (int(found) if found else 0 for found in match.groups())
        H = H or HEADS
        return AttentionShape(B or 1, H, Hk or H, N, M or N, D or HEAD_DIM)


def in_float32(shape: AttentionShape) -> int:
    """Bytes of q, k and v in float32, heads repeated: what composed operators make first."""
    return 4 * shape.B * shape.D * (shape.H * shape.N + 2 * shape.H * shape.M)


def sample(tokens: int, device: torch.device) -> Tensor:
    """Rows spread over the sequence, the first and the last among them: tiles end there."""
    count = min(tokens, SAMPLED_ROWS)
    spread = torch.linspace(0, tokens - 1, count, dtype=torch.float64)
    return spread.round().long().to(device)


# What `--sweep gpu` times, most important first: (batch, heads, tokens).
_GPU_FIRST = ((1, 16, 65_536), (1, 1, 1_048_576), (128, 6, 64))
_GPU_CROSSOVER = tuple((4, 16, n) for n in (512, 256, 1024, 2048, 128, 4096, 8192))
_GPU_LONG = tuple((1, 16, n) for n in (16_384, 1_048_576, 262_144, 4096, 1024))
_GPU_VIT = ((128, 6, 256), (128, 6, 1024))
GPU_RANKS = {"bfloat16": 100, "graphs": 300, "float32": 400, "float16": 500}
_CPU_TOTAL = 65_536


def on_gpu(ranks: Mapping[str, int]) -> Iterator[Wanted]:
    """Attention over N and batch: times, and launches replayed from CUDA graphs at few tokens.

    Args:
        ranks: of the part for each dtype, and of "graphs".
    """
    for dtype in DTYPES:
        crossover = _GPU_CROSSOVER if dtype == "bfloat16" else _GPU_CROSSOVER[:1]
        sizes = (*_GPU_FIRST, *crossover, *_GPU_LONG, *_GPU_VIT)
        for number, (batch, heads, tokens) in enumerate(sizes):
            shape = square(batch, heads, tokens, HEAD_DIM)
            for mode in (FORWARD, BACKWARD):
                energy = dtype == "bfloat16" and number < 2
                yield Wanted(ranks[dtype] + number, mode, dtype, shape, energy=energy)
    for batch in (1, 128):
        for tokens in (64, 256, 1024):
            for mode in PASSES:
                shape = square(batch, HEADS, tokens, HEAD_DIM)
                yield Wanted(ranks["graphs"], mode, "bfloat16", shape, captured=True)


def on_cpu(
    lengths: Sequence[int],
    rank: int,
    backends: tuple[str, ...],
    modes: Sequence[str] = PASSES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> Iterator[Wanted]:
    """Sequences of these lengths that have 65,536 tokens together."""
    for dtype in dtypes:
        for mode in modes:
            for number, tokens in enumerate(lengths):
                shape = square(_CPU_TOTAL // tokens, HEADS, tokens, HEAD_DIM)
                yield Wanted(rank + number, mode, dtype, shape, backends, total_tokens=_CPU_TOTAL)
            rank += len(lengths)
