"""Ripple pooling and expansion by their definition: nine shifted products, summed.

Any floating dtype; sums are float32, or float64 for float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_vit.kernels.layout import gradients_in_order, in_order_of
from linear_vit.kernels.ripple.stages import compose


def ripple_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    grid, weight = gradients_in_order(x, weight)
    strides = (2, 1) if axis == 0 else (1, 2)
    out = _depthwise(_accumulate(grid), _accumulate(weight), strides)
    return in_order_of(x, out.to(x.dtype))


def ripple_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    coarse, grid, weight, lateral_weight = (
        _accumulate(t) for t in gradients_in_order(z, x, weight, lateral_weight)
    )
    token = torch.arange(x.shape[axis + 1], device=x.device)
    pair_weight = weight[token % 2]  # (n, C), one row per fine token along the axis
    pair_weight = pair_weight[:, None, :] if axis == 0 else pair_weight
    spread = pair_weight * coarse.index_select(axis + 1, token // 2)
    out = spread + _depthwise(grid, lateral_weight, (1, 1))
    return in_order_of(x, out.to(x.dtype))


ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)


def _depthwise(x: Tensor, weight: Tensor, strides: tuple[int, int]) -> Tensor:
    """out[i, j] = Σ weight[:, r, c] · x[i·sr + r - 1, j·sc + c - 1], zero outside the grid."""
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    rows, cols = x.shape[1], x.shape[2]
    taps = [
        weight[:, r, c] * padded[:, r : r + rows : strides[0], c : c + cols : strides[1]]
        for r in range(3)
        for c in range(3)
    ]
    return torch.stack(taps).sum(dim=0)


def _accumulate(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
