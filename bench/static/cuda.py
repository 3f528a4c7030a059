"""The CUDA sources compiled for one architecture, and the launches that their operators make.

Registers, spills and machine code come from nvcc, run as the extension's build runs it; every
kernel in the binary is listed, reached or not. Block sizes and dynamic shared memory come from
running the operators of ``cuda.cpp`` on CPU tensors, linked with a CUDA runtime of ours that
records launches (``launch_recorder.cpp``).
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from linear_vit.bench.problems import DTYPES
from linear_vit.bench.static import launches, machine_code
from linear_vit.bench.static.units import Unit, digest
from linear_vit.kernels import build, toolchains
from linear_vit.kernels.registry import pretend_usable

HERE = Path(__file__).resolve().parent
_ELEMENTS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
# cudaDeviceAttr, of the CUDA runtime API.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
_WARP_SIZE, _BLOCKS_PER_MULTIPROCESSOR, _THREADS_PER_MULTIPROCESSOR = 10, 106, 39
_SHARED_PER_BLOCK, _SHARED_PER_MULTIPROCESSOR, _SHARED_PER_BLOCK_OPTIN = 8, 81, 97


@dataclass
class Reached:
    """What reached a kernel: the largest dynamic shared memory asked for, and by which inputs."""

    threads: int
    dynamic_shared: int
    head_dims: set[int | None] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)
    layouts: set[str] = field(default_factory=set)


def split(asked: Unit) -> list[Unit]:
    """All dtypes and head dims are one binary, and its launches reach ragged rows, too."""
    return [replace(asked, ragged=True)]


def compile_unit(unit: Unit, cache: Path) -> list[dict[str, Any]]:
    """Compile a folder's kernels for an architecture; a row (``bench.static``) a kernel.

    Args:
        unit: of this backend, as :func:`split` made it.
        cache: a folder; what was compiled before, from the same sources, is taken from there.

    Raises:
        RuntimeError: a compiler's error, with its output.
    """
    listed, log = _nvcc(unit, cache)
    usage = machine_code.read_ptxas(log)
    code = machine_code.disassemble(listed)
    readable = demangled(usage)
    with tempfile.TemporaryDirectory() as folder:
        library = _link_recorder(unit, listed, Path(folder), cache)
        reached = _reached(unit, library)
    rows = []
    for name, used in usage.items():
        by = reached.get(name)
        elements = [e for e, cxx in _ELEMENTS.items() if re.search(rf"\b{cxx}\b", readable[name])]
        template = readable[name].partition("<")[2].partition(">(")[0]
        head_dim = next((d for d in unit.head_dims if re.search(rf"\b{d}\b", template)), None)
        dtype = elements[0] if len(elements) == 1 else _only(by.dtypes if by else set())
        if by is not None and head_dim is not None and head_dim not in by.head_dims:
            head_dim = _only(by.head_dims)
        rows.append(
            {
                "backend": "cuda",
                "room": unit.folder,
                "kernel": short(readable[name]),
                "head_dim": head_dim,
                "dtype": dtype,
                "products": None,  # the machine code has to tell
                "architecture": unit.architecture,
                "configuration": template,
                "layout": "/".join(sorted(by.layouts)) if by else "not launched",
                "threads": by.threads if by else None,
                "dynamic_shared": by.dynamic_shared if by else None,
                **machine_code.as_columns(used, code[name]),
                "code": [str(listed), name],
            }
        )
    return rows


def short(readable: str) -> str:
    """``void (anonymous namespace)::apply_kernel<64, float>(...)`` -> ``apply_kernel``."""
    head = readable.replace("(anonymous namespace)::", "")
    return re.sub(r"[<(].*", "", head).split()[-1]


def _only(values: Iterable[Any]) -> Any:
    """The one value there is; None for several, or for none."""
    found = list(values)
    return found[0] if len(found) == 1 else None


# ---- compiling -----------------------------------------------------------------------------------


def _nvcc(unit: Unit, cache: Path) -> tuple[Path, str]:
    """Compile ``cuda.cu``: the object, and what ptxas reported. It takes minutes: both are kept."""
    root = toolchains.cuda_root()
    if root is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")
    command = [str(root / "bin" / "nvcc"), "-std=c++17", *toolchains.NVCC_FLAGS]
    command += [f"-arch={unit.architecture}", "-Xptxas=-v", "-Xcompiler=-fPIC", "-c"]
    # In a file, since nvcc takes the commas of a -D for its own.
    wanted = (
        f"#define LINEAR_VIT_HEAD_DIMS {', '.join(map(str, unit.head_dims))}\n"
        f"#define LINEAR_VIT_ELEMENT_TYPES {', '.join(_ELEMENTS[d] for d in unit.dtypes)}\n"
    )
    asked = repr((command, wanted, toolchains.nvcc_version()))
    sources = [path for path in toolchains.CUDA.files(unit.folder) if path.suffix != ".cpp"]
    name = f"{unit.folder}-{unit.architecture}-{digest(asked, sources)}"
    target, log = cache / f"{name}.o", cache / f"{name}.log"
    if not (target.exists() and log.exists()):
        included, partial = cache / f"{name}.h", cache / f"{name}.{os.getpid()}.o"
        included.write_text(wanted)
        command += ["-include", str(included), str(launches.path(unit.folder) / "cuda.cu")]
        log.write_text(toolchains.run_tool([*command, "-o", str(partial)]).stderr)
        partial.replace(target)
    return target, log.read_text()


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled names to readable ones."""
    mangled = list(names)
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        raise FileNotFoundError("no c++filt: install binutils")
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    return dict(zip(mangled, done.stdout.splitlines(), strict=True))


