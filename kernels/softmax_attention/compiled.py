"""``torch.compile`` of the ``torch`` backend's function."""

from torch import Tensor

from linear_vit.kernels.compilation import compiled
from linear_vit.kernels.softmax_attention import torch as composition

BATCH_AND_TOKENS, BATCH_AND_PACKED_TOKENS = (0, 2), (0, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    inputs = [(x, BATCH_AND_TOKENS) for x in (q, k, v)]
    return compiled(composition.softmax_attention, *inputs)(q, k, v, scale)


def softmax_attention_packed(qkv: Tensor, scale: float) -> Tensor:
    inputs = (qkv, BATCH_AND_PACKED_TOKENS)
    return compiled(composition.softmax_attention_packed, inputs)(qkv, scale)
