"""Softmax attention's CUDA kernels on the host: see emulator.py."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.softmax_attention import reference
from tests.cuda_host.checks import (
    DTYPES,
    HEAD_DIMS,
    ORDERS,
    Case,
    Mutation,
    assert_accurate,
    assert_sanitizers_find_nothing,
    build_room,
    double,
    first_failure,
    grad,
    needs_compiler,
    see_red,
)
from tests.cuda_host.emulator import guarded
from tests.cuda_host.softmax_attention import SoftmaxAttention

ROOM = "softmax_attention"
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_room(ROOM, tmp_path_factory.mktemp(ROOM))


def run(
    emulated: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    scale = q.shape[-1] ** -0.5
    out, lse = emulated.softmax_attention(q, k, v, scale)
    dq, dk, dv = emulated.softmax_attention_backward(gradient, q, k, v, out, lse, scale)
    emulated.check_guards()
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(libraries: dict[str, Path], case: Case) -> dict[str, Tensor]:
    emulated = SoftmaxAttention(libraries, thread_order=case.order)
    q, k, v, gradient = case.inputs()
    actual = run(emulated, q, k, v, gradient)
    exact = double(q, k, v)
    scale = case.head_dim**-0.5
    out = reference.softmax_attention(*exact, scale)
    out.backward(gradient.double())
    keys = exact[1].detach().repeat_interleave(case.heads // case.kv_heads, dim=1)
    lse = (exact[0].detach() @ keys.mT * scale).logsumexp(dim=-1)
    assert_accurate("lse", actual["lse"], lse, gradient=False)
    assert_accurate("out", actual["out"], out.detach(), gradient=False)
    for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)
    return actual


# ---- numbers -------------------------------------------------------------------------------------

# What is cheap and finds most: every head dim, dtype, layout, order and number of splits once.
CASES = (
    Case(16, torch.bfloat16, queries=130, keys=33, layout="misaligned", order="reverse"),
    Case(32, heads=4, queries=133, keys=70, num_splits=3, eps=0.5),
    Case(32, heads=4, queries=133, keys=70, num_splits=3, order="strided"),
    Case(48, torch.float16, heads=6, kv_heads=3, layout="expanded", num_splits=2),
    Case(64, torch.bfloat16, layout="packed", order="reverse"),
    Case(64, batch=2, heads=1, kv_heads=1, queries=1, keys=2, num_splits=None),
    Case(96, torch.float16, heads=1, kv_heads=1, queries=65, keys=31, order="reverse"),
    Case(128, torch.bfloat16, heads=2, kv_heads=1, queries=33, keys=65, num_splits=2),
)
MORE_CASES = (
    *(
        Case(head_dim, dtype, 1, 4, 2, 133, 70, layout, order, num_splits=2)
        for head_dim in HEAD_DIMS
        for dtype, order, layout in zip(
            DTYPES, ORDERS, ("misaligned", "contiguous", "expanded"), strict=True
        )
    ),
    Case(16, heads=1, kv_heads=1, queries=5, keys=1500),  # several chunks of tokens
    Case(16, heads=1, kv_heads=1, queries=1100, keys=5, num_splits=None),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(libraries: dict[str, Path], case: Case) -> None:
    check(libraries, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_more_numbers(libraries: dict[str, Path], case: Case) -> None:
    check(libraries, case)


def test_results_repeat_bit_for_bit_whatever_the_thread_order(libraries: dict[str, Path]) -> None:
    case = Case(32, heads=2, kv_heads=1, queries=40, keys=50, num_splits=2)
    runs = [check(libraries, replace(case, order=order)) for order in ORDERS]
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(x, other[name]), name


# ---- edges ---------------------------------------------------------------------------------------


def test_no_keys_gives_zeros(libraries: dict[str, Path]) -> None:
    q, k, v, gradient = Case(16, queries=3, keys=0).inputs()
    result = run(SoftmaxAttention(libraries), q, k, v, gradient)
    assert torch.equal(result["out"], torch.zeros_like(q))
    assert torch.equal(result["dq"], torch.zeros_like(q))
    assert result["dk"].shape == k.shape
    assert (result["lse"] == -torch.inf).all()


@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}])
def test_no_queries_and_no_batch(libraries: dict[str, Path], empty: dict[str, int]) -> None:
    q, k, v, gradient = replace(Case(16, keys=3), **empty).inputs()
    result = run(SoftmaxAttention(libraries), q, k, v, gradient)
    assert result["out"].shape == q.shape
    assert torch.equal(result["dk"], torch.zeros_like(k))
    assert torch.equal(result["dv"], torch.zeros_like(v))


def test_nan_goes_where_it_must_and_nowhere_else(libraries: dict[str, Path]) -> None:
    clean = Case(16, queries=70, keys=40).inputs()

    q, k, v, gradient = (guarded(x) for x in clean)
    q[0, 0, 3, 5] = torch.nan
    out = run(SoftmaxAttention(libraries), q, k, v, gradient)["out"]
    assert out[0, 0, 3].isnan().all()
    assert out.isnan().sum() == out.shape[-1]

    q, k, v, gradient = (guarded(x) for x in clean)
    k[0, 0, 33, 5] = torch.nan
    out = run(SoftmaxAttention(libraries), q, k, v, gradient)["out"]
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()

    q, k, v, gradient = (guarded(x) for x in clean)
    v[0, 1, 33, 5] = torch.nan
    out = run(SoftmaxAttention(libraries), q, k, v, gradient)["out"]
    assert out[0, 1, :, 5].isnan().all()
    assert out.isnan().sum() == out.shape[2]


# ---- do these tests fail when they should? -------------------------------------------------------

MUTATIONS = (
    Mutation(
        "drop the last tile of queries",
        "softmax_attention/cuda.cu",
        "first < a.query_tokens; first += kTile",
        "first + kTile < a.query_tokens; first += kTile",
    ),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "keys past the end count",
        "softmax_attention/cuda.cu",
        "score[i][j] = tx + kSide * j < valid ? score[i][j] * to_log2 : -kInfinity;",
        "score[i][j] = score[i][j] * to_log2;",
    ),
    Mutation(
        "the sum is not rescaled",
        "softmax_attention/cuda.cu",
        "sum[i] = sum[i] * rescale[i] + row_sum(tile_sum);",
        "sum[i] = sum[i] + row_sum(tile_sum);",
    ),
    Mutation(
        "no delta",
        "softmax_attention/cuda.cu",
        "ds = p * (dp[i][j] - shared.delta[query]) * a.scale;",
        "ds = p * dp[i][j] * a.scale;",
    ),
    Mutation(
        "queries past the end count",
        "softmax_attention/cuda.cu",
        "if (query < valid) {",
        "if (true) {",
    ),
    Mutation(
        "one query head of a group reads",
        "softmax_attention/cuda.cu",
        "head < (block.head + 1) * a.group; ++head",
        "head < block.head * a.group + 1; ++head",
    ),
    Mutation(
        "no barrier before keys are read",
        "softmax_attention/cuda.cu",
        "__syncthreads();\n    float score[B::kPerThread][kTilePerThread], rescale",
        "float score[B::kPerThread][kTilePerThread], rescale",
    ),
    Mutation(
        "no barrier before dS is read",
        "softmax_attention/cuda.cu",
        "__syncwarp();\n    accumulate<D>(dq, one",
        "accumulate<D>(dq, one",
    ),
)

# One head dim and element type: a mutant compiles in a second or two.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float")


def narrow_checks(libraries: dict[str, Path]) -> list:
    cases = (
        Case(32, heads=4, queries=133, keys=70, num_splits=3, eps=0.5),
        Case(32, heads=1, kv_heads=1, queries=21, keys=21),  # less than a tile
    )
    return [
        partial(check, libraries, replace(case, order=order))
        for order in ("forward", "reverse")
        for case in cases
    ]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The unbroken kernels, built as the mutants are, pass."""
    libraries = build_room(ROOM, tmp_path_factory.mktemp("sound"), NARROW)
    assert first_failure(narrow_checks(libraries)) is None


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


@pytest.mark.slow
@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MORE_MUTATIONS, ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


SANITIZED = """
import sys
from pathlib import Path
from tests.cuda_host import test_softmax_attention as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
case = t.Case(32, heads=4, queries=37, keys=35, num_splits=2)
for layout in ("contiguous", "misaligned"):
    t.check(libraries, t.replace(case, layout=layout))
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    assert_sanitizers_find_nothing(ROOM, NARROW, tmp_path, SANITIZED)
