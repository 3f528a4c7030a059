"""Linear attention in C++ for the CPU: ``cpu_simd.cpp`` and ``cpu_amx.cpp`` (kernels), ``cpu.cpp``.

Importing this loads the extension, and builds it the first time. The environment variable
``LINEAR_VIT_CPU`` (amx, avx512, avx2, portable) takes another instruction set than the widest;
AMX is for bfloat16.
"""

from typing import Any

import torch

from linear_vit.kernels import build
from linear_vit.kernels.linear_attention.operators import attach
from linear_vit.screen import counted

build.load("cpu", "linear_attention")

(
    linear_attention,
    linear_attention_packed,
    linear_attention_state,
    linear_attention_apply,
) = attach("cpu", recompute_tokens=0)


def implementation(op: str, *arguments: Any) -> str:
    """The instruction set and the threads that a call would use now."""
    of = (arguments[0].dtype == torch.bfloat16, arguments[0].shape[-1]) if arguments else (True, 64)
    instruction_set = torch.ops.linear_vit.cpu_linear_attention_instruction_set(*of)
    said = f"{op} in C++ for {instruction_set}, {counted(torch.get_num_threads(), 'thread')}"
    return "; ".join([said, *build.left_out("cpu", "linear_attention")])
