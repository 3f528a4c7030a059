"""Sana's linear attention in diffusers by our kernels: the same function, with the same weights.

    out = relu(q) (Σₘ relu(kₘ) vₘᵀ) / (relu(q)·Σₘ relu(kₘ) + 1e-15)

Of relu(x) the second half of φ is zero, so this is ``linear_attention`` of relu(q) and relu(k).
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from linear_vit.attention.adapters.core import Change, Wanted, key_mask_of
from linear_vit.kernels import linear_attention

_EPS = 1e-15
_FLOAT16 = torch.finfo(torch.float16)


class LinearProcessor:
    """In the place of ``SanaLinearAttnProcessor2_0``: ``module.set_processor(LinearProcessor())``.

    Args:
        backend: of the kernels; None takes the fastest usable one.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key_mask = key_mask_of(attention_mask, source.shape[0], source.shape[1])
        q, k, v = (
            project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        out = linear_attention(
            q.relu(), k.relu(), v, key_mask=key_mask, eps=_EPS, backend=self.backend
        )
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        for layer in attn.to_out:
            out = layer(out)
        return out.clip(_FLOAT16.min, _FLOAT16.max) if out.dtype == torch.float16 else out


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Sana's self-attention: the modules with its processor, or with ours."""
    for name, module in model.named_modules():
        if isinstance(module, Attention) and isinstance(
            module.processor, SanaLinearAttnProcessor2_0 | LinearProcessor
        ):
            yield name, module


def prefix_tokens(model: nn.Module) -> int:
    """None: the tokens are those of the image."""
    return 0


def change(model: nn.Module, found: dict[str, nn.Module], wanted: Wanted) -> Change:
    """Give these modules our processor; ValueError for another type than ``linear``."""
    if wanted.attention_type != "linear":
        raise ValueError(
            f"Sana's self-attention is linear as it is: it can be run by these kernels (linear), "
            f"and does not become {wanted.attention_type}"
        )
    for module in found.values():
        module.set_processor(LinearProcessor(wanted.backend))  # type: ignore[operator]
    note = "its function is its own, one-sided ReLU and eps 1e-15: outputs stay what they were"
    return Change(("to_q", "to_k", "to_v", "to_out"), notes=(note,))
