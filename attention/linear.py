"""Multi-head linear attention and nothing else: what it does by itself."""

from torch import Tensor

from linear_vit.attention.baseline import BaselineAttention
from linear_vit.kernels import linear_attention_packed


class LinearAttention(BaselineAttention):
    """Multi-head linear attention over tokens (B, N, C), with the baseline's shape and weights.

    Its arguments, its parameters and their names are those of :class:`BaselineAttention`, so that
    either takes the other's weights. Only the function between the projections is another.
    """

    def attend(self, qkv: Tensor) -> Tensor:
        return linear_attention_packed(qkv, backend=self.backend)
