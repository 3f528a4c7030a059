"""``torch.compile`` of the ``torch`` backend's functions."""

import torch
from torch import Tensor

from linear_vit.kernels.compilation import compiled
from linear_vit.kernels.ripple import torch as composition
from linear_vit.kernels.ripple.stages import compose

GRID = (0, 1, 2)  # batch, rows, columns
# Inductor of PyTorch 2.11 stops at a channels-last convolution of symbolic size ("cannot determine
# truth value of Relational"); 2.15 compiles it.
SYMBOLIC = torch.torch_version.TorchVersion(torch.__version__) >= "2.15"


def ripple_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    inputs = [(x, GRID), (weight, ())]
    return compiled(composition.ripple_pool, *inputs, symbolic=SYMBOLIC)(x, weight, axis)


def ripple_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    inputs = [(x, GRID), (z, GRID), (weight, ()), (lateral_weight, ())]
    function = compiled(composition.ripple_expand, *inputs, symbolic=SYMBOLIC)
    return function(z, x, weight, lateral_weight, axis)


ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)
