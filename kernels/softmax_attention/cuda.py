"""Softmax attention in CUDA C++: ``cuda.cu`` (the kernels) and ``cuda.cpp`` (the operators).

Importing this loads the extension, and builds it the first time.
"""

import torch
from torch import Tensor

from linear_vit.kernels import build
from linear_vit.kernels.softmax_attention.operators import attach

build.load("cuda", "softmax_attention")

softmax_attention, softmax_attention_packed = attach("cuda")


def implementation(op: str, q: Tensor, *_: object) -> str:
    """The tiles that the kernels were compiled with for q's head dim and dtype."""
    del op
    return f"cuda: {torch.ops.linear_vit.cuda_softmax_attention_describe(q)}"
