"""What compiled code says of kernels from outside: the Triton and CUDA C++ of ``--kernels FILE``.

The function is run without a GPU, its launches left out. Triton's kernels are compiled as those of
this suite are. CUDA C++ is found where the file builds it, with ``torch.utils.cpp_extension.load``:
nothing is built, and nvcc compiles the ``.cu`` files that it names. What the file does otherwise
can't be seen.
"""

import contextlib
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from linear_vit.bench import problems
from linear_vit.bench.problems import DTYPES, NotOffered, make_problem
from linear_vit.bench.static import cuda, launches, machine_code, units
from linear_vit.bench.static.faults import Row, finished
from linear_vit.kernels import registry, toolchains
from linear_vit.options import load_module
from linear_vit.screen import counted

_CUDA = torch.device("cuda")


class _Built(Exception):
    """The kernel would have been built here."""


class _Offered(launches.Exercise):
    """Both passes, of which there may be the first alone."""

    def run(self, backend: str) -> None:
        with contextlib.suppress(NotOffered):
            super().run(backend)


class Nothing(ValueError):
    """There is nothing to compile in a file, for the reason in the message."""


def compile_files(
    files: Sequence[str],
    *,
    architectures: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """A row, as of ``bench.static``, for each kernel that the files' functions launch or build.

    Raises:
        Nothing: they do neither.
        units.Incomplete: a kernel does not compile; the message has the compiler's.
    """
    rows: list[Row] = []
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or 1, mp_context=context, max_tasks_per_child=1) as pool:
        pending = {
            architecture: pool.submit(compile_one, files, architecture, dtypes, head_dims)
            for architecture in architectures
        }
        for architecture, future in pending.items():
            try:
                found, failed = future.result()
            except ImportError as error:
                raise Nothing(str(error)) from error
            progress(f"{architecture}: {counted(len(found), 'kernel')}")
            rows += found
            failures += failed
    if failures:
        raise units.Incomplete("\n".join(dict.fromkeys(failures)), rows)
    if not rows:
        raise Nothing("no Triton kernel was launched, and no .cu file was to be built")
    return rows


def compile_one(
    files: Sequence[str], architecture: str, dtypes: Sequence[str], head_dims: Sequence[int]
) -> tuple[list[Row], list[str]]:
    """For one architecture: rows, and what failed. Runs in a process of its own."""
    built: dict[str, list[str]] = {}

    def build(name: str, sources: Any, *arguments: Any, **options: Any) -> None:
        paths = [sources] if isinstance(sources, str) else list(map(str, sources))
        flags = list(options.get("extra_cuda_cflags") or ())
        built.update({path: flags for path in paths if path.endswith(".cu")})
        raise _Built(name)

    units.cache_folder().mkdir(parents=True, exist_ok=True)
    with mock.patch("torch.utils.cpp_extension.load", build):
        for file in files:
            load_module(file)
        rows, failures = _of_triton(architecture, dtypes, head_dims)
    for path, flags in built.items():
        try:
            rows += _of_cuda(Path(path), flags, architecture)
        except (RuntimeError, OSError) as error:
            failures.append(f"{Path(path).name} {architecture}: {error}")
    return [finished(row) for row in rows], failures


# ---- Triton --------------------------------------------------------------------------------------


def _of_triton(
    architecture: str, dtypes: Sequence[str], head_dims: Sequence[int]
) -> tuple[list[Row], list[str]]:
    """What the registered functions launch, and why some of them can't be run so."""
    rows: list[Row] = []
    failures: list[str] = []
    for (op, name), entry in registry.all_registered().items():
        # Its tensors are on the CPU, since nothing is launched.
        registry.register(op, name, devices=("cpu",), replace=True)(entry.function)
        row = registry.operation(op)
        for dtype in dtypes:
            for head_dim in head_dims if row.has_head_dim else (None,):
                if entry.unusable and entry.unusable(_CUDA, DTYPES[dtype], head_dim):
                    continue
                try:
                    found = _launched(op, name, dtype, head_dim, architecture)
                except _Built:
                    continue
                except Exception as error:
                    lines = str(error).strip().splitlines() or ["no message"]
                    what = f"{name} {dtype} {architecture}"
                    failures.append(f"{what}: {type(error).__name__}: {lines[0]}")
                    continue
                rows += [{"backend": name, "room": row.family, **one} for one in found]
    return [row for number, row in enumerate(rows) if row not in rows[:number]], failures


def _launched(
    op: str, name: str, dtype: str, head_dim: int | None, architecture: str
) -> list[dict[str, Any]]:
    triton_ = _compiler()
    exercises = list(_exercises(op, dtype, head_dim))
    if triton_ is None:
        for exercise in exercises:
            exercise.run(name)
        return []
    found: list[dict[str, Any]] = triton_.compile_exercises(
        exercises, architecture, head_dim, units.cache_folder(), backend=name
    )
    return found


def _compiler() -> Any:
    try:
        from linear_vit.bench.static import triton
    except ImportError:
        return None
    return triton


def _exercises(op: str, dtype: str, head_dim: int | None) -> Iterator[launches.Exercise]:
    """Of few tokens and of many."""
    for shape in problems.operation(op).static_shapes(head_dim or 0, ragged=False):
        problem = make_problem(op, shape, DTYPES[dtype], torch.device("cpu"))
        yield _Offered(problem, launches.ALIGNED)


# ---- CUDA C++ ------------------------------------------------------------------------------------


def _of_cuda(source: Path, flags: Sequence[str], architecture: str) -> list[Row]:
    """Every kernel in a source: what nvcc makes of it, reached or not."""
    from torch.utils import cpp_extension

    root = toolchains.cuda_root()
    if root is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")
    command = [str(root / "bin" / "nvcc"), "-std=c++20", *toolchains.NVCC_FLAGS, *flags]
    command += [f"-arch={architecture}", "-Xptxas=-v", "-Xcompiler=-fPIC", "-c", str(source)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    # Kept, since --explain reads it again.
    made_of = units.digest(repr((command, toolchains.nvcc_version())), [source])
    target = units.cache_folder() / f"yours-{source.stem}-{made_of}.o"
    with tempfile.TemporaryDirectory(dir=units.cache_folder()) as folder:
        partial = Path(folder) / "kernels.o"
        done = toolchains.output_of([*command, "-o", str(partial)])
        if done.returncode != 0:
            raise RuntimeError(toolchains.first_error(done.stderr))
        partial.replace(target)
    code = machine_code.disassemble(target)
    usage = machine_code.read_ptxas(done.stderr)
    readable = cuda.demangled(usage)
    return [
        {
            "backend": "cuda",
            "room": source.name,
            "kernel": cuda.short(readable[name]),
            "head_dim": None,
            "dtype": _dtype(readable[name]),
            "products": None,
            "architecture": architecture,
            "configuration": readable[name].partition("<")[2].partition(">(")[0],
            "layout": "not launched",
            "threads": None,
            "dynamic_shared": None,
            **machine_code.as_columns(used, code[name]),
            "code": [str(target), name],
        }
        for name, used in usage.items()
    ]


def _dtype(readable: str) -> str | None:
    """The one element type in a kernel's parameters; None for several."""
    types = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
    found = [name for name, cxx in types.items() if re.search(rf"\b{cxx}\b", readable)]
    return found[0] if len(found) == 1 else None
