"""Linear attention's CUDA launchers, called on the host as cuda.cpp calls them on a GPU."""

import ctypes
from typing import Any

from torch import Tensor

from linear_vit.kernels.layout import unpack_qkv
from tests.cuda_host.emulator import ELEMENT_TYPES, Emulator, structure, view

_Arguments = structure(
    "LinearAttentionArguments",
    "i element head_dim; l batch kv_heads group queries keys multiprocessors num_splits; f eps;"
    "view q k v out dout dq dk dv; p S z dS dz workspace; l only_dq",
)
PASSES = ("forward", "backward", "state", "state_backward", "apply", "apply_backward")


class LinearAttention(Emulator):
    """The operators of kernels/linear_attention/cuda.cpp.

    Outputs, states and workspace are watched under their names (see Emulator.watch).
    """

    room = "linear_attention"

    def arguments(
        self, q: Tensor | None, k: Tensor | None, S: Tensor | None, eps: float, **fields: Any
    ) -> ctypes.Structure:
        """The launchers' arguments, without a workspace: tensors become views and pointers."""
        like = q if q is not None else k
        assert like is not None
        heads = like.shape[1] if q is None else q.shape[1]
        kv_heads = k.shape[1] if k is not None else S.shape[1] if S is not None else heads
        values: dict[str, Any] = {}
        for name, x in {"q": q, "k": k, **fields}.items():
            if isinstance(x, Tensor):
                values[name] = view(x) if x.dim() == 4 and name not in ("dS",) else x.data_ptr()
        if S is not None and S.numel() > 0:
            values["S"] = S.data_ptr()
        return _Arguments(
            element=ELEMENT_TYPES[like.dtype], head_dim=like.shape[3], batch=like.shape[0],
            kv_heads=kv_heads, group=heads // kv_heads,
            queries=0 if q is None else q.shape[2], keys=0 if k is None else k.shape[2],
            multiprocessors=self.multiprocessors, num_splits=self.num_splits or 0, eps=eps,
            **values,
        )  # fmt: skip

    def ask(self, question: str, arguments: ctypes.Structure, which: str) -> int:
        """linear_attention_<question>(arguments, pass)."""
        function = getattr(self.library, f"linear_attention_{question}")
        function.restype = ctypes.c_int64
        return function(ctypes.byref(arguments), ctypes.c_int32(PASSES.index(which)))

    def _run(self, which: str, arguments: ctypes.Structure) -> None:
        floats = self.ask("workspace", arguments, which)
        workspace = self.floats(floats, name="workspace")
        arguments.workspace = workspace.data_ptr()
        self.launch(f"linear_attention_{which}", arguments)

    def _state(self, x: Tensor, kv_heads: int, prefix: str = "") -> tuple[Tensor, Tensor]:
        batch, _, _, head_dim = x.shape
        return (
            self.floats(batch, kv_heads, 2 * head_dim, head_dim, name=f"{prefix}S"),
            self.floats(batch, kv_heads, 2 * head_dim, name=f"{prefix}z"),
        )

    # -- operators

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, eps: float, save_state: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = self.empty_like(q, "out")
        S, z = self._state(k, k.shape[1]) if save_state else (self.floats(0), self.floats(0))
        self._run("forward", self.arguments(q, k, S, eps, v=v, out=out, z=_or_none(z)))
        return out, S, z

    def linear_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float,
        only_dq: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (self.empty_like(x, name) for x, name in ((q, "dq"), (k, "dk"), (v, "dv")))
        arguments = self.arguments(q, k, S, eps, v=v, dout=dout, dq=dq, dk=dk, dv=dv, z=_or_none(z))
        arguments.only_dq = only_dq
        self._run("backward", arguments)
        return dq, dk, dv

    def linear_attention_packed_backward(
        self, dout: Tensor, qkv: Tensor, S: Tensor, z: Tensor, eps: float
    ) -> Tensor:
        dqkv = self.empty_like(qkv, "dqkv")
        (q, k, v), (dq, dk, dv) = unpack_qkv(qkv), unpack_qkv(dqkv)
        gradient = dout.transpose(1, 2)
        self._run(
            "backward",
            self.arguments(q, k, S, eps, v=v, dout=gradient, dq=dq, dk=dk, dv=dv, z=_or_none(z)),
        )
        return dqkv

    def linear_attention_state(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        S, z = self._state(k, k.shape[1])
        self._run("state", self.arguments(None, k, S, 0.0, v=v, z=z))
        return S, z

    def linear_attention_state_backward(
        self, dS: Tensor, dz: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        dk, dv = self.empty_like(k, "dk"), self.empty_like(v, "dv")
        arguments = self.arguments(None, k, None, 0.0, v=v, dS=dS, dz=dz, dk=dk, dv=dv)
        self._run("state_backward", arguments)
        return dk, dv

    def linear_attention_apply(self, q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
        out = self.empty_like(q, "out")
        self._run("apply", self.arguments(q, None, S, eps, out=out, z=z))
        return out

    def linear_attention_apply_backward(
        self, dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float, only_dq: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq = self.empty_like(q, "dq")
        dS, dz = self._state(q, S.shape[1], "d")
        arguments = self.arguments(q, None, S, eps, dout=dout, dq=dq, dS=dS, dz=dz, z=z)
        arguments.only_dq = only_dq
        self._run("apply_backward", arguments)
        return dq, dS, dz


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() > 0 else None
