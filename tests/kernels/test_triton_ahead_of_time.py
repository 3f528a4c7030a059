"""Triton without a GPU: every kernel compiled ahead of time for every architecture.

In a process without TRITON_INTERPRET, whatever this one has.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.test_triton import ROOT, pytestmark

__all__ = ["pytestmark"]

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
                "float32,float16" if architecture == 90 else "float32,bfloat16",
                "48,128" if architecture == 90 else "64,128",
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
