"""Softmax attention's Triton kernels without a GPU: interpreted, and broken to see red."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.test_triton import ROOT, interpreter_reason, pytestmark, run_interpreted

__all__ = ["pytestmark"]

FILE = "kernels/softmax_attention/triton.py"
TESTS = "tests/kernels/test_softmax_attention.py"


@pytest.fixture(scope="module", autouse=True)
def usable_interpreter() -> None:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(
            "many_tiles and bfloat16 or any_scale and float16 or packed and bfloat16", id="numbers"
        ),
        pytest.param("", id="everything", marks=pytest.mark.slow),
    ],
)
def test_interpreted(selection: str) -> None:
    done = run_interpreted(TESTS, "-k", selection)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed, done.stdout
    assert int(passed.group(1)) >= 7, done.stdout


class Mutation(NamedTuple):
    name: str
    old: str  # in the file exactly once, so that a mutation can't outlive the code it breaks
    new: str
    tests: str  # a pytest -k expression: the smallest part of the tests that must notice


FLOAT32 = "many_tiles and 200-130 and float32"
FAST = [
    Mutation(
        "keys past the end are attended to",
        'scores = tl.where(inside, scores * scale, float("-inf"))',
        "scores = scores * scale",
        FLOAT32,
    ),
]
SLOW = [
    Mutation(
        "the running maximum's correction is lost",
        "total = total * correction + tl.sum(weights, axis=1)",
        "total = total + tl.sum(weights, axis=1)",
        FLOAT32,
    ),
    Mutation(
        "delta is left out of the score gradient",
        "dscores = weights * (dweights * dscore_scale - delta[:, None])",
        "dscores = weights * (dweights * dscore_scale)",
        FLOAT32,
    ),
    Mutation(
        "keys past the end have a gradient",
        "weights = tl.where((tl.arange(0, k_rows.shape[0]) < valid)[None, :], weights, 0.0)",
        "weights = weights",
        "far_below and float32",
    ),
    Mutation(
        "the tile after the whole ones is dropped",
        "    if num_keys % PASSED != 0:\n        maximum",
        "    if num_keys % PASSED < 0:\n        maximum",
        FLOAT32,
    ),
    Mutation(
        "every query head of a group is the first",
        "h = hk * GROUP + g",
        "h = hk * GROUP",
        FLOAT32,
    ),
    Mutation(
        "a query past the end is read",
        "dout = _load(dout_rows, inside, D, BLOCK_D, True)",
        "dout = _load(dout_rows, inside + 1, D, BLOCK_D, True)",
        "packed and float32",
    ),
    Mutation(
        "a part of the depth of a product is left out",
        "for start in tl.static_range(0, D, DEPTH):",
        "for start in tl.static_range(DEPTH, D, DEPTH):",
        FLOAT32,
    ),
    Mutation(
        "a negative scale is taken for a positive one",
        "        scores = -scores",
        "        scores = scores",
        "any_scale and float32",
    ),
    Mutation(
        "weights underflow float16",
        "SHIFT: tl.constexpr = 15.0 if",
        "SHIFT: tl.constexpr = 0.0 if",
        "subnormal",
    ),
    Mutation(
        "score gradients underflow float16",
        "return 2.0 ** max(0, num_keys.bit_length() - 11) if dtype == torch.float16 else 1.0",
        "return 1.0",
        "subnormal",
    ),
]


@pytest.mark.parametrize(
    "mutation",
    [
        *(pytest.param(m, id=m.name) for m in FAST),
        *(pytest.param(m, id=m.name, marks=pytest.mark.slow) for m in SLOW),
    ],
)
def test_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copytree(ROOT / "linear_vit", tmp_path / "linear_vit", symlinks=True)
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / FILE).read_text()
    assert source.count(mutation.old) == 1, f"{FILE} no longer has {mutation.old!r} once"
    (tmp_path / FILE).write_text(source.replace(mutation.old, mutation.new))

    done = run_interpreted(TESTS, "-k", mutation.tests, root=tmp_path)
    assert done.returncode == 1, f"not noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert re.search(r"(\d+) failed", done.stdout), done.stdout
    wrong_number = re.search(r"AssertionError|^E +assert", done.stdout, re.MULTILINE)
    assert wrong_number, f"red, but not for a wrong number:\n{done.stdout}"
