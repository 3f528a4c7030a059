"""Every kernel of PyTorch's scaled_dot_product_attention, each by name."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

OPERATION = "softmax_attention"
NAMES = {
    "sdpa_math": "_scaled_dot_product_attention_math",
    "sdpa_flash": "_scaled_dot_product_flash_attention",
    "sdpa_efficient": "_scaled_dot_product_efficient_attention",
    "sdpa_cudnn": "_scaled_dot_product_cudnn_attention",
}
_KERNELS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


@functools.cache
def unusable(name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype or torch.float32)
    try:
        run(name, x, x, x)
    except RuntimeError:
        kind = str(x.dtype).removeprefix("torch.")
        return f"PyTorch has no {name.removeprefix('sdpa_')} kernel for {kind} on {device.type}"
    return None


def run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(_KERNELS[name]):
        return F.scaled_dot_product_attention(q, k, v)
