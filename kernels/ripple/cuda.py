"""Ripple pooling and expansion in CUDA C++: ``cuda.cu`` (kernels), ``cuda.cpp`` (operators).

Importing this loads the extension, and builds it the first time.
"""

import functools

import torch

from linear_vit.kernels import build
from linear_vit.kernels.ripple.operators import attach, attach_stages
from linear_vit.kernels.ripple.stages import compose, fused_where_it_fits

build.load("cuda", "ripple")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


ripple_pool, ripple_expand = attach("cuda")
ripple_pool_stages, ripple_expand_stages = fused_where_it_fits(
    attach_stages("cuda"), compose(ripple_pool, ripple_expand), _multiprocessors
)
