"""Softmax attention's CUDA kernels on the host: see emulator.py."""

import ctypes
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_vit.kernels.softmax_attention import reference
from tests.cuda_host.checks import (
    DTYPES,
    HEAD_DIMS,
    ORDERS,
    Case,
    Mutation,
    assert_accurate,
    assert_sanitizers_find_nothing,
    double,
    first_failure,
    grad,
    needs_compiler,
    see_red,
)
from tests.cuda_host.emulator import ELEMENT_TYPES, build_once, guarded
from tests.cuda_host.softmax_attention import SoftmaxAttention

ROOM = "softmax_attention"
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    return build_once(ROOM)


def run(
    emulated: SoftmaxAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    scale: float | None = None,
) -> dict[str, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = emulated.softmax_attention(q, k, v, scale)
    dq, dk, dv = emulated.softmax_attention_backward(gradient, q, k, v, out, lse, scale)
    emulated.check_guards()
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_for_what_is_not_wanted_are_left_out(
    libraries: dict[str, Path], dtype: torch.dtype
) -> None:
    """dq alone leaves dk and dv unwritten, dv alone dq; each with the same bits as all three."""
    q, k, v, dout = (torch.randn(1, 2, 70, 32).to(dtype) for _ in range(4))
    found = {}
    for wanted in (0b111, 0b001, 0b100):
        emulated = SoftmaxAttention(libraries)
        out, lse = emulated.softmax_attention(q, k, v, 0.2)
        gradients = emulated.softmax_attention_backward(dout, q, k, v, out, lse, 0.2, wanted)
        found[wanted] = gradients
        written = {name for name, moved in emulated.traffic().items() if moved.stored}
        assert ("dq" in written) == (wanted != 0b100)
        assert ("dv" in written) == (wanted != 0b001)
    assert torch.equal(found[0b001][0], found[0b111][0])
    assert torch.equal(found[0b100][2], found[0b111][2])


def expect(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float | None = None
) -> dict[str, Tensor]:
    """What :func:`run` gives, from the definition in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = double(q, k, v)
    out = reference.softmax_attention(*exact, scale)
    out.backward(gradient.double())
    keys = exact[1].detach().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    lse = (exact[0].detach() @ keys.mT * scale).logsumexp(dim=-1)
    gradients = {f"d{name}": grad(x) for name, x in zip("qkv", exact, strict=True)}
    return {"out": out.detach(), "lse": lse, **gradients}


def assert_all_accurate(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert_accurate(name, actual[name], x, gradient=name[0] == "d")


def check(libraries: dict[str, Path], case: Case) -> dict[str, Tensor]:
    emulated = SoftmaxAttention(libraries, thread_order=case.order)
    inputs = case.inputs()
    actual = run(emulated, *inputs)
    assert_all_accurate(actual, expect(*inputs))
    return actual


# ---- numbers -------------------------------------------------------------------------------------

# What is cheap and finds most: every head dim, dtype, layout and order once.
CASES = (
    Case(16, torch.bfloat16, queries=130, keys=33, layout="misaligned", order="reverse"),
    Case(32, heads=4, queries=133, keys=70, order="strided"),
    Case(48, torch.float16, heads=6, kv_heads=3, layout="expanded"),
    Case(64, torch.bfloat16, layout="packed", order="reverse"),
    Case(64, batch=2, heads=1, kv_heads=1, queries=1, keys=2),
    Case(96, torch.float16, heads=1, kv_heads=1, queries=65, keys=31, order="reverse"),
    Case(128, torch.bfloat16, heads=2, kv_heads=1, queries=33, keys=65),
)
MORE_CASES = (
    *(
        Case(head_dim, dtype, 1, 4, 2, 133, 70, layout, order)
        for head_dim in HEAD_DIMS
        for dtype, order, layout in zip(
            DTYPES, ORDERS, ("misaligned", "contiguous", "expanded"), strict=True
        )
    ),
    Case(16, heads=1, kv_heads=1, queries=5, keys=1500),
    Case(16, heads=1, kv_heads=1, queries=1100, keys=5),
    # Weights are subnormal in float16, and dS is carried times 4.
    Case(16, torch.float16, heads=1, kv_heads=1, queries=5, keys=5000),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(libraries: dict[str, Path], case: Case) -> None:
    check(libraries, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_more_numbers(libraries: dict[str, Path], case: Case) -> None:
    check(libraries, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit_whatever_the_thread_order(
    libraries: dict[str, Path], dtype: torch.dtype
) -> None:
    case = Case(32, dtype, heads=2, kv_heads=1, queries=40, keys=50)
    runs = [check(libraries, replace(case, order=order)) for order in ORDERS]
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_the_same(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    """One (B, N, 3, H, D) tensor, read in place, and one gradient in its memory order."""
    q, k, v, gradient = Case(32, dtype, batch=2, heads=3, kv_heads=3, layout="packed").inputs()
    separate = run(SoftmaxAttention(libraries), q, k, v, gradient)
    emulated = SoftmaxAttention(libraries)
    qkv = guarded(torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2))
    scale = q.shape[-1] ** -0.5
    out, lse = emulated.softmax_attention_packed(qkv, scale)
    dout = gradient.transpose(1, 2)
    dqkv = emulated.softmax_attention_packed_backward(dout, qkv, out, lse, scale)
    emulated.check_guards()
    assert torch.equal(out.transpose(1, 2), separate["out"])
    for index, name in enumerate(("dq", "dk", "dv")):
        assert torch.equal(dqkv[:, :, index].transpose(1, 2), separate[name]), name


# ---- traffic -------------------------------------------------------------------------------------

# Rows that a block owns, as in cuda.cu's header: forward, query_gradient, key_value_gradient.
OWNED = {
    (torch.float32, 64): (64, 64, 64),
    (torch.bfloat16, 64): (128, 64, 64),
    (torch.float16, 128): (64, 64, 64),
}


@pytest.mark.parametrize(("dtype", "head_dim"), OWNED, ids=str)
def test_traffic(libraries: dict[str, Path], dtype: torch.dtype, head_dim: int) -> None:
    """A block's own rows move once, the other side once per block; all of it 16 bytes at a time."""
    forward, query_gradient, key_value_gradient = OWNED[dtype, head_dim]
    case = Case(head_dim, dtype, heads=4, kv_heads=2, queries=130, keys=70)
    q, k, v, dout = case.inputs()
    emulated = SoftmaxAttention(libraries)
    emulated.watch(q=q, k=k, v=v, dout=dout)
    scale = head_dim**-0.5
    out, lse = emulated.softmax_attention(q, k, v, scale)
    traffic = emulated.traffic()
    size = {"q": 4 * 130 * head_dim * q.itemsize, "k": 2 * 70 * head_dim * q.itemsize}
    blocks = 2 * -(-130 // forward)  # that read a key/value head: two query heads share it
    assert traffic["q"].loaded_wide == traffic["q"].loaded == size["q"]
    assert traffic["k"].loaded_wide == traffic["k"].loaded == blocks * size["k"]
    assert traffic["v"].loaded == blocks * size["k"]
    assert traffic["out"].stored_wide == traffic["out"].stored == size["q"]
    assert traffic["lse"].stored == 4 * 4 * 130
    assert traffic["other"].loaded == traffic["other"].stored == 0

    emulated.watch_nothing()
    emulated.watch(q=q, k=k, v=v, dout=dout, out=out, lse=lse)
    emulated.softmax_attention_backward(dout, q, k, v, out, lse, scale)
    traffic = emulated.traffic()
    blocks = 2 * -(-130 // query_gradient)
    key_blocks = -(-70 // key_value_gradient)
    assert traffic["k"].loaded_wide == traffic["k"].loaded == (blocks + 1) * size["k"]
    assert traffic["v"].loaded == (blocks + 1) * size["k"]
    assert traffic["q"].loaded_wide == traffic["q"].loaded == (1 + key_blocks) * size["q"]
    assert traffic["dout"].loaded == (1 + key_blocks) * size["q"]
    assert traffic["out"].loaded_wide == traffic["out"].loaded == size["q"]
    for name, like in (("dq", "q"), ("dk", "k"), ("dv", "k")):
        assert traffic[name].stored_wide == traffic[name].stored == size[like]
        assert traffic[name].loaded == 0
    assert traffic["delta"].stored == 4 * 4 * 130
    assert traffic["other"].loaded == traffic["other"].stored == 0


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_zero_weighs_all_alike(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    inputs = Case(16, dtype, heads=2, kv_heads=1, queries=33, keys=70).inputs()
    actual, expected = run(SoftmaxAttention(libraries), *inputs, 0.0), expect(*inputs, 0.0)
    for name in ("dq", "dk"):
        assert (actual[name] == 0).all()
        del expected[name]
    assert_all_accurate(actual, expected)


def _check_negative_scale(libraries: dict[str, Path], head_dim: int, dtype: torch.dtype) -> None:
    inputs = Case(head_dim, dtype, heads=2, kv_heads=1, queries=33, keys=70).inputs()
    assert_all_accurate(run(SoftmaxAttention(libraries), *inputs, -0.3), expect(*inputs, -0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_negative_scale(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    _check_negative_scale(libraries, 16, dtype)


def _check_far_below_zero(libraries: dict[str, Path], head_dim: int, dtype: torch.dtype) -> None:
    q, k, v, gradient = Case(head_dim, dtype, heads=1, kv_heads=1, queries=40, keys=37).inputs()
    q, k = (q + 24).contiguous(), (k - 24).contiguous()
    actual, expected = (
        run(SoftmaxAttention(libraries), q, k, v, gradient),
        expect(q, k, v, gradient),
    )
    assert actual["lse"].max() < -1000
    assert all(x.isfinite().all() for x in actual.values())
    # Scores of 1e3 are off by 1e-4 in float32 already, which is more than SPEC's tolerances.
    torch.testing.assert_close(actual["out"].double(), expected["out"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    """The rows of zeros that fill a tile of keys score highest, and must not count."""
    _check_far_below_zero(libraries, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_keys_gives_zeros(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    q, k, v, gradient = Case(16, dtype, queries=3, keys=0).inputs()
    result = run(SoftmaxAttention(libraries), q, k, v, gradient)
    assert torch.equal(result["out"], torch.zeros_like(q))
    assert torch.equal(result["dq"], torch.zeros_like(q))
    assert result["dk"].shape == k.shape
    assert (result["lse"] == -torch.inf).all()


def _check_mask(libraries: dict[str, Path], head_dim: int, dtype: torch.dtype) -> None:
    """As if masked keys were not there; a sequence without any gives zeros."""
    case = Case(head_dim, dtype, batch=4, heads=2, kv_heads=1, queries=37, keys=140)
    q, k, v, gradient = case.inputs()
    there = torch.ones(4, 140, dtype=torch.bool)
    there[0, ::2], there[1, :133], there[2] = False, False, False
    k, v = (guarded(x.masked_fill(~there[:, None, :, None], 0)) for x in (k, v))
    emulated = SoftmaxAttention(libraries)
    emulated.key_mask = there
    found = run(emulated, q, k, v, gradient)
    for b, mask in enumerate(there):
        one = slice(b, b + 1)
        expected = expect(q[one], k[one][:, :, mask], v[one][:, :, mask], gradient[one])
        for name, x in expected.items():
            masked = found[name][one]
            if name in ("dk", "dv"):
                masked = masked[:, :, mask]
            if mask.any():
                assert_all_accurate({name: masked}, {name: x})
    for name in ("out", "dq"):
        assert torch.equal(found[name][2], torch.zeros_like(found[name][2]))
    assert (found["lse"][2] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 96])
def test_masked_keys_are_not_there(
    libraries: dict[str, Path], head_dim: int, dtype: torch.dtype
) -> None:
    _check_mask(libraries, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}])
def test_no_queries_and_no_batch(
    libraries: dict[str, Path], empty: dict[str, int], dtype: torch.dtype
) -> None:
    q, k, v, gradient = replace(Case(16, dtype, keys=3), **empty).inputs()
    result = run(SoftmaxAttention(libraries), q, k, v, gradient)
    assert result["out"].shape == q.shape
    assert torch.equal(result["dk"], torch.zeros_like(k))
    assert torch.equal(result["dv"], torch.zeros_like(v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_where_it_must_and_nowhere_else(
    libraries: dict[str, Path], dtype: torch.dtype
) -> None:
    clean = Case(16, dtype, queries=70, keys=40).inputs()

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


def test_the_tiles_are_described(libraries: dict[str, Path]) -> None:
    library = SoftmaxAttention(libraries).library
    line = ctypes.create_string_buffer(128)
    library.softmax_attention_describe(ELEMENT_TYPES[torch.bfloat16], 64, line, len(line))
    assert line.value == b"mma.sync m16n8k16, 128 x 64 rows forward, 64 x 32 backward, 128 threads"
    library.softmax_attention_describe(ELEMENT_TYPES[torch.float32], 17, line, len(line))
    assert line.value == b""


# ---- do these tests fail when they should? -------------------------------------------------------

HALF, FLOAT32 = "softmax_attention/half.cuh", "softmax_attention/float32.cuh"
PROBLEM = "softmax_attention/problem.cuh"  # of both

MUTATIONS = (
    Mutation(
        "no barrier before q's stage is refilled",
        HALF,
        "__syncthreads();  // q has been read: its stage takes the second tile",
        "",
    ),
    Mutation(
        "no wait for the copies of q and dout",
        HALF,
        "if (tiles > 1) put_statistic(stage ^ 1);\n    ptx::cp_async_wait<0>();",
        "if (tiles > 1) put_statistic(stage ^ 1);",
    ),
    Mutation(
        "keys past the end count",
        HALF,
        "for (int i = 0; i < kRowTiles; ++i) score[i][j][e] = -kInfinity;",
        ";",
    ),
    Mutation(
        "a operands in the wrong lanes",
        HALF,
        "corner + lane % 16 * kPitch<D> + lane / 16 * 8",
        "corner + lane / 2 * kPitch<D> + lane % 2 * 8",
    ),
    Mutation(
        "drop the last tile of queries in float32",
        FLOAT32,
        "first < a.query_tokens; first += kTile",
        "first + kTile < a.query_tokens; first += kTile",
    ),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "no wait for the copies of keys, forward",
        HALF,
        "    ptx::cp_async_wait<0>();\n"
        "    __syncthreads();  // the next tile is there, and this one has been read\n  }\n"
        "  if (!busy) return;\n\n  float inverse",
        "    __syncthreads();\n  }\n  if (!busy) return;\n\n  float inverse",
    ),
    Mutation(
        "no barrier between tiles of keys, backward",
        HALF,
        "    __syncthreads();  // the next tile is there, and this one has been read\n  }\n"
        "  if (!busy) return;\n  const float factor",
        "  }\n  if (!busy) return;\n  const float factor",
    ),
    Mutation(
        "no barrier between tiles of queries",
        HALF,
        "    __syncthreads();  // the next tile is there, and this one has been read\n  }\n"
        "  if (!busy) return;\n  const float dk_factor",
        "  }\n  if (!busy) return;\n  const float dk_factor",
    ),
    Mutation(
        "no barrier before out's stage is refilled",
        HALF,
        "__syncthreads();  // out has been read: its stage takes the second tile",
        "",
    ),
    Mutation(
        "the warp does not wait for its rows of the result",
        HALF,
        "  __syncwarp();\n  auto store",
        "  auto store",
    ),
    Mutation(
        "rows past the end are read",
        HALF,
        "inside ? 16 : 0",
        "16",
    ),
    Mutation(
        "rows past the end are stored",
        HALF,
        "if (row >= valid) break;",
        "",
    ),
    Mutation(
        "transposed b operands in the wrong lanes",
        HALF,
        "x + (16 * k + lane % 16) * kPitch<D> + 16 * j + lane / 16 * 8",
        "x + (16 * k + lane / 16 * 8 + lane % 8) * kPitch<D> + 16 * j + lane / 8 % 2 * 8",
    ),
    Mutation(
        "b operands in the wrong lanes",
        HALF,
        "x + (16 * j + lane / 16 * 8 + lane % 8) * kPitch<D> + 16 * k +\n"
        "                                 lane / 8 % 2 * 8",
        "x + (16 * j + lane % 16) * kPitch<D> + 16 * k + lane / 16 * 8",
    ),
    Mutation(
        "the sum is not rescaled",
        HALF,
        "sum[i][half] *= rescale;",
        "",
    ),
    Mutation(
        "a tile without a key makes no numbers",
        PROBLEM,
        "kMasked ? -1e38f : -kInfinity",
        "-kInfinity",
    ),
    Mutation(
        "the mask is that of the first sequence",
        PROBLEM,
        "a.key_mask + batch * a.key_tokens + first",
        "a.key_mask + batch * 0 + first",
    ),
    Mutation(
        "one half of the row's lanes",
        HALF,
        "  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));\n",
        "",
    ),
    Mutation(
        "no delta",
        HALF,
        "p * (dp[0][j][e] * a.dscore_scale - delta[e / 2]);",
        "p * (dp[0][j][e] * a.dscore_scale);",
    ),
    Mutation(
        "keys past the end have a gradient",
        HALF,
        "if (!present.there(j, e % 2)) score[0][j][e] = 0.0f;",
        "",
    ),
    Mutation(
        "statistics of the tile before",
        HALF,
        "if (tiles > 1) put_statistic(stage ^ 1);",
        "",
    ),
    Mutation(
        "one query head of a group reads",
        HALF,
        "      first = 0;\n      ++head;",
        "      first = 0;",
    ),
    Mutation(
        "a negative scale is taken for a positive one",
        HALF,
        "pair = ptx::negate2<T>(pair);",
        "pair = pair;",
    ),
    Mutation(
        "keys past the end count in float32",
        FLOAT32,
        "score[i][j] = key.there(tx + kSide * j) ? score[i][j] * to_log2 : -kInfinity;",
        "score[i][j] = score[i][j] * to_log2;",
    ),
    Mutation(
        "the sum is not rescaled in float32",
        FLOAT32,
        "sum[i] = sum[i] * rescale[i] + row_sum(tile_sum);",
        "sum[i] = sum[i] + row_sum(tile_sum);",
    ),
    Mutation(
        "no delta in float32",
        FLOAT32,
        "ds = p * (dp[i][j] - shared.delta[query]) * a.scale;",
        "ds = p * dp[i][j] * a.scale;",
    ),
    Mutation(
        "no barrier before out is read",
        FLOAT32,
        "    one[i] = 1.0f;\n  }\n  __syncthreads();",
        "    one[i] = 1.0f;\n  }",
    ),
    Mutation(
        "queries past the end count in float32",
        FLOAT32,
        "if (query < valid) {",
        "if (true) {",
    ),
    Mutation(
        "one query head of a group reads in float32",
        FLOAT32,
        "head < (block.head + 1) * a.group; ++head",
        "head < block.head * a.group + 1; ++head",
    ),
    Mutation(
        "no barrier before keys are read",
        FLOAT32,
        "__syncthreads();\n    float score[B::kPerThread][kTilePerThread], rescale",
        "float score[B::kPerThread][kTilePerThread], rescale",
    ),
    Mutation(
        "no barrier before dS is read",
        FLOAT32,
        "__syncwarp();\n    accumulate<D>(dq, one",
        "accumulate<D>(dq, one",
    ),
)


def narrow(file: str) -> tuple[torch.dtype, tuple[str, ...]]:
    """One head dim and the element type of the file's kernels: a mutant compiles in seconds."""
    dtype, name = (torch.float32, "float") if file == FLOAT32 else (torch.float16, "__half")
    return dtype, ("-DLINEAR_VIT_HEAD_DIMS=32", f"-DLINEAR_VIT_ELEMENT_TYPES={name}")


def narrow_checks(file: str, libraries: dict[str, Path]) -> list:
    dtype, _ = narrow(file)
    cases = (
        Case(32, dtype, heads=4, queries=133, keys=70),
        Case(32, dtype, heads=1, kv_heads=1, queries=21, keys=21),  # less than a tile
        Case(32, dtype, heads=1, kv_heads=1, queries=70, keys=140),
    )
    return [
        *(
            partial(check, libraries, replace(case, order=order))
            for order in ("forward", "reverse")
            for case in cases
        ),
        partial(_check_negative_scale, libraries, 32, dtype),
        partial(_check_far_below_zero, libraries, 32, dtype),
        partial(_check_mask, libraries, 32, dtype),
    ]


def see_mutation_red(mutation: Mutation, folder: Path) -> None:
    _, flags = narrow(mutation.file)
    see_red(mutation, ROOM, flags, folder, partial(narrow_checks, mutation.file))


@pytest.mark.parametrize("mutation", MUTATIONS[:2], ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_mutation_red(mutation, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [*MUTATIONS[2:], *MORE_MUTATIONS], ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_mutation_red(mutation, tmp_path)


@pytest.mark.parametrize("file", [HALF, FLOAT32])
def test_unbroken_kernels_pass(file: str) -> None:
    """Built as the mutants are: that these go red is then due to the mutation."""
    _, flags = narrow(file)
    assert first_failure(narrow_checks(file, build_once(ROOM, flags))) is None


SANITIZED = """
import sys
from pathlib import Path
import torch
from tests.cuda_host import test_softmax_attention as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
case = t.Case(32, torch.DTYPE, heads=4, queries=37, keys=35)
for layout in ("contiguous", "misaligned"):
    t.check(libraries, t.replace(case, layout=layout))
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", [HALF, FLOAT32])
def test_sanitizers_find_nothing(file: str, tmp_path: Path) -> None:
    dtype, flags = narrow(file)
    script = SANITIZED.replace("torch.DTYPE", str(dtype))
    assert_sanitizers_find_nothing(ROOM, flags, tmp_path, script)
