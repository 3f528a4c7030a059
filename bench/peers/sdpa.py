"""Every kernel of PyTorch's scaled_dot_product_attention, each by name."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linear_vit.bench.peers.peer import Peer

_KERNELS = {
    # The others' backward operators have their own names; this one's are those of its products.
    "math": (
        SDPBackend.MATH,
        ("_scaled_dot_product_attention_math", "aten::_softmax_backward_data"),
        "#56B4E9",
    ),
    "flash": (SDPBackend.FLASH_ATTENTION, ("_scaled_dot_product_flash_attention",), "#F0E442"),
    "efficient": (
        SDPBackend.EFFICIENT_ATTENTION,
        ("_scaled_dot_product_efficient_attention",),
        "#000000",
    ),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("_scaled_dot_product_cudnn_attention",), "#882255"),
}


@functools.cache
def unusable(kernel: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    x = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype or torch.float32)
    try:
        run(kernel, x, x, x)
    except RuntimeError:
        kind = str(x.dtype).removeprefix("torch.")
        return f"PyTorch has no {kernel} kernel for {kind} on {device.type}"
    return None


def run(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(_KERNELS[kernel][0]):
        return F.scaled_dot_product_attention(q, k, v)


PEERS = tuple(
    Peer(
        f"sdpa_{kernel}",
        "softmax_attention",
        signature,
        functools.partial(unusable, kernel),
        functools.partial(run, kernel),
        colour,
    )
    for kernel, (_, signature, colour) in _KERNELS.items()
)
