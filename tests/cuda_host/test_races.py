"""Races, which the emulator's one order of threads can hide: see races.h."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from linear_vit.kernels.ripple.stages import level_shapes
from tests.cuda_host import emulator, races, test_linear_attention, test_ripple
from tests.cuda_host import test_softmax_attention as test_softmax
from tests.cuda_host.checks import (
    DTYPES,
    HEAD_DIMS,
    Case,
    Mutation,
    first_failure,
    needs_compiler,
    see_red,
)
from tests.cuda_host.emulator import Emulator, build, build_once, structure
from tests.cuda_host.linear_attention import LinearAttention
from tests.cuda_host.ripple import RippleOperators
from tests.cuda_host.softmax_attention import SoftmaxAttention
from tests.cuda_host.test_ripple import Grid, Pyramid

pytestmark = needs_compiler
Checks = list[Callable[[], object]]


# ---- one race each -------------------------------------------------------------------------------

READ = "reads what another wrote, with no barrier between"
OVERWRITTEN = "writes what another read, with no barrier between"
TWICE = "writes what another wrote, with no barrier between"
ON_ITS_WAY = "where a copy is on its way"
# By the number of the case in racy.cu.
KINDS = {
    0: None, 1: READ, 2: None, 3: READ, 4: OVERWRITTEN, 5: None, 6: OVERWRITTEN, 7: TWICE,
    8: "reads what was never written", 9: None, 10: READ, 11: f"reads {ON_ITS_WAY}", 12: None,
    13: f"writes {ON_ITS_WAY}", 14: OVERWRITTEN, 15: READ, 16: None,
    17: "threads meet at two different __syncthreads()",
    18: f"global.*{TWICE}", 19: "global.*writes what another block wrote", 20: None,
    21: f"global.*{READ}",
}  # fmt: skip


class Racy(Emulator):
    room = "racy"

    def run(self, which: int) -> None:
        x, out = torch.zeros(512), torch.zeros(512)
        arguments = structure("Racy", "i which; p in out")(which, x.data_ptr(), out.data_ptr())
        self.launch("racy", arguments)


@pytest.fixture(scope="module")
def racy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = {"racy": emulator.HERE / "racy.cu"}
    return build(source, tmp_path_factory.mktemp("racy"), races.FLAGS)


@pytest.mark.parametrize("order", emulator.THREAD_ORDERS)
def test_each_kind_of_race_is_found_and_nothing_else(racy: dict[str, Path], order: str) -> None:
    for which, fault in KINDS.items():
        emulated = Racy(racy, thread_order=order)
        if fault is None:
            emulated.run(which)
        else:  # in another order, what is read and then overwritten is overwritten and then read
            message = fault if order == "forward" else r"race: |two different __syncthreads\(\)"
            with pytest.raises(RuntimeError, match=message):
                emulated.run(which)


def test_a_race_is_told_with_its_places(racy: dict[str, Path]) -> None:
    """The byte, the threads, the lines of both accesses and of their calls, and the kernel."""
    with pytest.raises(RuntimeError) as raised:
        Racy(racy).run(1)
    assert (
        re.fullmatch(
            r"racy: error 719, race: shared memory, byte 160, block 0: thread 0 reads .* between; "
            r"at racy.cu:\d+ < .*racy_kernel; thread 40 at racy.cu:\d+ < .*racy_kernel",
            str(raised.value),
        )
        or shutil.which("addr2line") is None
    )


# ---- the kernels ---------------------------------------------------------------------------------


def check_linear_attention(libraries: dict[str, Path], dtype: torch.dtype, head_dim: int) -> Checks:
    """Every launch: by steps and in one, with the state kept or not, with room for two stages of
    queries or for one, in parts; ragged and long; tensors that can't be copied asynchronously."""
    case = Case(head_dim, dtype, heads=2, kv_heads=1, queries=210, keys=290, num_splits=2)
    alone = replace(case, num_splits=None)
    cases = (
        (replace(case, order="strided"), False, False),
        (alone, True, False),
        (replace(alone, queries=133, keys=70, order="reverse"), False, False),
        (replace(alone, heads=1, queries=70, keys=500), False, False),
        (replace(alone, heads=1, queries=7, keys=5, layout="misaligned"), False, False),
        (replace(case, queries=150, keys=150, num_splits=5, layout="misaligned"), True, True),
    )
    checks: Checks = [
        partial(test_linear_attention.check, libraries, of, save_state=save_state, parts=parts)
        for of, save_state, parts in cases
    ]

    def only_queries() -> None:
        q, k, v, dout = case.inputs()
        for splits in (2, None):
            emulated = LinearAttention(libraries, num_splits=splits)
            S, z = emulated.linear_attention_state(k, v)
            emulated.linear_attention_backward(dout, q, k, v, S, z, 1e-6, only_dq=True)
            emulated.linear_attention_apply_backward(dout, q, S, z, 1e-6, only_dq=True)

    return [*checks, only_queries]


