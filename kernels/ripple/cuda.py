"""Ripple pooling and expansion in CUDA C++: ``cuda.cu`` (kernels), ``cuda.cpp`` (operators).

Importing this loads the extension, and builds it the first time.
"""

from kernels import extension
from kernels.ripple.operators import attach
from kernels.ripple.stages import compose

extension.load("cuda", "ripple")

ripple_pool, ripple_expand = attach("cuda")
ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)
