"""The compilers, and how the sources of each kind are compiled: a row a kind of extension.

A CPU extension holds its kernels (``cpu_simd.cpp``, and those that need a matrix unit,
``cpu_amx.cpp``) once per instruction set, and chooses when it
runs: what is built here is right on any machine of the same family. It compiles side by side, and
only its operators read PyTorch's headers: the stable ones, since all of PyTorch takes longer than
everything else here together.
"""

import contextlib
import functools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_KERNELS = Path(__file__).resolve().parent
NVCC_FLAGS = ("-O3",)
_CXX_FLAGS = ("-O2",)

_X86 = platform.machine() in ("x86_64", "AMD64")
_SIMD = "cpu_simd.cpp"
# It is C++ without PyTorch, compiled once per instruction set: a * b + c is one FMA.
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
if _X86 and sys.platform == "linux":  # the system has to be asked
    _OPERATOR_FLAGS += ("-DLINEAR_VIT_AMX",)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# Each with the file of its kernels, where an operation has that.
INSTRUCTION_SETS: dict[str, tuple[str, tuple[str, ...]]] = {"portable": (_SIMD, ())}
if _X86:
    INSTRUCTION_SETS |= {"avx2": (_SIMD, _AVX2), "avx512": (_SIMD, _AVX2 + _AVX512)}
if "-DLINEAR_VIT_AMX" in _OPERATOR_FLAGS:
    INSTRUCTION_SETS["amx"] = ("cpu_amx.cpp", (*_AVX2, *_AVX512, "-mavx512bf16"))
# What an older compiler or assembler may not know: where it refuses this, the set is left out.
_NEWER = {"amx": 'asm("tdpbf16ps %tmm2, %tmm1, %tmm0; vcvtne2ps2bf16 %zmm2, %zmm1, %zmm0");\n'}


@dataclass(frozen=True)
class Extension:
    """How the sources of a backend become a library.

    Attributes:
        label: in messages, "CPU" or "CUDA".
        sources: what an operation's folder calls them; a folder without the first has none.
        headers: patterns, from the operation's folder, of what else they are made of.
        takes: in messages, how long a build takes.
        no_device: why it can't be used on a device.
        no_toolchain: why nothing can be built here.
        architectures: what to build for by default, of a device.
        environment: around all builds for some architectures.
        commands: all that decides what comes out, beside sources and architectures.
        compile: folder of the sources, library to make in a folder of its own, flags.
    """

    label: str
    sources: tuple[str, str]
    headers: tuple[str, ...]
    takes: str
    no_device: Callable[[torch.device], str | None]
    no_toolchain: Callable[[], str | None]
    architectures: Callable[[torch.device], tuple[str, ...]]
    environment: Callable[[Sequence[str]], AbstractContextManager[None]]
    commands: Callable[[], tuple[str, ...]]
    compile: Callable[[Path, Path, Sequence[str]], None]

    def families(self) -> tuple[str, ...]:
        """The folders of operations that have such sources."""
        return tuple(sorted(path.parent.name for path in _KERNELS.glob(f"*/{self.sources[0]}")))

    def files(self, family: str) -> list[Path]:
        """All that a folder's library is made of, each file once."""
        patterns = (*self.sources, *self.headers)
        return sorted({p for pattern in patterns for p in (_KERNELS / family).glob(pattern)})


