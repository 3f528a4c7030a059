"""Builds the CUDA sources for the host and calls their launchers on CPU tensors.

The same ``.cu`` files, compiled by an ordinary C++ compiler against the headers in this folder.
Launchers are called through ctypes, the way ``cuda.cpp`` calls them on a GPU: same allocations,
same order. Every tensor a kernel may write is filled with NaN first, between guards that
:meth:`Emulator.check_guards` looks at; inputs are followed by NaN too (see :func:`guarded`).
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.layout import empty_like

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
ROOMS = ("linear_attention", "softmax_attention", "ripple")
ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
THREAD_ORDERS = {"forward": 0, "reverse": 1, "strided": 2}

GUARD = 64 * 1024  # elements around a tensor: more than any kernel's tile


def compiler() -> str | None:
    """The host's C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_command(source: Path, library: Path, flags: Sequence[str] = ()) -> list[str]:
    """The command that compiles one .cu file into a shared library for the host."""
    cxx = compiler()
    assert cxx is not None
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    return [cxx, *options, *flags, f"-I{HERE}", "-x", "c++", str(source), "-o", str(library)]


def build(sources: dict[str, Path], folder: Path, flags: Sequence[str] = ()) -> dict[str, Path]:
    """Compile the rooms' .cu files side by side; returns room -> library."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = {room: folder / f"{room}.so" for room in sources}
    running = {
        room: subprocess.Popen(
            compile_command(source, libraries[room], flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for room, source in sources.items()
    }
    for room, process in running.items():
        output, _ = process.communicate()
        if process.returncode != 0 or "warning:" in output:
            raise RuntimeError(f"{room} does not compile cleanly for the host:\n{output}")
    return libraries


def sources(kernels: Path = KERNELS) -> dict[str, Path]:
    return {room: kernels / room / "cuda.cu" for room in ROOMS}


# ---- what cuda.h declares ------------------------------------------------------------------------


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from 'type name name; type name': i int32, l int64, f float, p pointer."""
    types: dict[str, Any] = {
        "i": ctypes.c_int32,
        "l": ctypes.c_int64,
        "f": ctypes.c_float,
        "p": ctypes.c_void_p,
        "view": _View,
    }
    pairs = []
    for group in fields.split(";"):
        kind, *names = group.split()
        pairs += [(field, types[kind]) for field in names]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


_FeatureOuter = _structure(
    "FeatureOuterArguments",
    "i element head_dim; l batch kv_heads group tokens num_splits; view x w;"
    "p row_scale row_weight S z workspace",
)
_Apply = _structure(
    "ApplyArguments",
    "i element head_dim; l batch heads group tokens; view q out; p S z; f eps",
)
_QueryGradient = _structure(
    "QueryGradientArguments",
    "i element head_dim; l batch heads group tokens; view dout q dq; p S z; f eps;"
    "p row_scale row_weight",
)
_KeyValueGradient = _structure(
    "KeyValueGradientArguments",
    "i element head_dim; l batch kv_heads tokens; view k v dk dv; p dS dz",
)
_SoftmaxForward = _structure(
    "SoftmaxForwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens; view q k v out; p lse;"
    "f scale",
)
_SoftmaxBackward = _structure(
    "SoftmaxBackwardArguments",
    "i element head_dim; l batch heads group query_tokens key_tokens;"
    "view dout q k v out dq dk dv; p lse delta; f scale",
)
_Ripple = _structure(
    "RippleArguments",
    "i element axis stride; l batch rows cols channels; view x z out dx dz;"
    "p weight pair_weight dweight dpair_weight; l num_splits; p workspace",
)


def _view(x: Tensor) -> _View:
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return _View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


