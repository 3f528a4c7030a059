"""Linear attention's CUDA kernels on the host: see emulator.py."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.linear_attention import reference
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
from tests.cuda_host.linear_attention import LinearAttention

ROOM = "linear_attention"
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_room(ROOM, tmp_path_factory.mktemp(ROOM))


def run(
    emulated: LinearAttention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, eps: float
) -> dict[str, Tensor]:
    S, z = emulated.linear_attention_state(k, v)
    out = emulated.linear_attention_apply(q, S, z, eps)
    dq, dS, dz = emulated.linear_attention_apply_backward(gradient, q, S, z, eps)
    dk, dv = emulated.linear_attention_state_backward(dS, dz, k, v)
    emulated.check_guards()
    return {"S": S, "z": z, "out": out, "dq": dq, "dk": dk, "dv": dv}


def check(libraries: dict[str, Path], case: Case) -> dict[str, Tensor]:
    emulated = LinearAttention(libraries, thread_order=case.order, num_splits=case.num_splits)
    q, k, v, gradient = case.inputs()
    actual = run(emulated, q, k, v, gradient, case.eps)
    exact = double(q, k, v)
    S, z = reference.linear_attention_state(*exact[1:])
    out = reference.linear_attention_apply(exact[0], S, z, case.eps)
    out.backward(gradient.double())
    for name, expected in (("S", S), ("z", z), ("out", out)):
        assert_accurate(name, actual[name], expected.detach(), gradient=False)
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
    result = run(LinearAttention(libraries), q, k, v, gradient, 1e-6)
    assert torch.equal(result["out"], torch.zeros_like(q))
    assert torch.equal(result["dq"], torch.zeros_like(q))
    assert result["dk"].shape == k.shape
    assert torch.equal(result["S"], torch.zeros(1, 2, 32, 16))


@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}])
def test_no_queries_and_no_batch(libraries: dict[str, Path], empty: dict[str, int]) -> None:
    q, k, v, gradient = replace(Case(16, keys=3), **empty).inputs()
    result = run(LinearAttention(libraries), q, k, v, gradient, 1e-6)
    assert result["out"].shape == q.shape
    assert torch.equal(result["dk"], torch.zeros_like(k))
    assert torch.equal(result["dv"], torch.zeros_like(v))


def test_nan_goes_where_it_must_and_nowhere_else(libraries: dict[str, Path]) -> None:
    clean = Case(16, queries=70, keys=40).inputs()

    q, k, v, gradient = (guarded(x) for x in clean)
    q[0, 0, 3, 5] = torch.nan
    out = run(LinearAttention(libraries), q, k, v, gradient, 1e-6)["out"]
    assert out[0, 0, 3].isnan().all()
    assert out.isnan().sum() == out.shape[-1]

    q, k, v, gradient = (guarded(x) for x in clean)
    k[0, 0, 33, 5] = torch.nan
    out = run(LinearAttention(libraries), q, k, v, gradient, 1e-6)["out"]
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()

    q, k, v, gradient = (guarded(x) for x in clean)
    v[0, 1, 33, 5] = torch.nan
    out = run(LinearAttention(libraries), q, k, v, gradient, 1e-6)["out"]
    assert out[0, 1, :, 5].isnan().all()
    assert out.isnan().sum() == out.shape[2]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_zero_query_row_gives_zero_and_finite_gradients(
    libraries: dict[str, Path], eps: float
) -> None:
    q, k, v, gradient = Case(16, queries=20, keys=20).inputs()
    q[:, :, 7] = 0
    result = run(LinearAttention(libraries), q, k, v, gradient, eps)
    assert (result["out"][:, :, 7] == 0).all()
    assert all(x.isfinite().all() for x in result.values())
    assert (result["dq"][:, :, 7] == 0).all()


def test_splits_fill_the_gpu_and_stay_worth_it(libraries: dict[str, Path]) -> None:
    def splits(batch_heads: int, tokens: int) -> int:
        emulated = LinearAttention(libraries, multiprocessors=132)
        return emulated.splits(emulated.library.linear_attention_num_splits, batch_heads, tokens)

    assert splits(1, 1 << 20) == 264  # one head of one long sequence: two blocks a multiprocessor
    assert splits(768, 64) == 1  # many short ones
    assert splits(768, 1 << 20) == 16  # no more than 65,536 tokens in one float32 sum
    assert splits(1, 300) == 2  # at least 256 tokens a split
    assert splits(0, 64) == splits(64, 0) == 1


# ---- do these tests fail when they should? -------------------------------------------------------

MUTATIONS = (
    Mutation(
        "swap the halves of phi",
        "linear_attention/cuda.cu",
        "phi[0][i] = positive_part(x);",
        "phi[0][i] = negative_part(x);",
    ),
    Mutation(
        "skip dz",
        "linear_attention/cuda.cu",
        "dphi[0][i][j] + dz[feature],",
        "dphi[0][i][j],",
    ),
    Mutation(
        "no barrier before the result's tile",
        "linear_attention/cuda.cu",
        "__syncthreads();  // q has been read: its tile now takes the result",
        "",
    ),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "drop the last tile of tokens",
        "linear_attention/cuda.cu",
        "first < chunk_end; first += Tile::kTokens",
        "first + Tile::kTokens < chunk_end; first += Tile::kTokens",
    ),
    Mutation(
        "drop a split",
        "linear_attention/cuda.cu",
        "split < p.num_splits; ++split) sum",
        "split + 1 < p.num_splits; ++split) sum",
    ),
    Mutation(
        "no barrier between tiles",
        "linear_attention/cuda.cu",
        "__syncthreads();  // the tile before has been read",
        "",
    ),
    Mutation(
        "no eps",
        "linear_attention/cuda.cu",
        "E[i] = row_sum(sum) + eps;",
        "E[i] = row_sum(sum);",
    ),
    Mutation(
        "weight of the wrong sign",
        "linear_attention/cuda.cu",
        "const float weight = -(row_sum(dot)",
        "const float weight = (row_sum(dot)",
    ),
    Mutation(
        "one query head of a group",
        "linear_attention/cuda.cu",
        "for (int64_t g = 0; g < p.group; ++g) {",
        "for (int64_t g = 0; g < 1; ++g) {",
    ),
    Mutation(
        "rows of the wrong state",
        "linear_attention/cuda.cu",
        "block.batch * (p.heads / p.group) + block.head / p.group;\n\n",
        "block.batch * (p.heads / p.group) + block.head % (p.heads / p.group);\n\n",
    ),
    Mutation(
        "columns of the wrong lane",
        "linear_attention/cuda.cu",
        "positive[j] = slab.value[f * D + tx + kSide * j];",
        "positive[j] = slab.value[f * D + (tx ^ 1) + kSide * j];",
    ),
    Mutation(
        "gradient at zero's wrong side",
        "linear_attention/cuda.cu",
        "x < 0.0f ? -by_negative : x;",
        "x < 0.0f ? by_negative : x;",
    ),
    Mutation(
        "no edge mask on stores",
        "cuda/common.cuh",
        "if (row >= valid) return;",
        "",
    ),
    Mutation(
        "no edge mask on loads",
        "cuda/common.cuh",
        "if (row < valid) {",
        "if (true) {",
    ),
    Mutation(
        "rows in the wrong lane",
        "cuda/common.cuh",
        "tile[(y + kSide * i) * kPitch + x + kSide * j]",
        "tile[(y * kRows + i) * kPitch + x + kSide * j]",
    ),
    Mutation(
        "half of a row's sum",
        "cuda/common.cuh",
        "for (int lane = kSide / 2; lane > 0; lane /= 2) value +=",
        "for (int lane = kSide / 2; lane > 1; lane /= 2) value +=",
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
from tests.cuda_host import test_linear_attention as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
case = t.Case(32, heads=4, queries=37, keys=35, num_splits=2)
for layout in ("contiguous", "misaligned"):
    t.check(libraries, t.replace(case, layout=layout))
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    assert_sanitizers_find_nothing(ROOM, NARROW, tmp_path, SANITIZED)
