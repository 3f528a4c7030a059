"""The vision transformer around the attention modules; everything but attention is shared."""

import zlib
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from linear_vit.attention.baseline import BaselineAttention
from linear_vit.attention.hydra import HydraAttention
from linear_vit.attention.layers import Grid, LocalBranch
from linear_vit.attention.linear import LinearAttention
from linear_vit.attention.ripple import RippleAttention, RippleStage
from linear_vit.kernels.ripple.stages import halving_axes

ATTENTION_TYPES = ("baseline", "linear", "ripple", "hydra")


class PatchEmbedding(nn.Module):
    """Images (B, in_channels, height, width) to tokens (B, N, dim), one linear map per patch."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(in_channels * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, ch, rows, p, cols, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        return self.projection(patches.flatten(3).flatten(1, 2))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, each sample's residual branch is dropped
    with probability ``rate``, and scaled by 1 / (1 - rate) where it is kept. Any (B, ...) shape."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * self.drawn(x, keep).div_(keep)

    def drawn(self, x: Tensor, keep: float) -> Tensor:
        """(B, 1, ...): 1 for each sample that is kept, with this probability, and 0 otherwise."""
        return x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x)) with GELU."""

    def __init__(
        self, dim: int, mlp_dim: int, attention: nn.Module, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.dropout(self.attention(self.attention_norm(x), grid)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class VisionTransformer(nn.Module):
    """A vision transformer with a choice of attention: images (B, channels, H, W) to logits.

    Patch embedding, learned positions (initially sines and cosines of row and column), pre-norm
    blocks, final norm, mean over tokens, linear head. Initial weights depend on the seed and on
    the parameter's name alone, so models of one seed that differ in their attention start from
    the same weights everywhere else.

    Args:
        img_size: height and width in pixels, or one number for both.
        patch_size: side of a square patch; divides img_size.
        num_classes: logits per image.
        dim, depth, mlp_dim: embedding dimension, number of blocks, hidden MLP dimension.
        heads: attention heads, must divide dim; None means dim / 64. Hydra does not use it.
        attention_type: one of ``ATTENTION_TYPES``.
        dropout: rate after the position embedding, after attention and in the MLP.
        drop_path: rate at which the last block's residual branches are dropped, image by image;
            it grows linearly from 0 in the first block.
        in_channels: 3 for colour, 1 for grey images.
        ripple_stages: halvings of the token grid (ripple only).
        hydra_branches: query branches, must divide dim (hydra only).
        local_branch: the depthwise 3x3 that each attention module describes.
        backend: a name from ``kernels.BACKENDS``, or None for the fastest usable one.
        seed: of the initial weights; None means ``torch.initial_seed()``, what the last
            ``torch.manual_seed`` set.

    Raises:
        ValueError: an argument out of range, sizes that don't divide, an unknown attention_type,
            more ripple stages than the token grid can halve.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int | None,
        mlp_dim: int,
        attention_type: str,
        dropout: float = 0.0,
        *,
        drop_path: float = 0.0,
        in_channels: int = 3,
        ripple_stages: int = 3,
        hydra_branches: int = 4,
        local_branch: bool = False,
        backend: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, SupportsIndex) else img_size
        sizes = {
            "patch_size": patch_size,
            "num_classes": num_classes,
            "dim": dim,
            "depth": depth,
            "mlp_dim": mlp_dim,
            "in_channels": in_channels,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if height < 1 or width < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size must divide img_size, got img_size {height}x{width} "
                f"and patch_size {patch_size}"
            )
        for name, rate in {"dropout": dropout, "drop_path": drop_path}.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        self.img_size = (height, width)
        self.in_channels = in_channels
        self.grid: Grid = (height // patch_size, width // patch_size)
        if attention_type == "ripple":
            halving_axes(self.grid, ripple_stages)  # raises now rather than at the first image

        def attention() -> nn.Module:
            shared: dict[str, Any] = {"local_branch": local_branch, "backend": backend}
            if attention_type == "baseline":
                return BaselineAttention(dim, heads=heads, **shared)
            if attention_type == "linear":
                return LinearAttention(dim, heads=heads, **shared)
            if attention_type == "ripple":
                return RippleAttention(dim, heads=heads, ripple_stages=ripple_stages, **shared)
            if attention_type == "hydra":
                return HydraAttention(dim, hydra_branches=hydra_branches, **shared)
            raise ValueError(
                f"attention_type must be one of {', '.join(ATTENTION_TYPES)}, "
                f"got {attention_type!r}"
            )

        self.patch_embedding = PatchEmbedding(patch_size, in_channels, dim)
        self.positions = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, mlp_dim, attention(), dropout, drop_path * layer / max(1, depth - 1))
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.reset_parameters(torch.initial_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draws every initial weight from a stream of its own, keyed by seed and module name."""
        for name, module in self.named_modules():
            generator = _stream(seed, name)
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (LocalBranch, RippleStage)):
                module.reset_parameters(generator)
        with torch.no_grad():
            self.positions.copy_(_sine_positions(self.grid, self.positions.shape[2]))

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless images are (B, in_channels, height, width)."""
        expected = (self.in_channels, *self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}"
            )

    def forward(self, images: Tensor) -> Tensor:
        self.check_images(images)
        x = self.dropout(self.patch_embedding(images) + self.positions)
        for block in self.blocks:
            x = block(x, self.grid)
        return self.head(self.norm(x).mean(dim=1))


def _sine_positions(grid: Grid, dim: int) -> Tensor:
    """Sines and cosines of row and column at dim / 4 frequencies from 1 to 1/100: (1, N, dim).

    Initial values that tell neighbours from strangers: learned from small random values, positions
    take a small model on single-pixel patches more epochs to find than all the rest.
    """
    count = -(-dim // 4)
    frequencies = 100.0 ** -(torch.arange(count) / count)
    rows = torch.arange(grid[0]).view(-1, 1, 1).expand(-1, grid[1], 1) * frequencies
    cols = torch.arange(grid[1]).view(1, -1, 1).expand(grid[0], -1, 1) * frequencies
    waves = torch.cat([rows.sin(), rows.cos(), cols.sin(), cols.cos()], dim=2)
    return waves.flatten(0, 1)[:, :dim].unsqueeze(0)


def _stream(seed: int, name: str) -> torch.Generator:
    # crc32, unlike hash(), is the same in every process.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