# ---- guarded memory ------------------------------------------------------------------------------


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """A copy of ``x``, strides included, ``offset`` elements into memory that is NaN elsewhere."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = x.new_full((max(extent, 0) + offset + GUARD,), float("nan"))
    # An expanded axis is written once.
    written = [1 if s == 0 else n for n, s in zip(x.shape, x.stride(), strict=True)]
    storage.as_strided(written, x.stride(), offset).copy_(x.as_strided(written, x.stride()))
    return storage.as_strided(x.shape, x.stride(), offset)


class Emulator:
    """The operators of ``cuda.cpp`` over libraries built for the host.

    Attributes:
        num_splits: splits of every sum over tokens; None takes the launchers' own choice for
            ``multiprocessors`` of them.
    """

    def __init__(
        self,
        libraries: dict[str, Path],
        *,
        thread_order: str = "forward",
        num_splits: int | None = None,
        multiprocessors: int = 1,
    ) -> None:
        self._libraries = {room: ctypes.CDLL(str(path)) for room, path in libraries.items()}
        self._order = THREAD_ORDERS[thread_order]
        self._outputs: list[Tensor] = []
        self.num_splits = num_splits
        self.multiprocessors = multiprocessors

    def check_guards(self) -> None:
        """Raise unless everything beyond the outputs' elements still is the NaN it was."""
        for out in self._outputs:
            storage = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
            inside = torch.zeros(storage.shape, dtype=torch.bool)
            inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
            assert storage[~inside].isnan().all(), "a write outside of the output"
        self._outputs.clear()

    def _output(self, like: Tensor) -> Tensor:
        """NaN in the memory order of ``like``, guarded on both sides."""
        storage = like.new_full((like.numel() + 2 * GUARD,), float("nan"))
        out = storage.as_strided(like.shape, like.stride(), GUARD)
        self._outputs.append(out)
        return out

    def _empty_like(self, x: Tensor) -> Tensor:
        return self._output(empty_like(x))

    def _floats(self, *shape: int) -> Tensor:
        return self._output(torch.empty(shape, dtype=torch.float32))

    def _splits(self, function: Any, *sizes: int) -> int:
        if self.num_splits is not None:
            return self.num_splits
        function.restype = ctypes.c_int64
        return function(*(ctypes.c_int64(n) for n in (*sizes, self.multiprocessors)))

    def _launch(self, room: str, launcher: str, arguments: ctypes.Structure) -> None:
        library = self._libraries[room]
        library.cuda_host_configure(self._order)
        error = getattr(library, launcher)(ctypes.byref(arguments), None)
        if error:
            library.cuda_host_failure.restype = ctypes.c_char_p
            raise RuntimeError(f"{launcher}: error {error}, {library.cuda_host_failure()}")

    # -- linear attention

    def _feature_outer(
        self, x: Tensor, w: Tensor, kv_heads: int, rows: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = x.shape
        S = self._floats(batch, kv_heads, 2 * head_dim, head_dim)
        z = self._floats(batch, kv_heads, 2 * head_dim)
        library = self._libraries["linear_attention"]
        splits = self._splits(library.linear_attention_num_splits, batch * kv_heads, tokens)
        workspace = self._floats(splits * (S.numel() + z.numel()))
        scale, weight = (t.data_ptr() for t in rows) if rows else (None, None)
        arguments = _FeatureOuter(
            ELEMENT_TYPES[x.dtype], head_dim, batch, kv_heads, heads // kv_heads, tokens, splits,
            _view(x), _view(w), scale, weight, S.data_ptr(), z.data_ptr(), workspace.data_ptr(),
        )  # fmt: skip
        self._launch("linear_attention", "linear_attention_feature_outer", arguments)
        return S, z

    def linear_attention_state(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._feature_outer(k, v, k.shape[1], None)

    def linear_attention_state_backward(
        self, dS: Tensor, dz: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = k.shape
        dk, dv = self._empty_like(k), self._empty_like(v)
        arguments = _KeyValueGradient(
            ELEMENT_TYPES[k.dtype], head_dim, batch, heads, tokens,
            _view(k), _view(v), _view(dk), _view(dv), dS.data_ptr(), dz.data_ptr(),
        )  # fmt: skip
        self._launch("linear_attention", "linear_attention_key_value_gradient", arguments)
        return dk, dv

    def linear_attention_apply(self, q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
        batch, heads, tokens, head_dim = q.shape
        out = self._empty_like(q)
        arguments = _Apply(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // S.shape[1], tokens,
            _view(q), _view(out), S.data_ptr(), z.data_ptr(), eps,
        )  # fmt: skip
        self._launch("linear_attention", "linear_attention_apply", arguments)
        return out

    def linear_attention_apply_backward(
        self, dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        dq = self._empty_like(q)
        scale, weight = self._floats(batch, heads, tokens), self._floats(batch, heads, tokens)
        arguments = _QueryGradient(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // S.shape[1], tokens,
            _view(dout), _view(q), _view(dq), S.data_ptr(), z.data_ptr(), eps,
            scale.data_ptr(), weight.data_ptr(),
        )  # fmt: skip
        self._launch("linear_attention", "linear_attention_query_gradient", arguments)
        return dq, *self._feature_outer(q, dout, S.shape[1], (scale, weight))

    # -- softmax attention

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        out, lse = self._empty_like(q), self._floats(batch, heads, tokens)
        arguments = _SoftmaxForward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            _view(q), _view(k), _view(v), _view(out), lse.data_ptr(), scale,
        )  # fmt: skip
        self._launch("softmax_attention", "softmax_attention_forward", arguments)
        return out, lse

    def softmax_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, tokens, head_dim = q.shape
        dq, dk, dv = self._empty_like(q), self._empty_like(k), self._empty_like(v)
        delta = self._floats(batch, heads, tokens)
        arguments = _SoftmaxBackward(
            ELEMENT_TYPES[q.dtype], head_dim, batch, heads, heads // k.shape[1], tokens, k.shape[2],
            _view(dout), _view(q), _view(k), _view(v), _view(out), _view(dq), _view(dk), _view(dv),
            lse.data_ptr(), delta.data_ptr(), scale,
        )  # fmt: skip
        self._launch("softmax_attention", "softmax_attention_backward", arguments)
        return dq, dk, dv

    # -- ripple

    def _ripple(self, x: Tensor, axis: int, stride: int, tokens: int, **fields: Any) -> _Ripple:
        batch, rows, cols, channels = x.shape
        library = self._libraries["ripple"]
        splits = self._splits(library.ripple_num_splits, tokens, channels)
        workspace = self._floats(splits * 11 * channels)
        return _Ripple(
            element=ELEMENT_TYPES[x.dtype], axis=axis, stride=stride, batch=batch, rows=rows,
            cols=cols, channels=channels, x=_view(x), num_splits=splits,
            workspace=workspace.data_ptr(), **fields,
        )  # fmt: skip

    def ripple_pool(self, x: Tensor, weight: Tensor, axis: int) -> Tensor:
        shape = list(x.shape)
        shape[axis + 1] = (shape[axis + 1] + 1) // 2
        out = self._output(empty_like(x, tuple(shape)))
        arguments = self._ripple(x, axis, 2, 1, out=_view(out), weight=weight.data_ptr())
        self._launch("ripple", "ripple_forward", arguments)
        return out

    def ripple_pool_backward(
        self, dout: Tensor, x: Tensor, weight: Tensor, axis: int
    ) -> tuple[Tensor, Tensor]:
        dx, dweight = self._empty_like(x), self._empty_like(weight)
        arguments = self._ripple(
            x, axis, 2, dout[..., 0].numel(), out=_view(dout), dx=_view(dx),
            weight=weight.data_ptr(), dweight=dweight.data_ptr(),
        )  # fmt: skip
        self._launch("ripple", "ripple_backward", arguments)
        return dx, dweight

    def ripple_expand(
        self, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
    ) -> Tensor:
        out = self._empty_like(x)
        arguments = self._ripple(
            x, axis, 1, 1, z=_view(z), out=_view(out), weight=lateral_weight.data_ptr(),
            pair_weight=weight.data_ptr(),
        )  # fmt: skip
        self._launch("ripple", "ripple_forward", arguments)
        return out

    def ripple_expand_backward(
        self,
        dout: Tensor,
        z: Tensor,
        x: Tensor,
        weight: Tensor,
        lateral_weight: Tensor,
        axis: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dz, dx = self._empty_like(z), self._empty_like(x)
        dweight, dlateral_weight = self._empty_like(weight), self._empty_like(lateral_weight)
        arguments = self._ripple(
            x, axis, 1, dout[..., 0].numel(), z=_view(z), out=_view(dout), dx=_view(dx),
            dz=_view(dz), weight=lateral_weight.data_ptr(), pair_weight=weight.data_ptr(),
            dweight=dlateral_weight.data_ptr(), dpair_weight=dweight.data_ptr(),
        )  # fmt: skip
        self._launch("ripple", "ripple_backward", arguments)
        return dz, dx, dweight, dlateral_weight