def check_softmax_attention(
    libraries: dict[str, Path], dtype: torch.dtype, head_dim: int
) -> Checks:
    case = Case(head_dim, dtype, heads=2, kv_heads=1, queries=133, keys=70)
    alone = replace(case, heads=1)
    cases = (
        case,
        replace(alone, queries=20, keys=200, order="reverse"),
        replace(alone, queries=7, keys=5),
        replace(alone, queries=70, layout="misaligned", order="strided"),
    )

    def masked() -> None:
        for keys, wanted in ((70, 0b111), (100, 0b001), (40, 0b110)):
            q, k, v, dout = Case(head_dim, dtype, 2, 1, 1, 40, keys).inputs()
            emulated = SoftmaxAttention(libraries)
            emulated.key_mask = torch.arange(2 * keys).reshape(2, keys) % 3 > 0
            out, lse = emulated.softmax_attention(q, k, v, 0.2)
            emulated.softmax_attention_backward(dout, q, k, v, out, lse, 0.2, wanted)

    return [*(partial(test_softmax.check, libraries, of) for of in cases), masked]


def check_ripple(libraries: dict[str, Path], dtype: torch.dtype, head_dim: int) -> Checks:
    del head_dim
    grids = (
        Grid((2, 5, 7, 40), 0, dtype, num_splits=2),
        Grid((1, 8, 5, 136), 1, dtype, "transposed", "strided"),
        Grid((1, 4, 7, 33), 0, dtype, "misaligned", "reverse", None),
    )
    pyramids = (
        Pyramid((3, 5, 7, 24), (0, 1, 0), dtype, num_splits=2),
        Pyramid((1, 5, 7, 24), (0,), dtype),
        Pyramid((5, 9, 11, 88), (1, 0, 1, 0), dtype, "misaligned", "reverse", 3),
        Pyramid((3, 8, 8, 64), (0, 1), dtype, order="strided", num_splits=None),
    )

    def no_weights() -> None:
        """Without their gradients nothing is summed, and an image follows the one before."""
        for axes in ((0, 1), (0,)):
            case = Pyramid((3, 5, 7, 24), axes, dtype)
            normal, shapes = case.normal(), level_shapes(case.shape, axes)
            levels, dlevels = ([normal(*shape) for shape in of] for of in (shapes[:-1], shapes[1:]))
            weights, pairs = [normal(24, 3, 3) for _ in axes], [normal(2, 24) for _ in axes]
            emulated = RippleOperators(libraries, num_splits=1)
            emulated.ripple_pool_stages_backward(dlevels, levels, weights, axes, 0b1)
            inputs = (normal(*shapes[0]), normal(*shapes[-1]), levels, pairs, weights, axes)
            emulated.ripple_expand_stages_backward(*inputs, (2 << len(axes)) - 1)

    return [
        *(partial(test_ripple.check, libraries, grid) for grid in grids),
        *(partial(test_ripple.check_pyramid, libraries, pyramid) for pyramid in pyramids),
        no_weights,
    ]


