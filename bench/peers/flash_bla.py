"""flash-bidirectional-linear-attention (fla-org), where the user has it: it is on no package index.

It takes φ(q) and φ(k), twice as wide as q and k. ``flash_bla`` makes them as well as its user can,
by a compiled φ; ``flash_bla_given`` is given them, and is another function therefore: what its
kernels take by themselves. Its normaliser is a mean over the keys, so that its eps is N times ours:
no difference here.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils.weak import WeakTensorKeyDictionary

from linear_vit.bench.peers.features import phi, through_state
from linear_vit.bench.peers.peer import Peer, gpu_only
from linear_vit.kernels.compilation import compiled

_TOKENS_AND_BATCH = (0, 2)
unusable = gpu_only(
    "flash_bla",
    "flash-bidirectional-linear-attention is not installed: it is fla-org's repository of "
    "that name",
)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of_q, of_k = (compiled(phi, (x, _TOKENS_AND_BATCH))(x) for x in (q, k))
    return _attend(of_q, of_k, v)


def run_given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _attend(_Given.apply(q), _Given.apply(k), v)  # type: ignore[no-untyped-call]
    return out


def expected_given(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of_q, of_k = (_Given.apply(x) for x in (q, k))  # type: ignore[no-untyped-call]
    return through_state(of_q, of_k.mT @ v, of_k.sum(2))


class _Given(Function):
    """φ(x), made once for each x and kept; its gradient is that of the positive features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        version, features = _kept.get(x, (None, None))
        if version != x._version:
            features = phi(x)
            _kept[x] = x._version, features
        assert features is not None
        return features.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[..., : gradient.shape[-1] // 2]


_kept = WeakTensorKeyDictionary()


def _attend(features_q: Tensor, features_k: Tensor, v: Tensor) -> Tensor:
    from flash_bla.ops.linear_attn import fused

    width = features_k.shape[-1]
    for name in ("fused_fwd_kernel_s_km", "fused_fwd_kernel_o"):
        if kernel := getattr(fused, name, None):
            _prune(kernel, width)
    out: Tensor = fused.linear_attention(features_q, features_k, v)
    return out


def _prune(kernel: Any, width: int) -> None:
    """Leaves its autotuning a dozen configurations of 144, which it would try at every length.

    A program takes all features at once: a second step over them reads the keys' mean at the wrong
    place. It is tuned by length alone, so what was found for other widths goes.
    """
    block = 1 << (width - 1).bit_length()
    if any(config.kwargs["BK"] != block for config in kernel.configs):
        import triton

        kernel.configs = [
            triton.Config({"BL": tokens, "BK": block, "BV": 64}, num_warps=warps, num_stages=stages)
            for tokens in (64, 128)
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ]
        kernel.cache.clear()


_GIVEN = "φ(q) and φ(k) are given, and its gradients are theirs: none of the work of φ"

_SIGNATURE = ("fused_fwd_kernel", "fused_bwd_kernel")

PEERS = (
    Peer("flash_bla", "linear_attention", _SIGNATURE, unusable, run, "#F0E442"),
    Peer(
        "flash_bla_given",
        "linear_attention",
        _SIGNATURE,
        unusable,
        run_given,
        "#999933",
        other_function=_GIVEN,
        expected=expected_given,
    ),
)
