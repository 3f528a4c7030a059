"""What the attention modules share: argument checks, and the depthwise 3x3 of the local branch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]


def head_count(dim: int, heads: int | None) -> int:
    """The number of heads: ``heads``, or dim / 64 (at least 1) where it is None; divides dim."""
    count = max(1, dim // 64) if heads is None else heads
    return _dividing(dim, count, "heads", " (the default for this dim)" if heads is None else "")


def branch_count(dim: int, branches: int) -> int:
    """The number of query branches of HydraAttention; divides dim."""
    return _dividing(dim, branches, "hydra_branches")


def _dividing(dim: int, count: int, name: str, note: str = "") -> int:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if count < 1 or dim % count:
        there_are = ", ".join(str(d) for d in range(1, min(dim, 64) + 1) if dim % d == 0)
        raise ValueError(
            f"{name} must be at least 1 and divide dim, got dim {dim} and {name} {count}{note}; "
            f"these divide it: {there_are}"
        )
    return count


def check_tokens(x: Tensor, grid: Grid, dim: int) -> tuple[int, int]:
    """Raises ValueError unless x is (B, rows * cols, dim); returns (B, N)."""
    rows, cols = grid
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must have shape (B, N, {dim}), got {tuple(x.shape)}")
    if rows < 1 or cols < 1 or x.shape[1] != rows * cols:
        raise ValueError(
            f"grid must be (rows, cols) with rows * cols = N, got grid {(rows, cols)} "
            f"for N = {x.shape[1]} tokens"
        )
    return x.shape[0], x.shape[1]


class LocalBranch(nn.Module):
    """A depthwise 3x3 cross-correlation (zero padding 1, no bias) of tokens on their grid.

    Maps (B, N, C) to (B, N, C); initial weights are normal with a standard deviation of 0.1, as
    those of ripple's lateral filters, to which this branch is the counterpart.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=0.1, generator=generator)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # A transposed view of contiguous tokens *is* a channels-last image: no layout copy.
        image = x.contiguous().transpose(1, 2).unflatten(2, grid)
        image = F.conv2d(image, self.weight, padding=1, groups=image.shape[1])
        return image.flatten(2).transpose(1, 2)
