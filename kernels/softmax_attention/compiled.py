"""``torch.compile`` of the ``torch`` backend's function."""

from torch import Tensor

from kernels.compilation import compiled
from kernels.softmax_attention import torch as composition


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return compiled(composition.softmax_attention, q, k, v)(q, k, v, scale)
