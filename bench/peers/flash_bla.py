"""flash-bidirectional-linear-attention (fla-org), where the user has it: it is on no package index.

Its normaliser is a mean over the keys, so that its eps is N times ours: no difference here.
"""

from torch import Tensor

from linear_vit.bench.peers.features import phi
from linear_vit.bench.peers.peer import Peer, gpu_only

unusable = gpu_only(
    "flash_bla",
    "flash-bidirectional-linear-attention is not installed: it is fla-org's repository of "
    "that name",
)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_bla.ops.linear_attn.fused import linear_attention

    out: Tensor = linear_attention(phi(q), phi(k), v)
    return out


PEERS = (Peer("flash_bla", "linear_attention", "fwd_kernel", unusable, run, "#F0E442"),)
