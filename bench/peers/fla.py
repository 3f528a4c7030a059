"""flash-linear-attention (fla-core), which has causal linear attention and no other.

What its users would do for the non-causal one: φ outside, the causal kernel for its final state
(its output is not needed, and is not avoided), then the state applied to the queries, with products
in their dtype. So it is called an emulation: no time of fla's own operation.
"""

import torch
from torch import Tensor

from linear_vit.bench.peers.features import phi, through_state
from linear_vit.bench.peers.peer import Peer, gpu_only

unusable = gpu_only("fla", "fla-core is not installed: pip install fla-core")


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    features = phi(k)
    # (B, N, H, features) there.
    _, state = chunk_linear_attn(
        phi(q).transpose(1, 2),
        features.transpose(1, 2),
        v.transpose(1, 2),
        scale=1.0,
        output_final_state=True,
        normalize=False,
    )
    # As means over the keys: a sum would leave float16's range.
    keys = k.shape[2]
    normaliser = features.sum(2, dtype=torch.float32) / keys
    return through_state(phi(q), (state / keys).to(q.dtype), normaliser.to(q.dtype))


PEERS = (
    Peer(
        "fla",
        "linear_attention",
        ("chunk_",),
        unusable,
        run,
        "#56B4E9",
        emulation="an emulation, through the final state of its causal kernel",
    ),
)
