"""Builds the CUDA sources for the host and calls their launchers on CPU tensors.

The same ``.cu`` files, compiled by an ordinary C++ compiler against the headers in this folder.
Launchers are called through ctypes, the way ``cuda.cpp`` calls them on a GPU: same allocations,
same order. Every tensor a kernel may write is filled with NaN first, between guards that
:meth:`Emulator.check_guards` looks at; inputs are followed by NaN too (see :func:`guarded`).

A room's own file here (``linear_attention.py``, ...) derives from :class:`Emulator`: it has the
structures of the room's ``cuda.h`` and one method an operator.
"""

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from linear_vit.kernels import toolchains
from linear_vit.kernels.layout import empty_like
from tests.cuda_host import races

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
KEPT = HERE.parent.parent / ".pytest_cache" / "cuda_host"
ROOMS = ("linear_attention", "softmax_attention", "ripple")
ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
THREAD_ORDERS = {"forward": 0, "reverse": 1, "strided": 2}

GUARD = 64 * 1024  # elements around a tensor: more than any kernel's tile


def compiler() -> str | None:
    """The host's C++ compiler, or None."""
    return shutil.which(toolchains.cxx()[0])


def compile_command(source: Path, library: Path, flags: Sequence[str] = ()) -> list[str]:
    """The command that compiles one .cu file into a shared library for the host."""
    cxx = compiler()
    assert cxx is not None
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    return [cxx, *options, f"-I{HERE}", "-x", "c++", str(source), "-o", str(library), *flags]


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


