"""Multi-head softmax attention: what the others are measured against."""

from torch import Tensor, nn

from linear_vit.attention.layers import Grid, LocalBranch, check_tokens, head_count
from linear_vit.kernels import softmax_attention_packed


class BaselineAttention(nn.Module):
    """Multi-head softmax attention over tokens (B, N, C).

    One packed projection C -> 3C gives q, k and v, which are read in place; one projection C -> C
    follows. The grid is used by the local branch alone.

    Args:
        dim: C, the embedding dimension.
        heads: must divide dim; None means dim / 64, at least 1.
        local_branch: adds a depthwise 3x3 of v, on the token grid, before the output projection.
        backend: a name from ``kernels.BACKENDS``, or None for the fastest usable one.

    Raises:
        ValueError: heads do not divide dim; at call, x is not (B, rows * cols, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        local_branch: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.heads = head_count(dim, heads)
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local = LocalBranch(dim) if local_branch else None
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_tokens(x, grid, self.dim)
        packed = self.qkv(x)
        out = self.attend(packed.unflatten(2, (3, self.heads, -1))).flatten(2)
        if self.local is not None:
            out = out + self.local(packed[..., 2 * self.dim :], grid)
        return self.projection(out)

    def attend(self, qkv: Tensor) -> Tensor:
        """Of q, k and v packed (B, N, 3, heads, C/heads): (B, N, heads, C/heads)."""
        return softmax_attention_packed(qkv, backend=self.backend)
