"""Triton's two modes without a GPU, each in a process of its own.

Interpreted: the cross-check and identity tests run again with TRITON_INTERPRET=1, which has to be
set before Triton is imported. Ahead of time: every kernel compiled for every architecture.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


def run_interpreted(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """pytest over the kernel tests of ``root`` for the interpreted Triton backend alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "KERNEL_TESTS_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    return subprocess.run(
        [*command, "--tb=short", "--color=no", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def interpreter_reason() -> str | None:
    code = "import kernels; print(kernels.backends('linear_attention', 'cpu')['triton'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.strip()
    return None if said == "None" else said


SUITE = ("cross_check", "identities", "operators")


@pytest.mark.parametrize(
    ("files", "selection"),
    [
        pytest.param(
            ("cross_check",), "named and (M77 or D48 or 5x6x20-float or 1x7)", id="numbers"
        ),
        pytest.param(("identities",), "nan or zero or empty or memory_order", id="edges"),
        pytest.param(("operators",), "opcheck and (linear or softmax) or fake", id="operators"),
        pytest.param(SUITE, "triton", id="everything", marks=pytest.mark.slow),
    ],
)
def test_interpreted(files: tuple[str, ...], selection: str) -> None:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    paths = [f"tests/kernels/test_{name}.py" for name in files]
    done = run_interpreted(*paths, "-k", f"({selection}) and triton")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed, done.stdout
    assert int(passed.group(1)) >= 6, done.stdout


# Shared memory that a block may use, bytes: CUDA C++ Programming Guide, compute capabilities.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compile_ahead(*arguments: str) -> list[dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_triton", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("architecture", "dtypes", "head_dims"),
    [
        pytest.param(90, "bfloat16", "64", id="sm_90-bfloat16"),
        *(
            pytest.param(
                architecture,
                "float32,float16,bfloat16" if architecture == 90 else "float32,bfloat16",
                "16,48,64,128" if architecture == 90 else "64,128",
                id=f"sm_{architecture}-all",
                marks=pytest.mark.slow,
            )
            for architecture in SHARED_MEMORY
        ),
    ],
)
def test_every_kernel_compiles_ahead_of_time(
    architecture: int, dtypes: str, head_dims: str
) -> None:
    """Machine code comes out and fits the shared memory; half-precision products use the tensor
    cores."""
    compiled = compile_ahead(str(architecture), "--dtypes", dtypes, "--head-dims", head_dims)
    kernels = {str(row["kernel"]) for row in compiled}
    assert len(kernels) == 12, sorted(kernels)
    for row in compiled:
        assert row["cubin_bytes"], row
        assert row["shared"] <= SHARED_MEMORY[architecture], row  # type: ignore[operator]
        if row["dtype"] != "float32" and "ripple" not in str(row["kernel"]):
            assert row["tensor_core"], row
