"""Builds and loads the C++ and CUDA sources, once per machine, and says so.

    python -m kernels.build                     # for the GPU in this machine; times the kernel
    python -m kernels.build --arch 8.0,9.0a     # ahead of time, for any GPU

Each room (operation) with a ``cuda.cu`` is one extension, and each with a ``cpu.cpp`` another,
built with ``torch.utils.cpp_extension`` at first use into PyTorch's extensions folder
(``TORCH_EXTENSIONS_DIR``, by default in the user's cache) under a name made of a hash of its
sources, flags, architectures and PyTorch's version. So a rebuild happens when one of these changes,
and never otherwise.

A CPU extension holds its kernels (``cpu_simd.cpp``) once per instruction set, and chooses when it
runs: what is built here is right on any machine of the same family. It compiles side by side, and
only its operators read PyTorch's headers: the stable ones, since all of PyTorch takes longer than
everything else here together.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_KERNELS = Path(__file__).resolve().parent
# Backend -> the rooms that have its sources, and what a room's sources are called.
_ROOMS = {
    "cuda": ("linear_attention", "softmax_attention", "ripple"),
    "cpu": ("linear_attention", "ripple"),
}
_SOURCES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda.cpp", "cuda.cu"),
    "cpu": ("cpu.cpp", "cpu_simd.cpp"),
}
_HEADERS = {
    "cuda": ("cuda.h", "tiles.h", "*.cuh", "../cuda/*", "../*.h"),
    "cpu": ("cpu.h", "../cpu/*", "../element_type.h"),
}
_LABELS = {"cuda": "CUDA", "cpu": "CPU"}
_CXX_FLAGS = ("-O2",)
_NVCC_FLAGS = ("-O3",)

_X86 = platform.machine() in ("x86_64", "AMD64")
# cpu_simd.cpp is C++ without PyTorch, compiled once per instruction set: a * b + c is one FMA.
_SIMD_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)
# cpu.cpp only shares the work out: -O1.
_OPERATOR_FLAGS: tuple[str, ...] = ("-std=c++20", "-O1", "-fPIC")
if _X86:
    _OPERATOR_FLAGS += ("-DLINEAR_VIT_X86",)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"portable": ()}
if _X86:
    _INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX2 + _AVX512}

_loaded: set[tuple[str, str]] = set()
_failures: dict[tuple[str, str], str] = {}


class BuildError(RuntimeError):
    """The extension could not be built; the message is one line, with the reason and the log."""


# ---- what the rest of the package asks -----------------------------------------------------------


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why the backend's extension can't be used on the device, in one line with the remedy.

    Compiles nothing, and is cheap to ask again.

    Returns:
        None if it is built, or can be expected to build.
    """
    if backend not in _ROOMS:
        raise ValueError(f"unknown extension {backend!r}: there are {', '.join(_ROOMS)}")
    reason = _no_device(backend, device)
    if reason is not None:
        return reason
    architectures = _architectures(backend, device)
    rooms = _ROOMS[backend]
    folders = {room: _folder(backend, room, architectures) for room in rooms}
    for room, folder in folders.items():
        failure = _failures.get((backend, room)) or _earlier_failure(folder)
        if failure is not None:
            return failure
    if all((folder / "complete").exists() for folder in folders.values()):
        return None
    return _no_toolchain_for(backend)


