"""The C++ sources for the CPU build once, say so, fail with a reason, and pass the sanitizers."""

import ctypes
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from linear_vit import kernels
from linear_vit.kernels import OPERATIONS, build, toolchains
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
needs_toolchain = pytest.mark.skipif(
    toolchains.no_cpp_toolchain() is not None, reason=str(toolchains.no_cpp_toolchain())
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return processes.python("-c", code, **environment)


@needs_toolchain
@pytest.mark.parametrize("op", OPERATIONS)
def test_it_builds_here(op: str) -> None:
    """Where there is a compiler. Else all tests of its kernels were skipped, and nothing failed."""
    reason = kernels.backends(op, "cpu", head_dim=64)["cpu"]
    assert "building the CPU extension failed" not in (reason or "")


def test_a_missing_compiler_is_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    done = python(
        "import kernels, torch\n"
        "print(kernels.backends('linear_attention', 'cpu')['cpu'])\n"
        "q = torch.randn(1, 2, 5, 16); print(kernels.linear_attention(q, q, q).shape)\n"
        "kernels.linear_attention(q, q, q, backend='cpu')",
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        CXX="no-such-compiler",
    )
    assert "building the CPU extension needs a C++ compiler, no no-such-compiler" in done.stdout
    assert "torch.Size([1, 2, 5, 16])" in done.stdout
    assert "ValueError: backend 'cpu' can't run linear_attention on cpu: building" in done.stderr


def test_it_is_for_the_cpu() -> None:
    reason = build.unavailable("cpu", torch.device("cuda"))
    assert reason is not None
    assert "C++ kernels run on the CPU, not on cuda" in reason


@needs_toolchain
def test_a_failed_build_is_remembered_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(build, "_loaded", {})
    flags = ("-include", "no_such_header.h")
    with pytest.raises(build.BuildError, match=r"no_such_header\.h: No such file") as caught:
        build.load("cpu", "ripple", flags=flags)
    message = str(caught.value)
    assert message.startswith("building the CPU extension failed: ")
    assert "\n" not in message
    log = re.search(r"all of it in (\S+);", message)
    assert log is not None
    assert "error" in Path(log.group(1)).read_text()
    assert build.unavailable("cpu", CPU) == message
    folder = build.folder_of("cpu", "ripple", (), flags)
    assert build.earlier_failure(folder) == message  # in a later process too
    # Another compiler, or an hour later: what went wrong may have passed.
    with monkeypatch.context() as changed:
        changed.setattr(build, "fingerprint", lambda: "another compiler")
        assert build.earlier_failure(folder) is None
    an_hour_ago = time.time() - build.RETRY_S - 1
    os.utime(folder / "build.log", (an_hour_ago, an_hour_ago))
    assert build.earlier_failure(folder) is None


def fake_compiler(tmp_path: Path, script: str) -> str:
    compiler = tmp_path / "fake-c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_what_runs_in_its_place_is_said_once(tmp_path: Path) -> None:
    """A compiler that is killed, and says so in bytes that are no text."""
    compiler = fake_compiler(tmp_path, "printf 'fatal error: \\377 Killed signal' >&2; exit 1")
    done = python(
        "import kernels, torch; q = torch.randn(1, 2, 5, 16)\n"
        "kernels.linear_attention(q, q, q)\n"
        "kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3), axis=0)\n"
        "print(kernels.default_backend('linear_attention', 'cpu'))",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "built"),
        CXX=compiler,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != "cpu"
    said = re.findall(r"(\w+) runs in place of cpu: (.*)", done.stderr)
    assert len(said) == 1, done.stderr
    assert said[0][0] == done.stdout.strip()
    assert "Killed signal" in said[0][1]


def test_a_library_that_does_not_load_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(build, "_loaded", {})
    folder = build.folder_of("cpu", "ripple", ())
    folder.mkdir(parents=True)
    (folder / "linear_vit_cpu_ripple.so").write_bytes(b"half a library")
    (folder / "complete").touch()
    with pytest.raises(build.BuildError, match=r"loading ripple's CPU extension failed: .*delete"):
        build.load("cpu", "ripple")
    assert "delete" in (build.failure("cpu") or "")


@needs_toolchain
@pytest.mark.slow
def test_it_builds_once(tmp_path: Path) -> None:
    code = (
        "import kernels, torch; x = torch.randn(1, 4, 4, 8); w = torch.randn(8, 3, 3)\n"
        "print(kernels.ripple_pool(x, w, axis=0).shape)"
    )
    first = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr[-4000:]
    assert "building ripple's CPU extension (once, seconds) ..." in first.stderr
    assert "built ripple's CPU extension in" in first.stderr
    second = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert second.returncode == 0, second.stderr[-4000:]
    assert "building" not in second.stderr
    assert second.stdout == first.stdout


# ---- a toolchain from before the matrix unit -----------------------------------------------------

needs_amx = pytest.mark.skipif(
    "amx" not in toolchains.INSTRUCTION_SETS, reason="AMX kernels are built on x86 Linux"
)


@pytest.fixture
def old_assembler(tmp_path: Path) -> str:
    """A compiler command with an assembler that knows all but the products of tiles."""
    compiler, assembler = (shutil.which(tool) for tool in ("g++", "as"))
    if compiler is None or assembler is None:
        pytest.skip("needs g++, which can be told where its assembler is")
    folder = tmp_path / "old"
    folder.mkdir()
    script = folder / "as"
    script.write_text(
        "#!/bin/sh\n"
        "for last; do :; done\n"
        'if grep -q tdpbf16ps "$last"; then\n'
        """  echo "$last:7: Error: no such instruction: \\`tdpbf16ps'" >&2; exit 1\n"""
        f'fi\nexec {assembler} "$@"\n'
    )
    script.chmod(0o755)
    return f"{compiler} -B{folder}/"


AMX_SOURCES = {
    "cpu.cpp": "int amx() __attribute__((weak)); int with() { return amx != nullptr; }",
    "cpu_simd.cpp": "",
    "cpu_amx.cpp": 'int amx() { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); return 1; }',
}


def small_library(folder: Path, **changed: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (AMX_SOURCES | changed).items():
        (folder / name).write_text(text)
    library = folder / "small.so"
    toolchains.CPU.compile(folder, library, ())
    return library


@needs_amx
@needs_toolchain
def test_an_instruction_set_that_the_assembler_refuses_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old_assembler: str
) -> None:
    def has_amx(library: Path) -> bool:
        return bool(ctypes.CDLL(str(library))._Z4withv())

    new = small_library(tmp_path / "new")
    assert has_amx(new)
    assert not toolchains.without(new, "amx").exists()

    monkeypatch.setenv("CXX", old_assembler)
    old = small_library(tmp_path / "old_one")
    reason = toolchains.without(old, "amx")
    assert not has_amx(old)
    assert "Error: no such instruction: `tdpbf16ps'" in reason.read_text()
    assert "\n" not in reason.read_text()

    monkeypatch.delenv("CXX")
    small_library(tmp_path / "old_one")
    assert not reason.exists()


@needs_amx
@needs_toolchain
def test_a_mistake_in_its_source_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cpu_amx\.cpp.*error"):
        small_library(tmp_path, **{"cpu_amx.cpp": "int amx() { return nothing; }"})


WITHOUT_AMX = """
import os, torch
from linear_vit import kernels
q = torch.randn(1, 2, 70, 64)
exact = kernels.linear_attention(q, q, q, backend="torch")
half = kernels.linear_attention(*[q.bfloat16()] * 3, backend="cpu")
print("error", ((half - exact).norm() / exact.norm()).item())
print(kernels.backends("linear_attention", "cpu")["cpu"])
print(kernels.implementation("linear_attention", "cpu"))
os.environ["LINEAR_VIT_CPU"] = "amx"
try:
    kernels.linear_attention(*[q.bfloat16()] * 3, backend="cpu")
except RuntimeError as error:
    print("refused:", error)
"""


@needs_amx
@needs_toolchain
@pytest.mark.slow
def test_without_amx_the_others_run(tmp_path: Path, old_assembler: str) -> None:
    built = str(tmp_path / "built")
    done = python(WITHOUT_AMX, TORCH_EXTENSIONS_DIR=built, CXX=old_assembler, LINEAR_VIT_CPU="")
    assert done.returncode == 0, done.stderr[-4000:]
    error, usable, implementation, refused = done.stdout.splitlines()
    assert float(error.split()[1]) < 0.01
    assert usable == "None"
    assert re.search(r"threads?; was built without AMX: .*no such instruction", implementation)
    assert "was built without AMX" in done.stderr
    assert "LINEAR_VIT_CPU is 'amx', which is not one of those" in refused


# Every kernel of every instruction set, on sizes that end inside a block and inside a vector.
# Memory comes filled with NaNs: a result made of what nobody has written is not finite. Reading
# past a block's last token is an error too (`hide` in simd.h).
SANITIZED = """
import os, sys
import torch
from linear_vit.kernels import build
from tests.kernels import tiles

flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")
for family in ("linear_attention", "ripple"):
    build.load("cpu", family, flags=flags)
ops = torch.ops.linear_vit
torch.set_num_threads(2)
ran = []


def check(*results):
    assert all(x.isfinite().all() for x in results), [x.isfinite().all() for x in results]
    return results if len(results) > 1 else results[0]


assert torch.empty(1000).isnan().all()
for name in ("amx", "avx512", "avx2", "portable"):
    os.environ["LINEAR_VIT_CPU"] = name
    try:
        ran.append(ops.cpu_linear_attention_instruction_set(True))
    except RuntimeError:
        continue
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n, m, d in ((1, 2, 1), (65, 70, 7), (67, 33, 40), (300, 600, 64), (5, 3, 200)):
            q, g = (torch.randn(2, 4, n, d).to(dtype) for _ in range(2))
            k, v = (torch.randn(2, 2, m, d).to(dtype) for _ in range(2))
            out, S, z = check(*ops.cpu_linear_attention(q, k, v, 1e-6, True))
            check(*ops.cpu_linear_attention_backward(g, q, k, v, S, z, 1e-6, 0b111))
            check(ops.cpu_linear_attention_apply(q, S, z, 1e-6))
            dq, dS, dz = check(*ops.cpu_linear_attention_apply_backward(g, q, S, z, 1e-6, 0b111))
            check(*ops.cpu_linear_attention_state_backward(dS, dz, k, v, 0b11))
        qkv = torch.randn(2, 65, 3, 2, 24).to(dtype)
        out, S, z = check(*ops.cpu_linear_attention_packed(qkv, 1e-6, False))
        check(ops.cpu_linear_attention_packed_backward(out, qkv, S, z, 1e-6))
        for rows, cols, channels in ((1, 1, 1), (5, 4, 70), (2, 7, 64), (2, 33, 70)):
            for axis in (0, 1):
                x, w = torch.randn(2, rows, cols, channels), torch.randn(channels, 3, 3)
                x, w, pair = x.to(dtype), w.to(dtype), torch.randn(2, channels).to(dtype)
                pooled = check(ops.cpu_ripple_pool(x, w, axis))
                check(*ops.cpu_ripple_pool_backward(pooled, x, w, axis, 0b11))
                out = check(ops.cpu_ripple_expand(pooled, x, pair, w, axis))
                check(*ops.cpu_ripple_expand_backward(out, pooled, x, pair, w, axis, 0b1111))
print(ran)
"""


@needs_toolchain
@pytest.mark.slow
@pytest.mark.parametrize("amx", ["real", "emulated"])  # tiles: the sanitizers see no instruction's
def test_sanitizers_find_nothing(amx: str, tmp_path: Path) -> None:
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("the sanitizers' libraries are found by asking g++, which is not here")
    command = [gcc, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("no libasan on this machine: install it with the compiler")
    done = processes.python(
        "-c",
        SANITIZED,
        fresh=True,  # the sanitizers' library is loaded first
        timeout=1500,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        KERNEL_TESTS_TILES=amx,
        CXX="g++",
        LD_PRELOAD=library,
        # Leaks are Python's own; 0xff bytes are NaNs of every type.
        ASAN_OPTIONS="detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255",
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "runtime error" not in done.stderr
    assert "AddressSanitizer" not in done.stderr
    assert "portable code" in done.stdout
