"""Softmax attention's CUDA launchers, called on the host."""

from torch import Tensor

from linear_vit.kernels.layout import empty_like, unpack_qkv
from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, structure, view

_SoftmaxForward = structure(
    "SoftmaxForwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens; view q k v out;"
    "p key_mask lse; f scale",
)
_SoftmaxBackward = structure(
    "SoftmaxBackwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens;"
    "view dout q k v out dq dk dv; p key_mask lse delta; f scale; i wanted",
)


class SoftmaxAttention(Emulator):
    """The operators of kernels/softmax_attention/cuda.cpp.

    Attributes:
        key_mask: theirs, contiguous; None unless a test sets it.
    """

    room = "softmax_attention"
    key_mask: Tensor | None = None

    def _mask(self) -> int:
        return 0 if self.key_mask is None else self.key_mask.data_ptr()

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = self.empty_like(q, "out")
        return out, self._forward(q, k, v, out, scale)

    def softmax_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
        wanted: int = 0b111,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradients = self.empty_like(q, "dq"), self.empty_like(k, "dk"), self.empty_like(v, "dv")
        self._backward(dout, q, k, v, out, lse, *gradients, scale, wanted)
        return gradients

    def softmax_attention_packed(self, qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out = self.output(empty_like(qkv[:, :, 0]), "out")
        return out, self._forward(*unpack_qkv(qkv), out.transpose(1, 2), scale)

    def softmax_attention_packed_backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Tensor:
        dqkv = self.empty_like(qkv, "dqkv")
        dout, out = dout.transpose(1, 2), out.transpose(1, 2)
        self._backward(dout, *unpack_qkv(qkv), out, lse, *unpack_qkv(dqkv), scale)
        return dqkv

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, head_dim = q.shape
        lse = self.floats(batch, heads, tokens, name="lse")
        arguments = _SoftmaxForward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            view(q), view(k), view(v), view(out), self._mask(), lse.data_ptr(), scale,
        )  # fmt: skip
        self.launch("softmax_attention_forward", arguments)
        return lse

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        scale: float,
        wanted: int = 0b111,
    ) -> None:
        batch, heads, tokens, head_dim = q.shape
        delta = self.floats(batch, heads, tokens, name="delta")
        arguments = _SoftmaxBackward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            view(dout), view(q), view(k), view(v), view(out), view(dq), view(dk), view(dv),
            self._mask(), lse.data_ptr(), delta.data_ptr(), scale, wanted,
        )  # fmt: skip
        self.launch("softmax_attention_backward", arguments)
