"""Triton's interpreter: the kernel tests again, in a process with TRITON_INTERPRET=1.

It has to be set before Triton is imported, and no kernel compiles in such a process.
"""

import importlib.util
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


SUITE = ("cross_check", "identities", "operators", "triton_paths")


@pytest.mark.parametrize(
    ("files", "selection"),
    [
        pytest.param(
            ("cross_check",), "named and (M77 or D48 or 5x6x20-float or 1x7)", id="numbers"
        ),
        pytest.param(("identities",), "nan or zero or empty or memory_order", id="edges"),
        pytest.param(("operators",), "opcheck and (linear or softmax) or fake", id="operators"),
        pytest.param(
            ("triton_paths",),
            "over_programs or one_tile or streamed or choice or workspace",
            id="paths",
        ),
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
