"""The core of timm's LiteMLA (EfficientViT's attention): linear attention with one-sided ReLU.

Half of our features and so half of the work: another function, and marked as that. Its convolutions
and projections are left out.
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_vit.bench.peers.peer import Peer

_EPS = 1e-6


def unusable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed: pip install timm"
    return None


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padded = F.pad(v, (0, 1), value=1.0)
    out: Tensor = _module()._attn(q.relu(), k.relu(), padded)
    return out


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = k.relu().mT @ v
    return (q.relu() @ state) / (q.relu() @ k.relu().sum(2)[..., None] + _EPS)


@functools.cache
def _module() -> Any:
    from timm.models.efficientvit_mit import LiteMLA

    return LiteMLA(8, 8, dim=8, eps=_EPS)


PEERS = (
    Peer(
        "litemla",
        "linear_attention",
        ("aten::matmul", "aten::bmm"),
        unusable,
        run,
        "#000000",
        other_function="one-sided ReLU: φ(x) = relu(x), half of the features",
        flop_share=0.5,
        expected=expected,
    ),
)
