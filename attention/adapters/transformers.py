"""Attention of transformers' models by our kernels, as one of its attention implementations.

Importing this registers ``linear_vit_linear`` and ``linear_vit_baseline``, with the masks that
belong to them: an implementation without its mask function is never told of a text's padding.

    model = AutoModel.from_config(config, attn_implementation="linear_vit_linear")
    model.set_attn_implementation("linear_vit_linear")

``attention.replace`` does the same, names a backend, and offers ripple around it.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from linear_vit.attention.adapters.core import Change, Core, Pyramid, Wanted, key_mask_of, refuse

_NAMES = {kind: f"linear_vit_{kind}" for kind in ("baseline", "linear")}
# What some models pass to their attention, and no attention here can do.
_OTHER = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")
_PREFIXES = ("cls_token", "class_embedding", "register_tokens", "distillation_token")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    attention_type: str,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: (B, H, N, D) of each to (B, N, H, D), and no weights."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    refuse(is_causal=causal, dropout=dropout, training=module.training)
    if given := [name for name in _OTHER if others.get(name) is not None]:
        raise ValueError(f"{', '.join(given)}: this attention has none")
    if attention_mask is not None and attention_mask.dim() != 2:
        attention_mask = key_mask_of(attention_mask, key.shape[0], key.shape[2])
    core = getattr(module, "linear_vit_core", None) or Core(attention_type)
    return core(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def key_mask(
    *args: Any,
    mask_function: Any = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    kv_length: int | None = None,
    **others: Any,
) -> Tensor | None:
    """The padding of a batch as a mask of keys (B, M); None where there is none.

    Raises:
        ValueError: a causal model, or another pattern in which queries see different keys.
    """
    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            "this model's mask is no key mask: its queries see different keys (as in causal "
            "attention), and linear attention sums the keys once for all of them"
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:] if kv_length else attention_mask
    return None if bool(mask.all()) else mask.to(torch.bool)


for _kind, _name in _NAMES.items():
    AttentionInterface.register(_name, functools.partial(attend, attention_type=_kind))
    AttentionMaskInterface.register(_name, key_mask)


class PooledAttention(nn.Module):
    """Ripple: a pyramid around an attention module, whose arguments and results stay."""

    def __init__(self, attention: nn.Module, pyramid: Pyramid) -> None:
        super().__init__()
        self.attention, self.pyramid = attention, pyramid

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if any(isinstance(x, Tensor) for x in (*arguments, *named.values())):
            raise ValueError("ripple pools a whole grid: it takes no mask, and no positions")
        rest: list[Any] = []

        def tokens_alone(tokens: Tensor) -> Tensor:
            out = self.attention(tokens, *arguments, **named)
            rest[:] = out[1:] if isinstance(out, tuple) else ()
            return out[0] if isinstance(out, tuple) else out

        out = self.pyramid(hidden_states, tokens_alone)
        return (out, *rest) if rest else out


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of pretrained models that call an attention implementation."""
    for name, module in model.named_modules():
        if _attends(module) and any(_within(model, name, PreTrainedModel)):
            yield name, module


def prefix_tokens(model: nn.Module) -> int:
    """Class, register and distillation tokens, as the embeddings have them."""
    for module in model.modules():
        found = [getattr(module, name, None) for name in _PREFIXES]
        there = [x for x in found if isinstance(x, Tensor)]
        if there:
            return sum(x.shape[1] if x.dim() == 3 else 1 for x in there)
    return 0


def change(model: nn.Module, found: dict[str, nn.Module], wanted: Wanted) -> Change:
    """Set the implementation of these modules' models, and put a pyramid around each for ripple."""
    kind = wanted.attention_type
    if kind == "hydra":
        raise ValueError(
            "hydra is not offered for transformers' models: they take as many keys as query heads"
        )
    causal = [name for name, module in found.items() if module.is_causal]
    if causal:
        raise ValueError(f"{causal[0]} is causal: this attention lets every query see every key")
    for name, module in list(model.named_modules()):
        if isinstance(module, PooledAttention):
            _put(model, name, module.attention)
    core = "baseline" if kind == "baseline" else "linear"
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(_NAMES[core])
    # Not a module of theirs: their names, and so their checkpoints, stay what they are.
    for module in found.values():
        object.__setattr__(module, "linear_vit_core", Core(core, wanted.backend))
    if kind != "ripple":
        return Change(_projections(found))
    for name, module in list(modules(model)):
        _pool(model, name, module, wanted)
    return Change(_projections(found), (("pyramid", "as in a new model"),))


def _pool(model: nn.Module, name: str, module: Any, wanted: Wanted) -> None:
    if not hasattr(module.config, "image_size"):
        raise ValueError(f"{name} reads no image, and ripple pools a grid: swap the vision model")
    weight = next(module.parameters())
    pyramid = Pyramid(module.config.hidden_size, wanted).to(weight)
    _put(model, name, PooledAttention(module, pyramid))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _attends(module: nn.Module) -> bool:
    says = isinstance(getattr(module, "is_causal", None), bool) and hasattr(module, "config")
    return says and any(isinstance(child, nn.Linear) for child in module.children())


def _within(model: nn.Module, name: str, kind: type) -> Iterator[bool]:
    """Of a module's parents, the model among them: whether each is of a kind."""
    yield isinstance(model, kind)
    while name := name.rpartition(".")[0]:
        yield isinstance(model.get_submodule(name), kind)


def _projections(found: dict[str, nn.Module]) -> tuple[str, ...]:
    first = next(iter(found.values()))
    return tuple(n for n, child in first.named_children() if isinstance(child, nn.Linear))
