"""``torch.compile`` of the ``torch`` backend's functions."""

from torch import Tensor

from linear_vit.kernels.compilation import compiled
from linear_vit.kernels.linear_attention import torch as composition

BATCH, BATCH_AND_TOKENS, BATCH_AND_PACKED_TOKENS = (0,), (0, 2), (0, 1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    inputs = [(x, BATCH_AND_TOKENS) for x in (q, k, v)]
    return compiled(composition.linear_attention, *inputs)(q, k, v, eps)


def linear_attention_packed(qkv: Tensor, eps: float) -> Tensor:
    return compiled(composition.linear_attention_packed, (qkv, BATCH_AND_PACKED_TOKENS))(qkv, eps)


def linear_attention_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    inputs = [(x, BATCH_AND_TOKENS) for x in (k, v)]
    return compiled(composition.linear_attention_state, *inputs)(k, v)


def linear_attention_apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    inputs = [(q, BATCH_AND_TOKENS), (state, BATCH), (normaliser, BATCH)]
    return compiled(composition.linear_attention_apply, *inputs)(q, state, normaliser, eps)
