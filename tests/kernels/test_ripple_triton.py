"""Ripple's Triton kernels without a GPU: the pyramid's tests in the interpreter. Their machine code
is looked at in ``tests/bench/test_static.py``."""

import re

import pytest

from tests.kernels.test_triton import interpreter_reason, pytestmark, run_interpreted

__all__ = ["pytestmark"]


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
