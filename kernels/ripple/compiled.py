"""``torch.compile`` of the ``torch`` backend's functions."""

from torch import Tensor

from kernels.compilation import compiled
from kernels.ripple import torch as composition


def ripple_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return compiled(composition.ripple_pool, x, weight)(x, weight, axis)


def ripple_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    function = compiled(composition.ripple_expand, x, z, weight, lateral_weight)
    return function(z, x, weight, lateral_weight, axis)
