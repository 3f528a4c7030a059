"""The modules a vision transformer is made of: four kinds of attention and the model around them.

Every attention module takes and returns tokens (B, N, C) and is told the token grid at call,
``module(x, grid=(rows, cols))`` with N = rows * cols. What is computed in them comes from
``kernels``; ``backend`` (a name, or None for the fastest usable one) is passed through to it.
:func:`replace` swaps the attention of a model that is there, ours or another library's, and
:func:`shard_sequence` spreads our model's tokens over several processes.

Two names in the literature mean other things: Bolya et al.'s *Hydra Attention* (as many heads as
features) is not this HydraAttention (query branches that share one key and value head), and Zheng
et al.'s *Ripple Attention* (attention weighted by spatial distance) is not this RippleAttention
(linear attention at the top of a token pyramid).
"""

from linear_vit.attention.baseline import BaselineAttention
from linear_vit.attention.hydra import HydraAttention
from linear_vit.attention.linear import LinearAttention
from linear_vit.attention.ripple import RippleAttention
from linear_vit.attention.sharded import shard_sequence
from linear_vit.attention.swap import Replaced, attention_modules, replace
from linear_vit.attention.vit import ATTENTION_TYPES, VisionTransformer

__all__ = [
    "ATTENTION_TYPES",
    "BaselineAttention",
    "HydraAttention",
    "LinearAttention",
    "Replaced",
    "RippleAttention",
    "VisionTransformer",
    "attention_modules",
    "replace",
    "shard_sequence",
]
