"""``torch.compile`` of the ``torch`` backend's functions."""

from torch import Tensor

from kernels.compilation import compiled
from kernels.linear_attention import torch as composition


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return compiled(composition.linear_attention, q, k, v)(q, k, v, eps)


def linear_attention_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return compiled(composition.linear_attention_state, k, v)(k, v)


def linear_attention_apply(q: Tensor, state: Tensor, normaliser: Tensor, eps: float) -> Tensor:
    function = compiled(composition.linear_attention_apply, q, state, normaliser)
    return function(q, state, normaliser, eps)