# ---- launching -----------------------------------------------------------------------------------


def _reached(unit: Unit, library: Path) -> dict[str, Reached]:
    """Every kernel that the folder's operators launch, by its mangled name."""
    recorder = _Recorder(library, unit.architecture)
    found: dict[str, Reached] = {}
    dims: tuple[int | None, ...] = (None,)
    if launches.has_head_dims(unit.folder):
        dims = unit.head_dims
    properties = SimpleNamespace(
        multi_processor_count=machine_code.LIMITS[unit.architecture].multiprocessors
    )
    with (
        pretend_usable("cuda"),
        mock.patch.object(build, "load"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        torch.ops.load_library(library)
        for dtype, head_dim, ragged in itertools.product(unit.dtypes, dims, (False, True)):
            for exercise in launches.exercises(unit.folder, DTYPES[dtype], head_dim, ragged=ragged):
                exercise.run("cuda")
                for name, threads, shared in recorder.take():
                    seen = found.setdefault(name, Reached(threads, shared))
                    seen.threads = max(seen.threads, threads)
                    seen.dynamic_shared = max(seen.dynamic_shared, shared)
                    seen.head_dims.add(head_dim)
                    seen.dtypes.add(dtype)
                    seen.layouts.add(exercise.layout)
    return found


class _Recorder:
    """The runtime inside a recorder library, told which GPU it is."""

    def __init__(self, library: Path, architecture: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.launch_recorder_take.restype = ctypes.c_char_p
        limits = machine_code.LIMITS[architecture]
        capability = int(re.sub(r"\D", "", architecture))
        for attribute, value in {
            _MULTIPROCESSORS: limits.multiprocessors,
            _MAJOR: capability // 10,
            _MINOR: capability % 10,
            _WARP_SIZE: 32,
            _BLOCKS_PER_MULTIPROCESSOR: limits.blocks,
            _THREADS_PER_MULTIPROCESSOR: limits.threads,
            _SHARED_PER_BLOCK: 48 * machine_code.KIB,
            _SHARED_PER_MULTIPROCESSOR: limits.shared_memory,
            _SHARED_PER_BLOCK_OPTIN: limits.shared_memory_per_block,
        }.items():
            self._library.launch_recorder_set(attribute, value)

    def take(self) -> Iterator[tuple[str, int, int]]:
        """Name, threads and dynamic shared memory of each launch since the last call."""
        for line in self._library.launch_recorder_take().decode().splitlines():
            name, threads, shared, _ = line.split()
            yield name, int(threads), int(shared)


def _link_recorder(unit: Unit, kernels_object: Path, folder: Path, cache: Path) -> Path:
    """cuda.cpp for CPU tensors, the kernels' host code, and the recording runtime: a library."""
    prelude = HERE / "launch_recorder.h"
    headers = [*toolchains.CUDA.files(unit.folder), prelude]
    operators = _host_object(launches.path(unit.folder) / "cuda.cpp", prelude, headers, cache)
    runtime = _host_object(HERE / "launch_recorder.cpp", None, (), cache)
    library = folder / f"{unit.folder}-recorder.so"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    # -Bsymbolic: the runtime inside, not the libcudart that PyTorch has loaded.
    link = [*toolchains.cxx(), "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
    toolchains.run_tool(
        [*link, *map(str, (operators, runtime, kernels_object)), *libraries, "-o", str(library)]
    )
    return library


def _host_object(source: Path, prelude: Path | None, headers: Iterable[Path], cache: Path) -> Path:
    """Compile a C++ source; the object is kept under a name made of all it depends on."""
    from torch.utils import cpp_extension

    root = toolchains.cuda_root()
    assert root is not None
    made_of = digest(f"{torch.__version__} {root}", (source, *headers))
    target = cache / f"{source.stem}-{made_of}.o"
    if target.exists():
        return target
    # What these would declare is in launch_recorder.h.
    for name in ("CUDAGuard.h", "CUDAStream.h"):
        empty = cache / "empty" / "c10" / "cuda" / name
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    includes = [cache / "empty", root / "include", *map(Path, cpp_extension.include_paths())]
    command = [*toolchains.cxx(), "-std=c++20", "-O0", "-fPIC", *(f"-I{path}" for path in includes)]
    command += ["-include", str(prelude)] if prelude else []
    partial = target.with_suffix(f".{os.getpid()}")
    toolchains.run_tool([*command, "-c", str(source), "-o", str(partial)])
    partial.replace(target)
    return target