def build_once(room: str, flags: Sequence[str] = ()) -> dict[str, Path]:
    """The room's library, built unless one of the same sources, flags and compiler is kept.

    Other processes wait for the first to build it. What older sources made goes.
    """
    digest = hashlib.sha256("\0".join([*flags, _compiler_version()]).encode())
    folder = KEPT / f"{room}_{digest.hexdigest()[:8]}"
    headers = [path for path in KERNELS.rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    for path in sorted([*headers, *HERE.glob("*.h"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = folder / f"{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it if this process is killed
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            build({room: sources()[room]}, folder, flags)[room].rename(library)
    return {room: library}


def _compiler_version() -> str:
    cxx = compiler()
    assert cxx is not None
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout


def sources(kernels: Path = KERNELS) -> dict[str, Path]:
    return {room: kernels / room / "cuda.cu" for room in ROOMS}


# ---- what a cuda.h declares ----------------------------------------------------------------------


class View(ctypes.Structure):
    """TensorView of kernels/cuda/arguments.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from 'type name name; type name': i int32, l int64, f float, p pointer."""
    types: dict[str, Any] = {
        "i": ctypes.c_int32,
        "l": ctypes.c_int64,
        "f": ctypes.c_float,
        "p": ctypes.c_void_p,
        "view": View,
    }
    pairs = []
    for group in fields.split(";"):
        kind, *names = group.split()
        pairs += [(field, types[kind]) for field in names]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


def view(x: Tensor) -> View:
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return View(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


# ---- guarded memory ------------------------------------------------------------------------------


def guarded(x: Tensor, offset: int = 0) -> Tensor:
    """A copy of ``x``, strides included, ``offset`` elements into memory that is NaN elsewhere."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = x.new_full((max(extent, 0) + offset + GUARD,), float("nan"))
    # An expanded axis is written once.
    written = [1 if s == 0 else n for n, s in zip(x.shape, x.stride(), strict=True)]
    storage.as_strided(written, x.stride(), offset).copy_(x.as_strided(written, x.stride()))
    return storage.as_strided(x.shape, x.stride(), offset)


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory moved by all threads, by 16-byte accesses and by narrower ones."""

    loaded_wide: int
    loaded_narrow: int
    stored_wide: int
    stored_narrow: int

    @property
    def loaded(self) -> int:
        return self.loaded_wide + self.loaded_narrow

    @property
    def stored(self) -> int:
        return self.stored_wide + self.stored_narrow


class Emulator:
    """A room's launchers, from a library built for the host; a room's file adds its operators.

    Attributes:
        num_splits: splits of every sum over tokens; None takes the launchers' own choice for
            ``multiprocessors`` of them.
        launches: the launchers called so far.
    """

    room: ClassVar[str]

    def __init__(
        self,
        libraries: dict[str, Path],
        *,
        thread_order: str = "forward",
        num_splits: int | None = None,
        multiprocessors: int = 1,
    ) -> None:
        self.library = ctypes.CDLL(str(libraries[self.room]))
        self.library.cuda_host_failure.restype = ctypes.c_char_p
        self._order = THREAD_ORDERS[thread_order]
        self._outputs: list[Tensor] = []
        self._watched: list[str] = []
        self.num_splits = num_splits
        self.multiprocessors = multiprocessors
        self.launches: list[str] = []
        self.watch_nothing()

    def check_guards(self) -> None:
        """Raise unless everything beyond the outputs' elements still is the NaN it was."""
        for out in self._outputs:
            storage = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
            inside = torch.zeros(storage.shape, dtype=torch.bool)
            inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
            assert storage[~inside].isnan().all(), "a write outside of the output"
        self._outputs.clear()

    def output(self, like: Tensor, name: str | None = None) -> Tensor:
        """NaN in the memory order of ``like``, guarded on both sides; watched under ``name``."""
        storage = like.new_full((like.numel() + 2 * GUARD,), float("nan"))
        out = storage.as_strided(like.shape, like.stride(), GUARD)
        self._outputs.append(out)
        if name is not None:
            self.watch(**{name: out})
        return out

    def empty_like(self, x: Tensor, name: str | None = None) -> Tensor:
        return self.output(empty_like(x), name)

    def floats(self, *shape: int, name: str | None = None) -> Tensor:
        return self.output(torch.empty(shape, dtype=torch.float32), name)

    def splits(self, function: Any, *sizes: int) -> int:
        if self.num_splits is not None:
            return self.num_splits
        function.restype = ctypes.c_int64
        return function(*(ctypes.c_int64(n) for n in (*sizes, self.multiprocessors)))

    def launch(self, launcher: str, arguments: ctypes.Structure) -> None:
        self.library.cuda_host_configure(self._order)
        self.launches.append(launcher)
        error = getattr(self.library, launcher)(ctypes.byref(arguments), None)
        if error:
            failure = (self.library.cuda_host_failure() or b"").decode()
            explained = races.explain(failure, Path(self.library._name))
            raise RuntimeError(f"{launcher}: error {error}, {explained}")

    # -- traffic

    def watch(self, **tensors: Tensor) -> None:
        """Count these tensors' traffic apart, by name (a name may have several tensors).

        Each is the range of memory from its first to its last element, so that views of one packed
        tensor are to be watched as that tensor. The ranges belong to the library, not to this
        object: a new emulator of the room, or :meth:`watch_nothing`, forgets them.
        """
        for name, x in tensors.items():
            extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            end = x.data_ptr() + max(extent, 0) * x.element_size()
            index = self.library.cuda_host_watch(
                ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(end)
            )
            assert index == len(self._watched), "another emulator watches: watch_nothing() first"
            self._watched.append(name)

    def watch_nothing(self) -> None:
        self.library.cuda_host_watch_nothing()
        self._watched.clear()

    def traffic(self) -> dict[str, Traffic]:
        """Bytes by tensor, of all launches since it was watched; "other" is everything else."""
        counted: dict[str, list[int]] = {}
        for index, name in enumerate([*self._watched, "other"]):
            values = (ctypes.c_int64 * 4)()
            self.library.cuda_host_traffic(index, values)
            total = counted.setdefault(name, [0, 0, 0, 0])
            counted[name] = [a + b for a, b in zip(total, values, strict=True)]
        return {name: Traffic(*values) for name, values in counted.items()}
