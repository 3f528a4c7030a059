"""Ripple pooling and expansion in C++ for the CPU: ``cpu_simd.cpp`` (kernels), ``cpu.cpp``.

Importing this loads the extension, and builds it the first time. The environment variable
``LINEAR_VIT_CPU`` (amx, avx512, avx2, portable) takes another instruction set than the widest; for
``amx`` that is AVX-512.
"""

from typing import Any

import torch

from linear_vit.kernels import build
from linear_vit.kernels.ripple.operators import attach
from linear_vit.kernels.ripple.stages import compose
from linear_vit.screen import counted

build.load("cpu", "ripple")

ripple_pool, ripple_expand = attach("cpu")
ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)


def implementation(op: str, *arguments: Any) -> str:
    """The instruction set and the threads that a call would use now."""
    instruction_set = torch.ops.linear_vit.cpu_ripple_instruction_set()
    return f"{op} in C++ for {instruction_set}, {counted(torch.get_num_threads(), 'thread')}"