# ---- the compilers -------------------------------------------------------------------------------


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
        answer = output_of(command)
        top = re.search(r"^#\$ TOP=(.*)$", answer.stderr + answer.stdout, re.MULTILINE)
        if top is not None:
            return Path(top.group(1).strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").is_file() else None


@functools.cache
def nvcc_version() -> tuple[int, int] | None:
    """(13, 0) and the like; None where there is no nvcc."""
    root = cuda_root()
    if root is None:
        return None
    command = [str(root / "bin" / "nvcc"), "--version"]
    found = re.search(r"release (\d+)\.(\d+)", output_of(command).stdout)
    return (int(found.group(1)), int(found.group(2))) if found else None


@functools.cache
def no_cuda_toolchain() -> str | None:
    """Why no CUDA can be built here, or None."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of torch"
    torch_major = torch.version.cuda.split(".")[0]
    wanted = f"install the CUDA {torch_major} toolkit, or set CUDA_HOME to its folder"
    version = nvcc_version()
    if version is None:
        return f"building the CUDA extension needs nvcc: {wanted}"
    if str(version[0]) != torch_major:
        return (
            f"nvcc is of CUDA {version[0]}.{version[1]} but this PyTorch of CUDA "
            f"{torch.version.cuda}: {wanted}"
        )
    if shutil.which("ninja", path=_path_with_ninja()) is None:
        return "building the CUDA extension needs ninja: pip install ninja"
    return _no_cxx("CUDA")


def no_cpp_toolchain() -> str | None:
    """Why no C++ for the CPU can be built here, or None."""
    return _no_cxx("CPU")


def _no_cxx(label: str) -> str | None:
    compiler = cxx()
    if shutil.which(compiler[0]) is None:
        return (
            f"building the {label} extension needs a C++ compiler, no {' '.join(compiler)}: "
            "install g++"
        )
    return None


def cxx() -> tuple[str, ...]:
    """The C++ compiler's command, as cpp_extension takes it; a CXX set to nothing is as none."""
    return tuple(os.environ.get("CXX", "").split()) or ("c++",)


def fingerprint() -> str:
    """What the compilers are: another text where one of them was installed, replaced or removed."""
    root = cuda_root()
    nvcc = str(root / "bin" / "nvcc") if root else None
    path = _path_with_ninja()
    found = [shutil.which(tool, path=path) for tool in (cxx()[0], nvcc, "ninja") if tool]
    stats = [(tool, os.stat(tool)) for tool in found if tool]
    return " ".join(f"{tool}:{stat.st_size}:{stat.st_mtime_ns}" for tool, stat in stats)


def output_of(
    command: Sequence[str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool, in a folder, and read what it says, in whatever encoding it says it."""
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def run_tool(
    command: Sequence[str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """:func:`output_of` a tool that has to do its work: RuntimeError, with its words, if not."""
    done = output_of(command, folder)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr[-4000:]}")
    return done


def _path_with_ninja() -> str:
    """PATH, and the folder of this Python: an environment's ninja is there, activated or not."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


# ---- CUDA ----------------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """The compute capability to build for: ``"8.6"``, and ``"9.0a"`` where features need the a."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "")


def _no_cuda_device(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of torch"
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device here (torch.cuda.is_available() is False): use a machine with one"
    return None


@contextlib.contextmanager
def _cuda_environment(architectures: Sequence[str]) -> Iterator[None]:
    """What cpp_extension reads from the environment and from its own globals, for a while."""
    root = str(cuda_root())
    changed = {
        "CUDA_HOME": root,
        "PATH": _path_with_ninja(),
        "CXX": " ".join(cxx()),
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


def _compile_cuda(sources: Path, library: Path, flags: Sequence[str]) -> None:
    from torch.utils import cpp_extension

    # cpp_extension's own lock file outlives a killed build, and would be waited for for ever.
    (library.parent / "lock").unlink(missing_ok=True)
    cpp_extension.load(
        library.stem,
        [str(sources / source) for source in CUDA.sources],
        extra_cflags=[*_CXX_FLAGS, *flags],
        extra_cuda_cflags=[*NVCC_FLAGS, *flags],
        build_directory=str(library.parent),
        is_python_module=False,
    )


# ---- C++ for the CPU -----------------------------------------------------------------------------


def _compile_cpu(sources: Path, library: Path, flags: Sequence[str]) -> None:
    """Operators and, once per instruction set, kernels: side by side, then linked.

    With cpp_extension's paths and flags but not its ninja, which knows one set of flags for all
    sources, so that the kernels would have to be there before it begins.
    """
    cpp_extension = _quiet_cpp_extension()
    compile_operators = [*_OPERATOR_FLAGS, str(sources / CPU.sources[0])]
    compile_operators += [f"-I{path}" for path in cpp_extension.include_paths()]
    compile_operators += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    objects = {"operators": compile_operators}
    objects |= {
        name: [*_SIMD_FLAGS, *own, str(sources / source)]
        for name, (source, own) in INSTRUCTION_SETS.items()
        if (sources / source).exists()
    }

    def make(name: str) -> str | None:
        target = str(library.parent / f"{name}.o")
        without(library, name).unlink(missing_ok=True)
        try:
            _run_cxx([*objects[name], *flags, "-c", "-o", target])
        except RuntimeError:
            refusal = _refusal(name, library.parent)
            if refusal is None:
                raise
            without(library, name).write_text(refusal)
            return None
        return target

    with ThreadPoolExecutor(len(objects)) as pool:
        made = [target for target in pool.map(make, objects) if target is not None]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch"]
    # A name of its own first: a killed link leaves no library that looks whole.
    unfinished = str(library.parent / "unfinished.so")
    _run_cxx(["-shared", *flags, *made, *libraries, "-o", unfinished])
    os.replace(unfinished, library)


def without(library: Path, instruction_set: str) -> Path:
    """The file with the reason, in one line, where an instruction set is not in the library."""
    return library.with_name(f"without_{instruction_set}.txt")


def _refusal(instruction_set: str, folder: Path) -> str | None:
    """What the compiler says to an instruction set's newest instructions, if it refuses them."""
    if instruction_set not in _NEWER:
        return None
    probe = folder / f"probe_{instruction_set}.cpp"
    probe.write_text(_NEWER[instruction_set])
    try:
        own = INSTRUCTION_SETS[instruction_set][1]
        _run_cxx([*own, "-c", str(probe), "-o", str(probe.with_suffix(".o"))])
    except RuntimeError as error:
        return first_error(str(error))
    return None


def first_error(message: str) -> str:
    """One line of what a compiler said."""
    lines = message.splitlines() or ["no message"]
    first = next(
        (line for line in lines if re.search(r"\b(fatal )?error\s*:", line, re.I)), lines[0]
    )
    return first.strip()[:200]


def _run_cxx(arguments: Sequence[str]) -> None:
    command = [*cxx(), *arguments]
    done = output_of(command)
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


CUDA = Extension(
    label="CUDA",
    sources=("cuda.cpp", "cuda.cu"),
    headers=("cuda.h", "tiles.h", "*.cuh", "../cuda/*", "../*.h"),
    takes="once, minutes",
    no_device=_no_cuda_device,
    no_toolchain=no_cuda_toolchain,
    architectures=lambda device: (architecture(device),),
    environment=_cuda_environment,
    commands=lambda: (*_CXX_FLAGS, *NVCC_FLAGS),
    compile=_compile_cuda,
)
CPU = Extension(
    label="CPU",
    sources=("cpu.cpp", _SIMD),
    headers=("cpu.h", "cpu_amx*", "../cpu/*", "../element_type.h"),
    takes="once, seconds",
    no_device=lambda device: (
        None if device.type == "cpu" else f"C++ kernels run on the CPU, not on {device.type}"
    ),
    no_toolchain=no_cpp_toolchain,
    architectures=lambda device: (),
    environment=lambda architectures: contextlib.nullcontext(),
    commands=lambda: (
        *_SIMD_FLAGS,
        *_OPERATOR_FLAGS,
        *(flag for _, flags in INSTRUCTION_SETS.values() for flag in flags),
        *cxx(),
    ),
    compile=_compile_cpu,
)
# Backend -> its extensions.
EXTENSIONS = {"cuda": CUDA, "cpu": CPU}
