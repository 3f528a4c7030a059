"""Which backend can run what, why not, and what importing and choosing must not do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linear_vit import kernels
from linear_vit.kernels import BACKENDS, OPERATIONS
from linear_vit.kernels.rows import HEAD_DIMS
from tests import processes
from tests.kernels.cases import Attention

ROOT = Path(__file__).parents[2]
NO_GPU = not torch.cuda.is_available()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return processes.python("-c", code, **environment)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_backend_is_listed_with_its_reason(op: str) -> None:
    listed = kernels.backends(op, "cpu")
    assert tuple(listed) == BACKENDS
    assert listed["reference"] is None
    assert listed["torch"] is None
    assert "CUDA" in (listed["cuda"] or "")
    for reason in listed.values():
        assert reason is None or ("\n" not in reason and len(reason) > 20)


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_backend_runs_on_a_device_that_is_not_there(op: str) -> None:
    for reason in kernels.backends(op, "cuda:99").values():
        assert reason is not None
    with pytest.raises(ValueError, match=r"no backend can run .* there is no cuda:99 here"):
        kernels.default_backend(op, "cuda:99")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_no_backend_takes_a_dtype_that_no_operation_has(op: str, dtype: torch.dtype) -> None:
    for reason in kernels.backends(op, "cpu", dtype=dtype).values():
        assert reason is not None
        assert f"{dtype} is not a dtype of the operations" in reason


def test_a_backend_that_cannot_run_says_why() -> None:
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="backend 'cuda' can't run linear_attention on cpu: CUDA"):
        kernels.linear_attention(q, q, q, backend="cuda")


@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
def test_head_dims_of_the_kernels(op: str) -> None:
    for backend in ("triton", "cuda"):
        reason = kernels.backends(op, "cuda", head_dim=192)[backend]
        assert reason is not None
        assert "head dim 192 is not one of the kernels' 16, 32, 48, 64, 96, 128" in reason
        assert "backend='torch'" in reason
    q = torch.randn(1, 2, 5, 192)
    assert getattr(kernels, op)(q, q, q).shape == q.shape


def test_head_dim_is_not_asked_of_ripple() -> None:
    assert "head dim" not in (kernels.backends("ripple_pool", "cuda", head_dim=7)["triton"] or "")


@pytest.mark.skipif(not NO_GPU, reason="needs a machine without a GPU")
def test_cuda_devices_are_refused_without_one() -> None:
    reasons = kernels.backends("linear_attention", "cuda")
    for backend in ("triton", "cuda"):
        assert "CUDA" in (reasons[backend] or "")


def test_import_is_light() -> None:
    """Imports bring no Triton, no Dynamo and no builder; asking what there is builds nothing."""
    done = python(
        "import sys, kernels, attention, bench, training\n"
        "def loaded(*unwanted): return [m for m in sys.modules if m.startswith(unwanted)]\n"
        "print(loaded('triton', 'torch._dynamo', 'linear_vit.kernels.build'))\n"
        "kernels.backends('linear_attention', 'cpu')\n"
        "import torch; q = torch.randn(1, 2, 5, 16)\n"
        "kernels.implementation('softmax_attention', 'torch', q, q, q)\n"
        "print(loaded('triton', 'torch.utils.cpp_extension', 'torch._inductor'))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "[]"]


def test_missing_triton_is_a_reason() -> None:
    done = python(
        "import sys; sys.modules['triton'] = None\n"
        "import kernels, torch\n"
        "print(kernels.backends('linear_attention', 'cpu')['triton'])\n"
        "q = torch.randn(1, 2, 5, 16); print(kernels.linear_attention(q, q, q).shape)"
    )
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed: pip install triton" in done.stdout


def test_missing_compiler_is_a_reason() -> None:
    done = python(
        "import kernels; print(kernels.backends('linear_attention', 'cpu')['compiled'])",
        PATH=str(Path(sys.executable).parent),
        CXX="no-such-compiler",
    )
    assert done.returncode == 0, done.stderr
    assert "torch.compile needs a C++ compiler, no no-such-compiler: install g++" in done.stdout


@pytest.mark.parametrize("nothing", ["", " "])
def test_a_compiler_set_to_nothing_takes_no_other_backend_down(nothing: str) -> None:
    done = python(
        "import kernels, torch; b = kernels.backends('linear_attention', 'cpu')\n"
        "print(b['torch'], b['reference'], b['compiled'])\n"
        "q = torch.randn(1, 2, 5, 16); print(kernels.linear_attention(q, q, q).shape)",
        CXX=nothing,
    )
    assert done.returncode == 0, done.stderr
    reason = "torch.compile takes its C++ compiler from CXX, which is set to nothing: unset CXX"
    assert done.stdout.splitlines() == [f"None None {reason}", "torch.Size([1, 2, 5, 16])"]


NO_HOME = """
import os, pwd
def gone(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = gone
for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"): os.environ.pop(name, None)
import kernels, torch
print(kernels.backends("linear_attention", "cpu")["cpu"])
q = torch.randn(1, 2, 5, 16); print(kernels.linear_attention(q, q, q).shape)
"""


def test_a_user_without_a_home_loses_what_needs_a_cache_alone(tmp_path: Path) -> None:
    done = python(NO_HOME, TORCH_EXTENSIONS_DIR="")
    assert done.returncode == 0, done.stderr
    reason, shape = done.stdout.splitlines()
    assert "the user has no home: set XDG_CACHE_HOME or TORCH_EXTENSIONS_DIR" in reason
    assert shape == "torch.Size([1, 2, 5, 16])"
    named = python(NO_HOME, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-compiler")
    assert named.returncode == 0, named.stderr
    assert "needs a C++ compiler, no no-such-compiler" in named.stdout


def test_interpreter_is_never_a_default_nor_timed() -> None:
    pytest.importorskip("triton")
    done = python(
        "import kernels; b = kernels.backends('linear_attention', 'cpu');"
        "print(b['triton'], kernels.default_backend('linear_attention', 'cpu'),"
        " kernels.is_timeable('triton', 'cpu'), kernels.is_timeable('torch', 'cpu'))",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    usable, default, timed, torch_timed = done.stdout.strip().rsplit(maxsplit=3)
    assert usable == "None" or "numpy<2.4" in usable
    assert default != "triton"
    assert (timed, torch_timed) == ("False", "True")


def test_default_is_usable_everywhere() -> None:
    for op in OPERATIONS:
        name = kernels.default_backend(op, "cpu")
        assert kernels.backends(op, "cpu")[name] is None


def test_sdpa_kernel_is_named() -> None:
    q = torch.randn(1, 2, 16, 32)
    said = kernels.implementation("softmax_attention", "torch", q, q, q)
    assert said.startswith("scaled_dot_product_attention: ")
    if NO_GPU:
        assert "flash_attention_for_cpu" in said


def test_compiled_runs_out_of_variants_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the recompile limit there is an error, never a silent fall back to eager."""
    if kernels.backends("linear_attention", "cpu")["compiled"] is not None:
        pytest.skip("torch.compile is not usable here")
    from linear_vit.kernels import compilation

    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 1)
    compilation.forget()
    run = lambda keys: Attention(head_dim=HEAD_DIMS[0], keys=keys).inputs()  # noqa: E731
    kernels.linear_attention_state(*run(8)[1:], backend="compiled")
    with pytest.raises(RuntimeError, match="recompile limit"):
        kernels.linear_attention_state(*run(0)[1:], backend="compiled")
    compilation.forget()
