"""Ripple's Triton kernels without a GPU: the pyramid's tests in the interpreter, and the machine
code of every launch."""

import json
import re
import subprocess
import sys

import pytest

from tests.kernels.test_triton import ROOT, interpreter_reason, pytestmark, run_interpreted

__all__ = ["pytestmark"]

# Compiled through the launchers: what ships is what is looked at. Not in this process, which may
# have Triton in its interpreter.
COMPILE = """
import json, sys
import torch
from bench.compiled_triton import compile_room
for row in compile_room("ripple", sys.argv[1], getattr(torch, sys.argv[2]), None):
    print(json.dumps(row))
"""


@pytest.mark.parametrize(
    "selection",
    [
        "test_pool and 5x6x20 or test_expand and (5x6x20 or 1x1x7x9) or opcheck",
        pytest.param("triton", marks=pytest.mark.slow),
    ],
)
def test_interpreted(selection: str) -> None:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    done = run_interpreted("tests/kernels/test_ripple_stages.py", "-k", f"({selection}) and triton")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed, done.stdout
    assert int(passed.group(1)) >= 4, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90a", "sm_100a"])
def test_every_launch_compiles_without_spills(architecture: str, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture, dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = {row["kernel"] for row in rows}
    assert names == {"_pool", "_pool_backward", "_expand", "_expand_backward", "_sum_partials"}
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