CHECKS = {
    "linear_attention": check_linear_attention,
    "softmax_attention": check_softmax_attention,
    "ripple": check_ripple,
}
NAMES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def flags(dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Of one element type and head dim, looking for races."""
    narrow = (f"-DLINEAR_VIT_HEAD_DIMS={head_dim}", f"-DLINEAR_VIT_ELEMENT_TYPES={NAMES[dtype]}")
    return (*narrow, *races.FLAGS)


def assert_no_races(room: str, dtype: torch.dtype, head_dim: int, *more: str) -> None:
    libraries = build_once(room, (*flags(dtype, head_dim), *more))
    failure = first_failure(CHECKS[room](libraries, dtype, head_dim))
    assert failure is None, failure


def test_a_kernel_has_no_races() -> None:
    assert_no_races("linear_attention", torch.float16, 32)


ALL = [
    *(("ripple", dtype, 32) for dtype in DTYPES),
    *(
        (room, dtype, head_dim)
        for room in ("linear_attention", "softmax_attention")
        for dtype in DTYPES
        for head_dim in HEAD_DIMS
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("room", "dtype", "head_dim"), ALL, ids=str)
def test_no_kernel_has_races(room: str, dtype: torch.dtype, head_dim: int) -> None:
    assert_no_races(room, dtype, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 96])
def test_matrices_that_are_stored_word_by_word_have_no_races(head_dim: int) -> None:
    """As on GPUs before compute capability 9.0."""
    flag = "-DLINEAR_VIT_NO_STMATRIX"
    assert_no_races("linear_attention", torch.bfloat16, head_dim, flag)


# ---- broken kernels ------------------------------------------------------------------------------

HALF, KERNELS = "linear_attention/half.cuh", "linear_attention/half_kernels.cuh"
FLOAT = "linear_attention/float32.cuh"
SOFTMAX, SOFTMAX_FLOAT = test_softmax.HALF, test_softmax.FLOAT32
RIPPLE = "ripple/cuda.cu"

# These give the right numbers in every order of threads that the emulator has.
SILENT = (
    Mutation("no barrier between a warp's rows and their reads", HALF, "  __syncwarp();\n", ""),
    Mutation(
        "no barrier within a warp before g / E takes g's place",
        FLOAT,
        "__syncwarp();  // a row",
        "// a row",
    ),
    Mutation(
        "no barrier before the weights are read",
        SOFTMAX_FLOAT,
        "    __syncwarp();\n    accumulate<D>(out, rescale",
        "    accumulate<D>(out, rescale",
    ),
    Mutation(
        "no barrier before an image takes another's place",
        RIPPLE,
        "    if constexpr (!kSummed) __syncthreads();  // the image before has been read\n"
        "    // add_block_sums has met since the image before was read\n"
        "    if (place.inside) {\n      if constexpr (kSummed) {",
        "    if (place.inside) {\n      if constexpr (kSummed) {",
    ),
)
MUTATIONS = (
    Mutation(
        "one copy too many on its way",
        HALF,
        "if constexpr (kStages > 1) ptx::cp_async_wait<kStages - 2>();",
        "if constexpr (kStages > 1) ptx::cp_async_wait<kStages - 1>();",
    ),
    Mutation(
        "the tile that is read is the next to be filled",
        HALF,
        "if (tile + kStages - 1 < end) load(last);",
        "if (tile + kStages - 1 < end) load(stage);",
    ),
    Mutation(
        "the copies of keys that stay are not waited for",
        KERNELS,
        "ptx::cp_async_wait<1>();\n    __syncthreads();  // every key",
        "ptx::cp_async_wait<2>();\n    __syncthreads();  // every key",
    ),
    Mutation(
        "the copies of the only query tile are not waited for",
        HALF,
        "ptx::cp_async_wait<0>();\n      __syncthreads();  // the tile is here",
        "ptx::cp_async_wait<1>();\n      __syncthreads();  // the tile is here",
    ),
    Mutation(
        "no barrier before the warps' sums are read",
        HALF,
        "scratch[warp_index()] = x;\n  __syncthreads();",
        "scratch[warp_index()] = x;",
    ),
    Mutation(
        "no barrier before a token warp's sums are written",
        HALF,
        "        __syncthreads();\n        if (token_warp() == warp) {",
        "        if (token_warp() == warp) {",
    ),
    Mutation(
        "no barrier before dS is read",
        KERNELS,
        "__syncthreads();  // dS is there",
        "",
    ),
    Mutation(
        "half of the warps skip a barrier",
        HALF,
        "__syncthreads();  // g / E and the weights are there",
        "if (warp_index() < 4) __syncthreads();  // g / E and the weights are there",
    ),
    Mutation(
        "no barrier before the result takes q's place",
        FLOAT,
        "__syncthreads();  // q has been read",
        "// q has been read",
    ),
    Mutation(
        "no barrier before the slab is overwritten",
        FLOAT,
        "__syncthreads();  // x has been written, the slab before has been read",
        "",
    ),
    Mutation(
        "one tile of keys too many on its way, forward",
        SOFTMAX,
        "    ptx::cp_async_wait<0>();\n"
        "    __syncthreads();  // the next tile is there, and this one has been read\n  }\n"
        "  if (!busy) return;\n\n  float inverse",
        "    ptx::cp_async_wait<1>();\n"
        "    __syncthreads();\n  }\n"
        "  if (!busy) return;\n\n  float inverse",
    ),
    Mutation(
        "the stage that is read is filled, forward",
        SOFTMAX,
        "kLeast<kMasked>;\n  int stage = 0;\n"
        "  for (int64_t first = 0; first < a.key_tokens; first += kPassed, stage ^= 1) {\n"
        "    if (first + kPassed < a.key_tokens) copy(stage ^ 1,",
        "kLeast<kMasked>;\n  int stage = 0;\n"
        "  for (int64_t first = 0; first < a.key_tokens; first += kPassed, stage ^= 1) {\n"
        "    if (first + kPassed < a.key_tokens) copy(stage,",
    ),
    Mutation(
        "no barrier before the warps' sums are read",
        RIPPLE,
        "    __syncthreads();\n    for (int c = thread; c < count * width",
        "    for (int c = thread; c < count * width",
    ),
)
# Those of the rooms' own tests that take an order away.
OTHERS = [
    mutation
    for mutation in (
        *test_linear_attention.MUTATIONS,
        *test_linear_attention.MORE_MUTATIONS,
        *test_linear_attention.FLOAT_MUTATIONS,
        *test_softmax.MUTATIONS,
        *test_softmax.MORE_MUTATIONS,
        *test_ripple.MUTATIONS,
        *test_ripple.MORE_MUTATIONS,
    )
    if re.search(r"barrier|\bwait\b", mutation.name)
]


def see_race(mutation: Mutation, folder: Path) -> None:
    room = mutation.file.partition("/")[0]
    is_float = mutation.file in (FLOAT, SOFTMAX_FLOAT, RIPPLE)
    dtype = torch.float32 if is_float else torch.float16
    checks = partial(CHECKS[room], dtype=dtype, head_dim=32)
    failure = see_red(mutation, room, flags(dtype, 32), folder, checks)
    assert re.search(r"race: |two different __syncthreads\(\)", failure), failure


def test_a_missing_barrier_that_gives_the_right_numbers_is_seen(tmp_path: Path) -> None:
    see_race(SILENT[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", [*SILENT[1:], *MUTATIONS, *OTHERS], ids=lambda m: f"{m.file}: {m.name}"
)
def test_more_broken_kernels_have_races(mutation: Mutation, tmp_path: Path) -> None:
    see_race(mutation, tmp_path)
