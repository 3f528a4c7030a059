"""Softmax attention's CUDA launchers, called on the host."""

from torch import Tensor

from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, structure, view

_SoftmaxForward = structure(
    "SoftmaxForwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens; view q k v out; p lse;"
    "f scale",
)
_SoftmaxBackward = structure(
    "SoftmaxBackwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens;"
    "view dout q k v out dq dk dv; p lse delta; f scale",
)


class SoftmaxAttention(Emulator):
    """The operators of kernels/softmax_attention/cuda.cpp."""

    room = "softmax_attention"

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        out, lse = self.empty_like(q), self.floats(batch, heads, tokens)
        arguments = _SoftmaxForward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            view(q), view(k), view(v), view(out), lse.data_ptr(), scale,
        )  # fmt: skip
        self.launch("softmax_attention_forward", arguments)
        return out, lse

    def softmax_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        dq, dk, dv = self.empty_like(q), self.empty_like(k), self.empty_like(v)
        delta = self.floats(batch, heads, tokens)
        arguments = _SoftmaxBackward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            view(dout), view(q), view(k), view(v), view(out), view(dq), view(dk), view(dv),
            lse.data_ptr(), delta.data_ptr(), scale,
        )  # fmt: skip
        self.launch("softmax_attention_backward", arguments)
        return dq, dk, dv
