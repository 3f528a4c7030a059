"""Linear attention in CUDA C++: ``cuda.cu`` (the kernels) and ``cuda.cpp`` (the operators).

Importing this loads the extension, and builds it the first time.
"""

import torch
from torch import Tensor

from linear_vit.kernels import build
from linear_vit.kernels.linear_attention.operators import attach

# In half precision at D = 64 the state of one head is as large as so many tokens' k and v: up to
# there it is worked out again, in the backward's one launch, from keys and values it holds anyway.
RECOMPUTE_TOKENS = 256

build.load("cuda", "linear_attention")

linear_attention, linear_attention_packed, linear_attention_state, linear_attention_apply = attach(
    "cuda", recompute_tokens=RECOMPUTE_TOKENS
)


def implementation(op: str, q: Tensor, *_: object) -> str:
    """The tiles that the kernels were compiled with for q's head dim and dtype."""
    del op
    return f"cuda: {torch.ops.linear_vit.cuda_linear_attention_describe(q)}"
