"""What the adapters share: the attention between a module's own projections, and what it refuses.

A module keeps its projections, norms and dropout of the output. :class:`Core` stands where its
softmax attention was, and :class:`Pyramid` around the whole module where it becomes ripple.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit.attention.layers import Grid
from linear_vit.attention.ripple import RippleStage, through_pyramid
from linear_vit.kernels import linear_attention, softmax_attention


@dataclass(frozen=True)
class Wanted:
    """What a model's attention is to become.

    Attributes:
        attention_type: one of ``attention.ATTENTION_TYPES``.
        backend: of the kernels; None takes the fastest usable one.
        ripple_stages: halvings of the token grid (ripple only).
        hydra_branches: of our own models; None, and other libraries' modules: as many as heads.
        grid: (rows, cols) of the patch tokens (ripple only); None takes a square one.
        prefix_tokens: class and register tokens before the patch tokens (ripple only).
    """

    attention_type: str
    backend: str | None = None
    ripple_stages: int = 3
    hydra_branches: int | None = None
    grid: Grid | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Change:
    """What became of a module's weights: names of those kept, and where the others come from."""

    kept: tuple[str, ...] = ()
    new: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class Core(nn.Module):
    """Attention of queries, keys and values that another library's module has projected.

    ``forward(q, k, v, key_mask, scale)``: q (B, H, N, D), k and v (B, Hk, M, D) to (B, H, N, D).
    Softmax for ``baseline``, else linear attention, to which a scale of q makes no difference.
    """

    def __init__(self, attention_type: str, backend: str | None = None) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.backend = backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {"key_mask": key_mask, "backend": self.backend}
        if self.attention_type == "baseline":
            return softmax_attention(q, k, v, scale=scale, **given)
        return linear_attention(q, k, v, **given)

    def extra_repr(self) -> str:
        return f"{self.attention_type}, backend={self.backend}"


class Pyramid(nn.Module):
    """Ripple around an attention module: it attends on a compressed grid of the patch tokens.

    Class and register tokens go round the pyramid: they are tokens of the attention at its top.
    """

    def __init__(self, dim: int, wanted: Wanted) -> None:
        super().__init__()
        self.stages = nn.ModuleList(RippleStage(dim) for _ in range(wanted.ripple_stages))
        self.grid, self.prefix_tokens = wanted.grid, wanted.prefix_tokens
        self.backend = wanted.backend

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Of tokens (B, N, C), the same; ``attend`` maps fewer of them, (B, n, C), to (B, n, C)."""
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        passed: list[Tensor] = []

        def at_the_top(level: Tensor) -> Tensor:
            out = attend(torch.cat([prefix, level.flatten(1, 2)], dim=1))
            passed.append(out[:, : self.prefix_tokens])
            return out[:, self.prefix_tokens :].unflatten(1, level.shape[1:3])

        level = patches.unflatten(1, self._grid_of(patches.shape[1]))
        level = through_pyramid(level, self.stages, at_the_top, backend=self.backend)
        return torch.cat([*passed, level.flatten(1, 2)], dim=1)

    def _grid_of(self, tokens: int) -> Grid:
        side = math.isqrt(tokens)
        rows, cols = self.grid or (side, side)
        if rows * cols != tokens:
            raise ValueError(
                f"ripple needs the grid of the patch tokens, and there are {tokens} beside "
                f"{self.prefix_tokens} class and register tokens, not {rows} x {cols}: "
                "give grid=(rows, cols), or prefix_tokens"
            )
        return rows, cols

    def extra_repr(self) -> str:
        return f"grid={self.grid or 'square'}, prefix_tokens={self.prefix_tokens}"


# What nothing passes in silence.


def refuse(*, is_causal: bool | None, dropout: float, training: bool) -> None:
    """Raises ValueError for what no attention here can do.

    Args:
        is_causal: whether a query is to see only keys before it.
        dropout: the rate for attention weights, of which there are none here.
        training: whether that dropout would be done now.
    """
    if is_causal:
        raise ValueError("is_causal: this attention lets every query see every key")
    if training and dropout > 0:
        raise ValueError(
            f"dropout of attention weights (rate {dropout:g}) can't be done: there are none to "
            "drop; set the rate to 0, or call eval()"
        )


def key_mask_of(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """A mask as SDPA takes it, as a mask of keys (B, M), True for those that are seen.

    Args:
        mask: None, or what broadcasts to (B, H, N, M): bool, or added to the logits.
        batch, keys: B and M.

    Raises:
        ValueError: it is no key mask: queries or heads differ in it, or it adds finite numbers.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        seen = mask == 0
        if not bool((seen | (mask <= lowest)).all()):
            raise ValueError("a mask that adds to attention logits is no key mask: it is a bias")
        mask = seen
    while mask.dim() < 4:
        mask = mask[None]
    first = mask[:, :1, :1]
    if not bool((mask == first).all()):
        raise ValueError(
            "the mask is no key mask: some queries or heads see keys that others don't, "
            "and linear attention sums the keys once for all of them"
        )
    return first[:, 0, 0].expand(batch, keys)


# Weights of hydra made of a packed projection.


def shared_key_value(qkv: nn.Linear, branches: int) -> nn.Linear:
    """Of a projection C -> q, k, v of one width, that to q and one key and value head for all.

    Queries keep their weights; keys and values get the mean over heads, as grouped queries are
    made of a trained model (Ainslie et al. 2023).
    """
    width = qkv.out_features // 3
    made = nn.Linear(
        qkv.in_features,
        width + 2 * (width // branches),
        bias=qkv.bias is not None,
        device=qkv.weight.device,
        dtype=qkv.weight.dtype,
    )
    with torch.no_grad():
        for new, old in ((made.weight, qkv.weight), (made.bias, qkv.bias)):
            if new is not None:
                q, k, v = old.chunk(3)
                means = (x.unflatten(0, (branches, -1)).mean(0) for x in (k, v))
                new.copy_(torch.cat([q, *means]))
    return made.train(qkv.training).requires_grad_(qkv.weight.requires_grad)


def new_gate(like: nn.Linear, branches: int) -> nn.Linear:
    """Hydra's gate C -> R, under which all branches count alike at first."""
    made = nn.Linear(like.in_features, branches, device=like.weight.device, dtype=like.weight.dtype)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made
