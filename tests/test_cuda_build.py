"""The CUDA sources compile, link and load, with no GPU here.

That every kernel compiles for every architecture without spills, with tensor-core products and
16-byte accesses, is held by ``tests/bench/test_static.py``; the two whose registers are fewest are
looked at here too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linear_vit.kernels import build, toolchains
from linear_vit.kernels.__main__ import main
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("linear_attention", "softmax_attention", "ripple")
# The commonest head dim, for what runs on every change.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=64", "-DLINEAR_VIT_ELEMENT_TYPES=__half")

needs_nvcc = pytest.mark.skipif(
    toolchains.cuda_root() is None, reason="no nvcc on this machine: install the CUDA toolkit"
)
needs_toolchain = pytest.mark.skipif(
    toolchains.no_cuda_toolchain() is not None, reason=str(toolchains.no_cuda_toolchain())
)


def compile_for(
    architecture: str, room: str, folder: Path, flags: tuple[str, ...] = ()
) -> dict[str, int]:
    """Compile a room's kernels as the extension does; returns kernel -> bytes of spills."""
    root = toolchains.cuda_root()
    assert root is not None
    source = ROOT / "kernels" / room / "cuda.cu"
    command = [str(root / "bin" / "nvcc"), "-std=c++17", *toolchains.NVCC_FLAGS, *flags]
    command += [f"-arch={architecture}", "-Xptxas=-v", "-c", str(source)]
    result = subprocess.run(
        [*command, "-o", str(folder / "kernels.o")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    spills = {}
    kernel = None
    for line in result.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = match.group(1)
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            assert kernel is not None, f"ptxas says something else than expected: {line}"
            spills[kernel] = int(match.group(1)) + int(match.group(2))
    return spills


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("room", ["linear_attention", "softmax_attention"])
def test_one_variant_compiles_without_spills(room: str, tmp_path: Path) -> None:
    spills = compile_for("sm_90a", room, tmp_path, NARROW)
    assert len(spills) > 1
    assert {kernel: size for kernel, size in spills.items() if size > 0} == {}


# ---- build, link, load ---------------------------------------------------------------------------

# Loads one room for a GPU that needn't be here, and asks its operators for shapes. Not through
# autograd, whose engine wants the device: each backward operator is called by name, and
# gives every gradient.
LOAD = """
import importlib, json, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from linear_vit.kernels import build

room, flags = sys.argv[1], sys.argv[2:]
build.load("cuda", room, architectures=("9.0a",), flags=flags)
module = importlib.import_module(f"linear_vit.kernels.{room}.cuda")
ops = torch.ops.linear_vit
with FakeTensorMode(), torch.no_grad():
    # Laid out (B, N, H, D), read as (B, H, N, D).
    q, k = (
        torch.empty(2, n, h, 64, dtype=torch.half, device="cuda").transpose(1, 2)
        for n, h in ((10, 4), (7, 2))
    )
    x, weight, pair = (
        torch.empty(shape, device="cuda") for shape in ((2, 5, 6, 8), (8, 3, 3), (2, 8))
    )
    if room == "linear_attention":
        out = module.linear_attention(q, k, k, 1e-6)
        S, z = module.linear_attention_state(k, k)
        gradients = ops.cuda_linear_attention_backward(out, q, k, k, S, z, 1e-6, 0b111)
        dq, dS, dz = ops.cuda_linear_attention_apply_backward(out, q, S, z, 1e-6, 0b111)
        parts = [dq, *ops.cuda_linear_attention_state_backward(dS, dz, k, k, 0b11)]
        assert [x.stride() for x in parts] == [x.stride() for x in gradients]
        qkv = torch.empty(2, 10, 3, 4, 64, dtype=torch.half, device="cuda")
        packed = module.linear_attention_packed(qkv, 1e-6)
        dqkv = ops.cuda_linear_attention_packed_backward(packed, qkv, *[z.new_empty(0)] * 2, 1e-6)
        assert dqkv.shape == qkv.shape and packed.shape == qkv[:, :, 0].shape
    elif room == "softmax_attention":
        out, lse = ops.cuda_softmax_attention(q, k, k, None, 0.125)
        gradients = ops.cuda_softmax_attention_backward(
            out, q, k, k, None, out, lse, 0.125, 0b111
        )
    else:
        pooled = module.ripple_pool(x, weight, 0)
        out = module.ripple_expand(pooled, x, pair, weight, 0)
        gradients = [
            *ops.cuda_ripple_pool_backward(pooled, x, weight, 0, 0b11),
            *ops.cuda_ripple_expand_backward(out, pooled, x, pair, weight, 0, 0b1111),
        ]
operators = [
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("linear_vit::cuda_") and not name.endswith("_describe")
]
on_cuda = [
    name for name in operators if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
]
describe = lambda t: [list(t.shape), list(t.stride()), str(t.dtype), t.device.type]
print(json.dumps({"out": describe(out), "gradients": [describe(g) for g in gradients],
                  "operators": sorted(operators), "on_cuda": sorted(on_cuda)}))
"""


def load_in_a_new_process(room: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", LOAD, room, *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check_loaded(room: str, output: str) -> None:
    found = json.loads(output)
    for name in found["operators"]:
        assert name.removesuffix("_backward") + "_backward" in found["operators"]
    assert found["operators"] == found["on_cuda"]
    operators = {"linear_attention": 8, "softmax_attention": 4, "ripple": 8}
    assert len(found["operators"]) == operators[room]
    if room == "ripple":
        fine = [[2, 5, 6, 8], [240, 48, 8, 1], "torch.float32", "cuda"]
        coarse = [[2, 3, 6, 8], [144, 48, 8, 1], "torch.float32", "cuda"]
        weight = [[8, 3, 3], [9, 3, 1], "torch.float32", "cuda"]
        pair = [[2, 8], [8, 1], "torch.float32", "cuda"]
        assert found["out"] == fine
        assert found["gradients"] == [fine, weight, coarse, fine, pair, weight]
    else:  # the memory order of q, k and v
        query = [[2, 4, 10, 64], [2560, 64, 256, 1], "torch.float16", "cuda"]
        key = [[2, 2, 7, 64], [896, 64, 128, 1], "torch.float16", "cuda"]
        assert found["out"] == query
        assert found["gradients"] == [query, key, key]


@pytest.mark.slow
@needs_toolchain
def test_one_variant_builds_links_and_loads_once(tmp_path: Path) -> None:
    room = "softmax_attention"  # the one with least to compile
    first = load_in_a_new_process(room, tmp_path, *NARROW)
    assert first.returncode == 0, first.stderr[-4000:]
    assert f"building {room}'s CUDA extension for 9.0a" in first.stderr
    check_loaded(room, first.stdout)
    second = load_in_a_new_process(room, tmp_path, *NARROW)
    assert second.returncode == 0, second.stderr[-4000:]
    assert "building" not in second.stderr
    assert second.stdout == first.stdout


@needs_toolchain
@pytest.mark.slow
def test_everything_builds_ahead_of_time(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "kernels", "build", "--arch", "sm_90a"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for room in ROOMS:
        assert f"built and loaded {tmp_path}/linear_vit_cuda_{room}_" in result.stdout
        loaded = load_in_a_new_process(room, tmp_path)
        assert loaded.returncode == 0, loaded.stderr[-4000:]
        assert "building" not in loaded.stderr
        check_loaded(room, loaded.stdout)


# ---- what can be missing -------------------------------------------------------------------------


@pytest.fixture
def fresh_toolchain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Look for the toolchain anew, before and after the test."""

    def forget() -> None:
        for cached in (toolchains.cuda_root, toolchains.nvcc_version, toolchains.no_cuda_toolchain):
            cached.cache_clear()

    forget()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    yield monkeypatch
    monkeypatch.undo()
    forget()


def fake_nvcc(folder: Path, script: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return folder


def test_cuda_home_is_honoured_if_it_holds_an_nvcc(
    fresh_toolchain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = fake_nvcc(tmp_path / "toolkit", "echo 'release 13.1, V13.1.0'")
    fresh_toolchain.setenv("CUDA_HOME", str(root))
    assert toolchains.cuda_root() == root
    assert toolchains.nvcc_version() == (13, 1)


def test_a_wrapper_on_path_is_asked_where_the_toolkit_is(
    fresh_toolchain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit = fake_nvcc(tmp_path / "toolkit", "true")
    wrapper = fake_nvcc(tmp_path / "usr", f"echo '#$ TOP={toolkit}/bin/..' >&2")
    fresh_toolchain.setenv("PATH", str(wrapper / "bin"), prepend=os.pathsep)
    assert toolchains.cuda_root() == toolkit


def test_another_major_version_of_cuda_is_named(
    fresh_toolchain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = fake_nvcc(tmp_path / "toolkit", "echo 'release 12.4, V12.4.1'")
    fresh_toolchain.setenv("CUDA_HOME", str(root))
    reason = toolchains.no_cuda_toolchain()
    assert reason is not None
    assert "12.4" in reason
    assert "13.2" in reason
    assert "install the CUDA 13 toolkit" in reason


def test_a_missing_compiler_is_named(fresh_toolchain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = fake_nvcc(tmp_path / "toolkit", "echo 'release 13.0, V13.0.88'")
    fresh_toolchain.setenv("CUDA_HOME", str(root))
    fresh_toolchain.setenv("CXX", "no-such-compiler")
    reason = toolchains.no_cuda_toolchain()
    assert reason is not None
    assert "no-such-compiler" in reason
    assert "install g++" in reason


def test_a_cpu_build_of_torch_is_named(fresh_toolchain: pytest.MonkeyPatch) -> None:
    fresh_toolchain.setattr(torch.version, "cuda", None)
    reason = build.unavailable("cuda", torch.device("cuda"))
    assert reason is not None
    assert "install a CUDA build of torch" in reason


def test_an_unknown_extension_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown extension 'rocm': there are cuda"):
        build.unavailable("rocm", torch.device("cuda"))


@needs_toolchain
def test_a_failed_build_is_remembered_with_its_reason(
    fresh_toolchain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh_toolchain.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    fresh_toolchain.setattr(build, "_failures", {})
    flags = ("-include", "no_such_header.h")
    with pytest.raises(build.BuildError, match=r"error: no_such_header\.h: No such file") as caught:
        build.load("cuda", "ripple", architectures=("9.0a",), flags=flags)
    message = str(caught.value)
    assert "\n" not in message
    log = re.search(r"all of it in (\S+);", message)
    assert log is not None
    assert "error" in Path(log.group(1)).read_text()
    folder = build.folder_of("cuda", "ripple", ("9.0a",), flags)
    assert build.earlier_failure(folder) == message  # in a later process too


def test_the_command_says_what_is_wrong(
    fresh_toolchain: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_toolchain.setattr(toolchains, "no_cuda_toolchain", lambda: "no nvcc: install it")
    assert main(["build"]) == 1
    assert "no nvcc: install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("8.0,9.0a", ("8.0", "9.0a")),
        ("sm_80, sm_90a", ("8.0", "9.0a")),
        ("sm-100a,sm_120", ("10.0a", "12.0")),
    ],
)
def test_architectures_are_spelled_either_way(
    words: str, wanted: tuple[str, ...], fresh_toolchain: pytest.MonkeyPatch
) -> None:
    asked = []
    fresh_toolchain.setattr(toolchains, "no_cuda_toolchain", lambda: None)
    fresh_toolchain.setattr(toolchains, "nvcc_version", lambda: (13, 2))
    fresh_toolchain.setattr(
        build, "load", lambda backend, *, architectures: asked.append((backend, architectures))
    )
    assert main(["build", "--arch", words]) == 0
    assert asked == [("cuda", wanted)]


def test_another_word_for_an_architecture_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--arch", "8.0,hopper"])
    assert "sm_80,sm_90a, not 'hopper'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("kernels", "build", "--help"), 0, "usage: python -m kernels build"),
        (("kernels", "--help"), 0, "usage: python -m kernels"),
        (("kernels.extension", "--arch", "8.0"), 1, "use python -m kernels build"),
    ],
)
def test_the_spellings(words: tuple[str, ...], status: int, said: str) -> None:
    """The old one names the new one, in one line."""
    done = processes.python(
        "-m", *words, fresh=status != 0
    )  # an error in one line is the real one's
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= (24 if status == 0 else 1)
