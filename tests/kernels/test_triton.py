"""Triton's interpreter: the kernel tests again, in a process with TRITON_INTERPRET=1.

It has to be set before Triton is imported, and no kernel compiles in such a process.
"""

import contextlib
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests import processes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


def run_interpreted(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """pytest over the kernel tests of ``root`` for the interpreted Triton backend alone."""
    given = ["-q", "-m", "", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--color=no"]
    world = {"TRITON_INTERPRET": "1", "KERNEL_TESTS_BACKEND": "triton"}
    return processes.python("-m", "pytest", *given, *arguments, cwd=root, timeout=3000, **world)


def interpreter_reason() -> str | None:
    code = "import kernels; print(kernels.backends('linear_attention', 'cpu')['triton'])"
    done = processes.python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    return None if said == "None" else said


SUITE = ("cross_check", "identities", "operators", "triton_paths")
ALL = (*SUITE, "ripple_stages", "softmax_attention", "transforms", "key_mask")
# A part of each proof, in one process: every operation's numbers, edges, operators and paths.
QUICK = (
    "named and (M77 and float16 or D48 and linear_attention_packed or 5x6x20-float32 or 1x7)",
    "nan or no_gradient_at_zero or empty or memory_order and expanded",
    "zero_query_row_and and (1e-39 or float16 and 1e-06)",
    "fake",
    "few_features and 16",
    "over_programs and bfloat16 or one_tile and float16 or streamed and float32",
    "choice or workspace",
    "test_pool and 5x6x20 or test_expand and 1x1x7x9",
    "many_tiles and 200-130 and bfloat16 or any_scale and float16",
    "refuse_tangents and linear_attention_apply",
    "masked_keys_are_not_there and float16 and softmax_attention_packed",
)


@pytest.mark.parametrize(
    ("files", "selection", "least"),
    [
        pytest.param(ALL, QUICK, 50, id="quick"),
        pytest.param(SUITE, ("triton",), 150, id="suite", marks=pytest.mark.slow),
        pytest.param(("ripple_stages",), ("triton",), 20, id="ripple", marks=pytest.mark.slow),
        pytest.param(("softmax_attention",), ("triton",), 20, id="softmax", marks=pytest.mark.slow),
        pytest.param(("transforms",), ("triton",), 25, id="transforms", marks=pytest.mark.slow),
        pytest.param(("needs",), ("triton",), 40, id="needs", marks=pytest.mark.slow),
        pytest.param(("dtensor",), ("triton",), 8, id="dtensor", marks=pytest.mark.slow),
        pytest.param(("key_mask",), ("triton",), 60, id="key_mask", marks=pytest.mark.slow),
    ],
)
def test_interpreted(files: tuple[str, ...], selection: tuple[str, ...], least: int) -> None:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    paths = [f"tests/kernels/test_{name}.py" for name in files]
    chosen = " or ".join(f"({part})" for part in selection)
    done = run_interpreted(*paths, "-k", f"({chosen}) and triton")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed, done.stdout
    assert int(passed.group(1)) >= least, done.stdout


def test_launchers_run_with_their_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: of tensors on cuda:1, that has to be cuda:1."""
    from linear_vit.kernels.triton import support

    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    def launcher(eps: float, levels: list[Tensor], q: Tensor) -> str:
        return current[-1]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.library, "custom_op", lambda name, function, mutates_args: function)
    guarded = support.operator("any")(launcher)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
        assert guarded(1e-6, [x], x) == guarded(1e-6, [], x) == "cuda:1"
    assert guarded(1e-6, [], torch.empty(2)) == "cuda:0"
