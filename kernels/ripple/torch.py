"""Ripple pooling and expansion as a good PyTorch user writes them: depthwise ``conv2d``.

The grid is channels last, so the permuted view is PyTorch's channels_last memory format and
nothing is copied.
"""

import torch.nn.functional as F
from torch import Tensor

from linear_vit.kernels.layout import gradients_in_order, in_order_of
from linear_vit.kernels.precision import guarded
from linear_vit.kernels.ripple.stages import compose


def ripple_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    grid, weight = gradients_in_order(x, weight)
    return in_order_of(x, _depthwise(grid, weight, (2, 1) if axis == 0 else (1, 2)))


def ripple_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    coarse, grid, weight, lateral_weight = gradients_in_order(z, x, weight, lateral_weight)
    pair = weight.view(2, 1, -1) if axis == 0 else weight
    spread = (coarse.unsqueeze(axis + 2) * pair).flatten(axis + 1, axis + 2)
    spread = spread.narrow(axis + 1, 0, x.shape[axis + 1])
    return in_order_of(x, spread + _depthwise(grid, lateral_weight, (1, 1)))


ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)


def _depthwise(x: Tensor, weight: Tensor, strides: tuple[int, int]) -> Tensor:
    channels = x.shape[-1]
    if x.numel() == 0:  # conv2d refuses a side of 0
        return x[:, :: strides[0], :: strides[1]] * weight[:, 1, 1]
    grid, windows = x.permute(0, 3, 1, 2), weight.unsqueeze(1)
    out = guarded(F.conv2d, grid, windows, None, strides, (1, 1), (1, 1), channels)
    return out.permute(0, 2, 3, 1)
