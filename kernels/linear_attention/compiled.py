"""``torch.compile`` of the ``torch`` backend's functions."""

from torch import Tensor

from linear_vit.kernels.compilation import compiled, masks
from linear_vit.kernels.linear_attention import torch as composition

BATCH, BATCH_AND_TOKENS, BATCH_AND_PACKED_TOKENS = (0,), (0, 2), (0, 1)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    inputs = [(x, BATCH_AND_TOKENS) for x in (q, k, v)] + masks(key_mask)
    return compiled(composition.linear_attention, *inputs)(q, k, v, eps, key_mask)


def linear_attention_packed(qkv: Tensor, eps: float, key_mask: Tensor | None = None) -> Tensor:
    inputs = [(qkv, BATCH_AND_PACKED_TOKENS), *masks(key_mask)]
    return compiled(composition.linear_attention_packed, *inputs)(qkv, eps, key_mask)


def linear_attention_state(
    k: Tensor, v: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    inputs = [(x, BATCH_AND_TOKENS) for x in (k, v)] + masks(key_mask)
    return compiled(composition.linear_attention_state, *inputs)(k, v, key_mask)


def linear_attention_apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    inputs = [(q, BATCH_AND_TOKENS), (state, BATCH), (normaliser, BATCH)]
    return compiled(composition.linear_attention_apply, *inputs)(q, state, normaliser, eps)
