"""``torch.compile`` of the ``torch`` backend's function."""

from torch import Tensor

from linear_vit.kernels.compilation import compiled, masks
from linear_vit.kernels.softmax_attention import torch as composition

BATCH_AND_TOKENS, BATCH_AND_PACKED_TOKENS = (0, 2), (0, 1)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    inputs = [(x, BATCH_AND_TOKENS) for x in (q, k, v)] + masks(key_mask)
    return compiled(composition.softmax_attention, *inputs)(q, k, v, scale, key_mask)


def softmax_attention_packed(qkv: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    inputs = [(qkv, BATCH_AND_PACKED_TOKENS), *masks(key_mask)]
    return compiled(composition.softmax_attention_packed, *inputs)(qkv, scale, key_mask)
