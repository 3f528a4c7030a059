"""flash-bidirectional-linear-attention (fla-org), where the user has it: it is on no package index.

Its normaliser is a mean over the keys, so that its eps is N times ours: no difference here.
"""

import importlib.util

import torch
from torch import Tensor

from linear_vit.bench.peers.features import phi
from linear_vit.bench.peers.peer import Peer


def unusable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("flash_bla") is None:
        return (
            "flash-bidirectional-linear-attention is not installed: it is fla-org's repository of "
            "that name"
        )
    if device.type != "cuda":
        return f"its kernels are Triton's, which run on CUDA devices, not on {device.type}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_bla.ops.linear_attn.fused import linear_attention

    out: Tensor = linear_attention(phi(q), phi(k), v)
    return out


PEERS = (Peer("flash_bla", "linear_attention", "fwd_kernel", unusable, run, "#F0E442"),)
