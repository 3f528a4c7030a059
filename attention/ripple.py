"""RippleAttention: linear attention at the top of a token pyramid."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from linear_vit.attention.layers import Grid, LocalBranch, check_tokens, head_count
from linear_vit.kernels import linear_attention_packed, ripple_expand_stages, ripple_pool_stages
from linear_vit.kernels.ripple.stages import halving_axes


class RippleStage(nn.Module):
    """The weights of one stage: a pooling filter down; two scales and a lateral filter up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pool_weight = nn.Parameter(torch.empty(dim, 3, 3))
        self.expand_weight = nn.Parameter(torch.empty(2, dim))
        self.lateral_weight = nn.Parameter(torch.empty(dim, 3, 3))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.pool_weight, mean=1 / 9, std=0.05, generator=generator)
        nn.init.ones_(self.expand_weight)
        nn.init.normal_(self.lateral_weight, std=0.1, generator=generator)


def through_pyramid(
    level: Tensor,
    stages: Iterable[nn.Module],
    attend: Callable[[Tensor], Tensor],
    *,
    backend: str | None,
) -> Tensor:
    """Pool a token grid (B, rows, cols, C), attend on the coarsest, and expand back.

    Args:
        level: the finest grid.
        stages: :class:`RippleStage`, from the finest on.
        attend: maps the coarsest grid to one of its shape.
        backend: of the kernels.

    Raises:
        ValueError: there are more stages than the grid can be halved.
    """
    of = [stage for stage in stages if isinstance(stage, RippleStage)]
    axes = halving_axes((level.shape[1], level.shape[2]), len(of))
    # The kernels read channels last; tokens of a convolution's image are not.
    level = level if level.stride(3) == 1 else level.contiguous()
    pooled = ripple_pool_stages(
        level, [stage.pool_weight for stage in of], axes=axes, backend=backend
    )
    *finer, coarsest = level, *pooled
    return ripple_expand_stages(
        attend(coarsest),
        finer,
        [stage.expand_weight for stage in of],
        [stage.lateral_weight for stage in of],
        axes=axes,
        backend=backend,
    )


class RippleAttention(nn.Module):
    """Pool the token grid, attend among the few tokens left, expand back; over (B, N, C).

    1. Ripple pooling: each stage halves rows, then columns, then rows ... (a depthwise 3x3 of
       stride 2; an axis of size 1 is passed over).
    2. Linear attention on the compressed grid: qkv projection, heads, output projection.
    3. Ripple expansion, back up the pyramid: each level adds a depthwise 3x3 of its own input.

    Args:
        dim: C, the embedding dimension.
        heads: must divide dim; None means dim / 64, at least 1.
        ripple_stages: how often the grid is halved; 0 gives plain linear attention.
        local_branch: adds a depthwise 3x3 of the attention's input x, that is of the compressed
            grid, to the attention's result before the output projection. (On the fine grid the
            last expansion adds a depthwise 3x3 of x already.)
        backend: a name from ``kernels.BACKENDS``, or None for the fastest usable one.

    Raises:
        ValueError: heads do not divide dim; at call, x is not (B, rows * cols, dim), or the grid
            cannot be halved ``ripple_stages`` times (the message names the largest count).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        ripple_stages: int = 3,
        local_branch: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if ripple_stages < 0:
            raise ValueError(f"ripple_stages must be at least 0, got {ripple_stages}")
        self.dim = dim
        self.heads = head_count(dim, heads)
        self.backend = backend
        self.stages = nn.ModuleList(RippleStage(dim) for _ in range(ripple_stages))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local = LocalBranch(dim) if local_branch else None
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        check_tokens(x, grid, self.dim)
        return self.pyramid(x.unflatten(1, grid)).flatten(1, 2)

    def pyramid(self, level: Tensor) -> Tensor:
        """The three steps on a token grid (B, rows, cols, C)."""
        return through_pyramid(level, self.stages, self.at_the_top, backend=self.backend)

    def at_the_top(self, level: Tensor) -> Tensor:
        """Multi-head linear attention on the compressed grid (B, rows, cols, C)."""
        _, rows, cols, _ = level.shape
        x = level.flatten(1, 2)
        out = self.attend(self.qkv(x).unflatten(2, (3, self.heads, -1))).flatten(2)
        if self.local is not None:
            out = out + self.local(x, (rows, cols))
        return self.projection(out).unflatten(1, (rows, cols))

    def attend(self, qkv: Tensor) -> Tensor:
        """Of q, k and v packed (B, N, 3, heads, C/heads): (B, N, heads, C/heads)."""
        return linear_attention_packed(qkv, backend=self.backend)
