"""Linear attention's CUDA launchers, called on the host."""

from torch import Tensor

from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, structure, view

_FeatureOuter = structure(
    "FeatureOuterArguments",
    "i element head_dim; l batch kv_heads group tokens num_splits; view x w;"
    "p row_scale row_weight S z workspace",
)
_Apply = structure(
    "ApplyArguments",
    "i element head_dim; l batch heads group tokens; view q out; p S z; f eps",
)
_QueryGradient = structure(
    "QueryGradientArguments",
    "i element head_dim; l batch heads group tokens; view dout q dq; p S z; f eps;"
    "p row_scale row_weight",
)
_KeyValueGradient = structure(
    "KeyValueGradientArguments",
    "i element head_dim; l batch kv_heads tokens; view k v dk dv; p dS dz",
)


class LinearAttention(Emulator):
    """The operators of kernels/linear_attention/cuda.cpp."""

    room = "linear_attention"

    def _feature_outer(
        self, x: Tensor, w: Tensor, kv_heads: int, rows: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = x.shape
        S = self.floats(batch, kv_heads, 2 * head_dim, head_dim)
        z = self.floats(batch, kv_heads, 2 * head_dim)
        splits = self.splits(self.library.linear_attention_num_splits, batch * kv_heads, tokens)
        workspace = self.floats(splits * (S.numel() + z.numel()))
        scale, weight = (t.data_ptr() for t in rows) if rows else (None, None)
        arguments = _FeatureOuter(
            ELEMENT_TYPES[x.dtype], head_dim, batch, kv_heads, heads // kv_heads, tokens, splits,
            view(x), view(w), scale, weight, S.data_ptr(), z.data_ptr(), workspace.data_ptr(),
        )  # fmt: skip
        self.launch("linear_attention_feature_outer", arguments)
        return S, z

    def linear_attention_state(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._feature_outer(k, v, k.shape[1], None)

    def linear_attention_state_backward(
        self, dS: Tensor, dz: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = k.shape
        dk, dv = self.empty_like(k), self.empty_like(v)
        arguments = _KeyValueGradient(
            ELEMENT_TYPES[k.dtype], head_dim, batch, heads, tokens,
            view(k), view(v), view(dk), view(dv), dS.data_ptr(), dz.data_ptr(),
        )  # fmt: skip
        self.launch("linear_attention_key_value_gradient", arguments)
        return dk, dv

    def linear_attention_apply(self, q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
        batch, heads, tokens, head_dim = q.shape
        out = self.empty_like(q)
        arguments = _Apply(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // S.shape[1], tokens,
            view(q), view(out), S.data_ptr(), z.data_ptr(), eps,
        )  # fmt: skip
        self.launch("linear_attention_apply", arguments)
        return out

    def linear_attention_apply_backward(
        self, dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        dq = self.empty_like(q)
        scale, weight = self.floats(batch, heads, tokens), self.floats(batch, heads, tokens)
        arguments = _QueryGradient(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // S.shape[1], tokens,
            view(dout), view(q), view(dq), S.data_ptr(), z.data_ptr(), eps,
            scale.data_ptr(), weight.data_ptr(),
        )  # fmt: skip
        self.launch("linear_attention_query_gradient", arguments)
        return dq, *self._feature_outer(q, dout, S.shape[1], (scale, weight))