def load(
    backend: str,
    room: str | None = None,
    *,
    architectures: Sequence[str] | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Load the extension, which defines ``torch.ops.linear_vit.<backend>_…``; build it if need be.

    Two processes may do this at once: one builds, the other waits.

    Args:
        backend: ``"cuda"`` or ``"cpu"``.
        room: the operation's folder; None for all of them, built side by side.
        architectures: compute capabilities like ``"9.0a"``; that of the current device by default.
            Of no meaning for ``"cpu"``.
        flags: more for the compiler, as ``-DLINEAR_VIT_HEAD_DIMS=64``.

    Raises:
        BuildError: it does not build; :func:`unavailable` gives the same reason from then on.
    """
    if backend not in _ROOMS:
        raise ValueError(f"unknown extension {backend!r}: there are {', '.join(_ROOMS)}")
    wanted = _ROOMS[backend] if room is None else (room,)
    rooms = [r for r in wanted if (backend, r) not in _loaded]
    if not rooms:
        return
    if architectures is None:
        architectures = _architectures(backend, torch.device(backend))
    folders = {r: _folder(backend, r, architectures, flags) for r in rooms}
    pending = [r for r in rooms if not (folders[r] / "complete").exists()]
    if pending:
        reason = _no_toolchain_for(backend)
        if reason is not None:
            raise BuildError(reason)
        cuda = backend == "cuda"
        environment = _build_environment(architectures) if cuda else contextlib.nullcontext()
        with environment, ThreadPoolExecutor(len(pending)) as pool:
            list(pool.map(lambda r: _build(backend, r, folders[r], architectures, flags), pending))
    for r, folder in folders.items():
        torch.ops.load_library(_library(folder))
        _loaded.add((backend, r))


def architecture(device: torch.device) -> str:
    """The compute capability to build for: ``"8.6"``, and ``"9.0a"`` where features need the a."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "")


def _architectures(backend: str, device: torch.device) -> tuple[str, ...]:
    return (architecture(device),) if backend == "cuda" else ()


# ---- the toolchain -------------------------------------------------------------------------------


@functools.cache
def cuda_root() -> Path | None:
    """The CUDA toolkit's folder, or None.

    ``CUDA_HOME`` if it holds an nvcc, else where the nvcc on PATH says it lives: that one may be a
    wrapper script in a folder with no toolkit around it.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = Path(os.environ.get(variable, ""), "bin", "nvcc")
        if os.environ.get(variable) and root.is_file():
            return root.parent.parent
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.*)$", answer.stderr + answer.stdout, re.MULTILINE)
        if top is not None:
            return Path(top.group(1).strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").is_file() else None


@functools.cache
def _nvcc_version() -> tuple[int, int] | None:
    root = cuda_root()
    if root is None:
        return None
    command = [str(root / "bin" / "nvcc"), "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _no_device(backend: str, device: torch.device) -> str | None:
    if backend == "cpu":
        return None if device.type == "cpu" else f"C++ kernels run on the CPU, not on {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of torch"
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device here (torch.cuda.is_available() is False): use a machine with one"
    return None


def _no_toolchain_for(backend: str) -> str | None:
    """Why nothing can be built here, or None."""
    return _no_toolchain() if backend == "cuda" else _no_cpp_toolchain("CPU")


@functools.cache
def _no_toolchain() -> str | None:
    """Why no CUDA can be built here, or None."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of torch"
    torch_major = torch.version.cuda.split(".")[0]
    wanted = f"install the CUDA {torch_major} toolkit, or set CUDA_HOME to its folder"
    version = _nvcc_version()
    if version is None:
        return f"building the CUDA extension needs nvcc: {wanted}"
    if str(version[0]) != torch_major:
        return (
            f"nvcc is of CUDA {version[0]}.{version[1]} but this PyTorch of CUDA "
            f"{torch.version.cuda}: {wanted}"
        )
    if shutil.which("ninja", path=_path_with_ninja()) is None:
        return "building the CUDA extension needs ninja: pip install ninja"
    return _no_cpp_toolchain("CUDA")


def _no_cpp_toolchain(label: str) -> str | None:
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        return (
            f"building the {label} extension needs a C++ compiler, no {' '.join(compiler)}: "
            "install g++"
        )
    return None


def _compiler() -> list[str]:
    """The C++ compiler's command, as cpp_extension takes it."""
    return os.environ.get("CXX", "c++").split()


def _path_with_ninja() -> str:
    """PATH, and the folder of this Python: an environment's ninja is there, activated or not."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


# ---- building ------------------------------------------------------------------------------------


def _folder(
    backend: str, room: str, architectures: Sequence[str], flags: Sequence[str] = ()
) -> Path:
    """Where the extension of these sources and flags is, or will be: <name>_<hash>."""
    digest = hashlib.sha256()
    patterns = (*_SOURCES[backend], *_HEADERS[backend])
    for path in sorted(p for pattern in patterns for p in (_KERNELS / room).glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    own = (*_SIMD_FLAGS, *_OPERATOR_FLAGS, *_INSTRUCTION_SETS, *_compiler())
    if backend == "cuda":
        own = (*_CXX_FLAGS, *_NVCC_FLAGS)
    key = (torch.__version__, *own, *flags, *architectures)
    digest.update("\0".join(key).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return root / f"linear_vit_{backend}_{room}_{digest.hexdigest()[:16]}"


def _build(
    backend: str, room: str, folder: Path, architectures: Sequence[str], flags: Sequence[str]
) -> None:
    """Build one room's extension into its folder; the marker ``complete`` says that it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = os.open(folder / "linear_vit.lock", os.O_CREAT | os.O_WRONLY)
    except OSError as error:
        raise BuildError(
            f"can't write the {_LABELS[backend]} extension to {folder} ({error.strerror}): set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # the system lets go of it if this process is killed
        if not (folder / "complete").exists():
            _compile(backend, room, folder, architectures, flags)
            (folder / "complete").touch()
    finally:
        os.close(lock_file)


def _compile(
    backend: str, room: str, folder: Path, architectures: Sequence[str], flags: Sequence[str]
) -> None:
    what = f"{room}'s {_LABELS[backend]} extension"
    target = f" for {', '.join(architectures)} (once, minutes)" if architectures else ""
    _say(f"building {what}{target or ' (once, seconds)'} ...")
    start = time.perf_counter()
    try:
        if backend == "cuda":
            _compile_cuda(room, folder, flags)
        else:
            _compile_cpu(room, folder, flags)
    except Exception as error:  # a compiler's message, or whatever linking and loading raised
        log = folder / "build.log"
        log.write_text(str(error))
        _failures[backend, room] = _describe_failure(log)
        raise BuildError(_failures[backend, room]) from error
    _say(f"built {what} in {time.perf_counter() - start:.0f} s")


def _library(folder: Path) -> Path:
    return folder / f"{folder.name.rpartition('_')[0]}.so"


def _compile_cuda(room: str, folder: Path, flags: Sequence[str]) -> None:
    from torch.utils import cpp_extension

    # cpp_extension's own lock file outlives a killed build, and would be waited for for ever.
    (folder / "lock").unlink(missing_ok=True)
    cpp_extension.load(
        _library(folder).stem,
        [str(_KERNELS / room / source) for source in _SOURCES["cuda"]],
        extra_cflags=[*_CXX_FLAGS, *flags],
        extra_cuda_cflags=[*_NVCC_FLAGS, *flags],
        build_directory=str(folder),
        is_python_module=False,
    )


def _compile_cpu(room: str, folder: Path, flags: Sequence[str]) -> None:
    """Operators and, once per instruction set, kernels: side by side, then linked.

    With cpp_extension's paths and flags but not its ninja, which knows one set of flags for all
    sources, so that the kernels would have to be there before it begins.
    """
    cpp_extension = _quiet_cpp_extension()
    operators, simd = (str(_KERNELS / room / source) for source in _SOURCES["cpu"])
    compile_operators = [*_OPERATOR_FLAGS, operators]
    compile_operators += [f"-I{path}" for path in cpp_extension.include_paths()]
    compile_operators += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    sources = {"operators": compile_operators}
    sources |= {name: [*_SIMD_FLAGS, *own, simd] for name, own in _INSTRUCTION_SETS.items()}
    objects = {name: str(folder / f"{name}.o") for name in sources}

    with ThreadPoolExecutor(len(sources)) as pool:
        commands = [[*own, *flags, "-c", "-o", objects[name]] for name, own in sources.items()]
        list(pool.map(_run_compiler, commands))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch"]
    # A name of its own first: a killed link leaves no library that looks whole.
    unfinished = str(folder / "unfinished.so")
    _run_compiler(["-shared", *flags, *objects.values(), *libraries, "-o", unfinished])
    os.replace(unfinished, _library(folder))


def _run_compiler(arguments: Sequence[str]) -> None:
    command = [*_compiler(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{done.stderr}\n{' '.join(command)} failed ({done.returncode})")


def _quiet_cpp_extension() -> Any:
    """The module, whose import warns where there is CUDA and no GPU: no concern of the CPU's."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before, logger.disabled = logger.disabled, True
    try:
        from torch.utils import cpp_extension
    finally:
        logger.disabled = before
    return cpp_extension


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _earlier_failure(folder: Path) -> str | None:
    log = folder / "build.log"
    if (folder / "complete").exists() or not log.exists():
        return None
    return _describe_failure(log)


def _describe_failure(log: Path) -> str:
    """One line of a build's log: the first error, and what to do."""
    label = next(text for name, text in _LABELS.items() if f"linear_vit_{name}_" in log.parent.name)
    lines = log.read_text().splitlines() or ["no message"]
    first = next((line for line in lines if re.search(r"\berror\s*:|\bfatal\s*:", line)), lines[0])
    return (
        f"building the {label} extension failed: {first.strip()[:200]} (all of it in {log}; delete "
        f"{log.parent} to try again)"
    )


@contextlib.contextmanager
def _build_environment(architectures: Sequence[str]) -> Iterator[None]:
    """What cpp_extension reads from the environment and from its own globals, for a while."""
    root = str(cuda_root())
    changed = {
        "CUDA_HOME": root,
        "PATH": _path_with_ninja(),
        "TORCH_CUDA_ARCH_LIST": ";".join(architectures),
    }
    saved = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    from torch.utils import cpp_extension

    saved_home, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, root
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = saved_home
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- python -m kernels.build -----------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Build ahead of time; where there is a device, time the standalone kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.build",
        description="Build the CUDA extension ahead of time; on a GPU, time linear attention.",
    )
    parser.add_argument(
        "--arch",
        help="compute capabilities to build for, like 8.0,9.0a (default: this machine's GPU)",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)

    reason = _no_toolchain()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    has_device = torch.cuda.is_available()
    if options.arch is not None:
        architectures = tuple(a.strip() for a in options.arch.split(","))
        wrong = [a for a in architectures if not re.fullmatch(r"\d+\.\d[af]?", a)]
        if wrong:
            parser.error(f"--arch takes compute capabilities like 8.0,9.0a, got {wrong[0]!r}")
    elif has_device:
        architectures = (architecture(torch.device("cuda")),)
    else:
        architectures = ("9.0a",)
        print("no CUDA device here: building for 9.0a (choose with --arch)")

    version = _nvcc_version()
    assert version is not None
    print(f"nvcc {version[0]}.{version[1]} in {cuda_root()}, PyTorch {torch.__version__}")
    try:
        load("cuda", architectures=architectures)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for room in _ROOMS["cuda"]:
        print(f"loaded {_folder('cuda', room, architectures)}")
    if not has_device:
        print("built, linked and loaded; timing it needs a CUDA device")
        return 0
    if options.arch is not None and architecture(torch.device("cuda")) not in architectures:
        print(f"not built for this machine's GPU ({torch.cuda.get_device_name()}): not timed")
        return 0
    shape = (options.batch, options.heads, options.tokens, options.head_dim)
    return _time_linear_attention(shape, getattr(torch, options.dtype))


def _time_linear_attention(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Print PyTorch's time, the kernel's and their ratio, having checked both results."""
    from linear_vit import kernels
    from linear_vit.kernels.accuracy import compare

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(3)
    )
    expected = kernels.linear_attention(q.double(), k.double(), v.double(), backend="reference")
    times = {}
    for backend in ("torch", "cuda"):
        run = functools.partial(kernels.linear_attention, q, k, v, backend=backend)
        accuracy = compare(run(), expected, gradient=False)
        if not accuracy.passed:
            print(f"backend {backend} is wrong on {shape}: {accuracy}", file=sys.stderr)
            return 1
        times[backend] = _median_milliseconds(run)
    print(f"PyTorch time: {times['torch']:.3f} ms")
    print(f"CUDA kernel time: {times['cuda']:.3f} ms")
    print(f"Speed-up: {times['torch'] / times['cuda']:.2f}x")
    return 0


def _median_milliseconds(run: Callable[[], object], warm_up: int = 10, rounds: int = 50) -> float:
    """Median device time of a call, by events. The calls queue up, so the host is not timed."""
    for _ in range(warm_up):
        run()
    torch.cuda.synchronize()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


if __name__ == "__main__":
    sys.exit(main())
