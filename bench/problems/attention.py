"""What attention operations share: a shape, and the rows compared where there are too many."""

import re
from dataclasses import dataclass

import torch

from linear_vit.bench.problems.case import EXTENTS, Shape

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


def lengths(device_type: str, extent: str) -> tuple[int, ...]:
    """Powers of two from 64 on."""
    assert extent in EXTENTS
    longest = _LONGEST.get((device_type, extent), _LONGEST_ELSE)
    return tuple(2**i for i in range(6, longest.bit_length()))


def size_name(shape: AttentionShape) -> str:
    """B128-H16-N64-D32, of which what is as usual is left out."""
    parts = [f"B{shape.B}"] if shape.B > 1 else []
    if shape.H != HEADS:
        parts.append(f"H{shape.H}")
    if shape.Hk != shape.H:
        parts.append(f"K{shape.Hk}")
    parts.append(f"N{shape.N}")
    if shape.M != shape.N:
        parts.append(f"M{shape.M}")
    if shape.D != HEAD_DIM:
        parts.append(f"D{shape.D}")
    return "-".join(parts)


def parse_size(text: str) -> AttentionShape | None:
    """The shape of this :func:`size_name`; None where it is none."""
    number = r"(\d+)"
    match = re.fullmatch(
        rf"(?:B{number}-)?(?:H{number}-)?(?:K{number}-)?N{number}(?:-M{number})?(?:-D{number})?",
        text,
    )
    if match is None:
        return None
    B, H, Hk, N, M, D = (int(found) if found else 0 for found in match.groups())
    H = H or HEADS
    return AttentionShape(B or 1, H, Hk or H, N, M or N, D or HEAD_DIM)


def in_float32(shape: AttentionShape) -> int:
    """Bytes of q, k and v in float32, heads repeated: what composed operators make first."""
    return 4 * shape.B * shape.D * (shape.H * shape.N + 2 * shape.H * shape.M)


def sample(tokens: int, device: torch.device) -> torch.Tensor:
    """Rows spread over the sequence, the first and the last among them: tiles end there."""
    count = min(tokens, SAMPLED_ROWS)
    spread = torch.linspace(0, tokens - 1, count, dtype=torch.float64)
    return spread.round().long().to(device)
