"""timm's attention with another core: by ``attention.replace``, or as ``attn_layer=``.

A changed module is still timm's, with its names: a checkpoint of the original loads into it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from linear_vit.attention.adapters.core import (
    Change,
    Core,
    Pyramid,
    Wanted,
    key_mask_of,
    new_gate,
    refuse,
    shared_key_value,
)
from linear_vit.attention.hydra import fused

_PROJECTIONS = ("qkv", "q_norm", "k_norm", "norm", "proj")


class SwappedAttention(Attention):
    """timm's ``Attention`` with its arguments, whose softmax is replaced as ``wanted`` says."""

    wanted: ClassVar[Wanted] = Wanted("linear")
    core: Core
    pyramid: Pyramid | None
    gate: nn.Linear | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.become(self.wanted)
        self.__class__ = SwappedAttention  # that of attention_layer can't be pickled

    def become(self, wanted: Wanted) -> Change:
        """Change this module, which keeps what weights it can."""
        if getattr(self, "gate", None) is not None:
            raise ValueError("hydra gave the heads' own keys and values away: build the model anew")
        kind, like = wanted.attention_type, self.qkv
        self.core, self.pyramid, self.gate = Core(kind, wanted.backend), None, None
        kept, new = [n for n in _PROJECTIONS if _has_weights(getattr(self, n, None))], {}
        if kind == "hydra":
            if wanted.hydra_branches not in (None, self.num_heads):
                raise ValueError(f"hydra_branches: timm's module has {self.num_heads} heads")
            self.qkv = shared_key_value(like, self.num_heads)
            self.gate = new_gate(like, self.num_heads)
            kept[0] = "qkv (its queries)"
            new = {"qkv (its keys and values)": "the mean of the heads"}
            new |= {"gate": "all branches count alike"}
        if kind == "ripple":
            self.pyramid = Pyramid(like.in_features, wanted).to(like.weight)
            new = {"pyramid": "as in a new model"}
        return Change(tuple(kept), tuple(new.items()))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        refuse(is_causal=is_causal, dropout=self.attn_drop.p, training=self.training)
        mask = key_mask_of(attn_mask, x.shape[0], x.shape[1])
        if self.pyramid is None:
            return self._attend(x, mask)
        if mask is not None:
            raise ValueError("attn_mask: ripple pools a whole grid, of which nothing is masked")
        return self.pyramid(x, self._attend)

    def _attend(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        shared = (heads.shape[1] - self.num_heads) // 2
        q, k, v = heads.split([self.num_heads, shared, shared], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        out = self.core(q, k, v, key_mask, self.scale).transpose(1, 2)
        if self.gate is not None:
            out = fused(out, self.gate(x))
        out = out.flatten(2)
        out = self.norm(out) if hasattr(self, "norm") else out  # timm before 1.0.16 has none
        return self.proj_drop(self.proj(out))


def attention_layer(
    attention_type: str, *, backend: str | None = None, **options: Any
) -> type[SwappedAttention]:
    """A class for ``timm.create_model(name, attn_layer=attention_layer("linear"))``.

    Args:
        attention_type: one of ``attention.ATTENTION_TYPES``.
        backend: of the kernels; None takes the fastest usable one.
        options: ``ripple_stages``, ``grid``, and ``prefix_tokens``, for which ``attention.replace``
            asks the model.
    """
    wanted = Wanted(attention_type, backend, **options)
    return type("SwappedAttention", (SwappedAttention,), {"wanted": wanted})


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules that can be changed: timm's own, not classes derived from it."""
    for name, module in model.named_modules():
        if type(module) in (Attention, SwappedAttention):
            yield name, module


def prefix_tokens(model: nn.Module) -> int:
    """Class and register tokens, as timm's models say."""
    said = [getattr(module, "num_prefix_tokens", None) for module in model.modules()]
    return next((int(count) for count in said if count is not None), 0)


def change(model: nn.Module, found: dict[str, nn.Module], wanted: Wanted) -> Change:
    """Change these modules in place: they stay the same objects, hooks and all."""
    done = Change()
    for module in found.values():
        module.__class__ = SwappedAttention
        assert isinstance(module, SwappedAttention)
        done = module.become(wanted)
    return done


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())
