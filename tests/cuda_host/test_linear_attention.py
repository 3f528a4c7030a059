"""Linear attention's CUDA kernels on the host: see emulator.py."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_vit.kernels.accuracy import compare
from linear_vit.kernels.linear_attention import reference
from linear_vit.kernels.linear_attention import torch as torch_backend
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
from tests.cuda_host.emulator import build_once, guarded
from tests.cuda_host.linear_attention import LinearAttention
from tests.cuda_host.traffic import measure

ROOM = "linear_attention"
pytestmark = needs_compiler
CLOSE = {"rtol": 2e-2, "atol": 1e-4}


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    return build_once(ROOM)


def run(
    emulated: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    eps: float,
    *,
    save_state: bool = True,
) -> dict[str, Tensor]:
    out, S, z = emulated.linear_attention(q, k, v, eps, save_state)
    dq, dk, dv = emulated.linear_attention_backward(gradient, q, k, v, S, z, eps)
    emulated.check_guards()
    state = {"S": S, "z": z} if save_state else {}
    return {**state, "out": out, "dq": dq, "dk": dk, "dv": dv}


def run_parts(
    emulated: LinearAttention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, eps: float
) -> dict[str, Tensor]:
    """The same, by the operators that stream."""
    S, z = emulated.linear_attention_state(k, v)
    out = emulated.linear_attention_apply(q, S, z, eps)
    dq, dS, dz = emulated.linear_attention_apply_backward(gradient, q, S, z, eps)
    dk, dv = emulated.linear_attention_state_backward(dS, dz, k, v)
    emulated.check_guards()
    return {"S": S, "z": z, "out": out, "dq": dq, "dk": dk, "dv": dv}


def check(
    libraries: dict[str, Path],
    case: Case,
    *,
    save_state: bool = True,
    parts: bool = False,
    zeros: bool = False,
) -> dict[str, Tensor]:
    """Against float64; with ``zeros``, where every third feature of q and k is zero."""
    emulated = LinearAttention(libraries, thread_order=case.order, num_splits=case.num_splits)
    q, k, v, gradient = case.inputs()
    if zeros:
        q[..., ::3] = 0
        k[..., 1::3] = 0
    if parts:
        actual = run_parts(emulated, q, k, v, gradient, case.eps)
    else:
        actual = run(emulated, q, k, v, gradient, case.eps, save_state=save_state)
    exact = double(q, k, v)
    S, z = reference.linear_attention_state(*exact[1:])
    out = reference.linear_attention_apply(exact[0], S, z, case.eps)
    out.backward(gradient.double())
    for name, expected in (("S", S), ("z", z), ("out", out)):
        if name in actual:
            assert_accurate(name, actual[name], expected.detach(), gradient=False)
    for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)
    return actual


# ---- numbers -------------------------------------------------------------------------------------

# What is cheap and finds most: every head dim, dtype, layout and order once, by steps (num_splits a
# number) and in one launch (None), with the state kept or not.
CASES = (
    (Case(16, torch.bfloat16, queries=130, keys=33, layout="misaligned", order="reverse"), True),
    (Case(32, heads=4, queries=133, keys=70, num_splits=3, eps=0.5), True),
    (Case(32, heads=4, queries=133, keys=70, num_splits=3, order="strided"), False),
    (Case(48, torch.float16, heads=6, kv_heads=3, layout="expanded", num_splits=2), False),
    (Case(48, torch.bfloat16, heads=4, queries=150, keys=140, num_splits=None), True),
    (Case(64, torch.bfloat16, layout="packed", order="reverse", num_splits=2), False),
    (Case(64, torch.float16, heads=4, kv_heads=1, queries=133, keys=70, num_splits=None), False),
    (Case(64, torch.bfloat16, queries=70, keys=133, num_splits=None, order="strided"), True),
    (Case(64, batch=2, heads=1, kv_heads=1, queries=1, keys=2, num_splits=None), False),
    (Case(96, torch.float16, heads=1, kv_heads=1, queries=65, keys=31, order="reverse"), True),
    (Case(128, torch.bfloat16, heads=2, kv_heads=1, queries=33, keys=65, num_splits=2), False),
    (Case(128, torch.float16, heads=1, queries=33, keys=65, kv_heads=1, num_splits=None), True),
)
MORE_CASES = (
    *(
        (Case(head_dim, dtype, 1, 4, 2, 133, 70, layout, order, num_splits=splits), save_state)
        for head_dim in HEAD_DIMS
        for dtype, order, layout in zip(
            DTYPES, ORDERS, ("misaligned", "contiguous", "expanded"), strict=True
        )
        for splits, save_state in ((2, True), (1, False), (None, True), (None, False))
    ),
    (Case(16, heads=1, kv_heads=1, queries=5, keys=1500), True),  # several chunks of tokens
    (Case(16, heads=1, kv_heads=1, queries=1100, keys=5, num_splits=3), True),
    (Case(16, torch.float16, heads=1, kv_heads=1, queries=1100, keys=2100, num_splits=None), True),
    (Case(64, torch.bfloat16, heads=1, kv_heads=1, queries=300, keys=256, num_splits=None), False),
    (Case(64, torch.float16, heads=1, kv_heads=1, queries=300, keys=300, num_splits=None), False),
    (Case(64, torch.bfloat16, eps=500.0, num_splits=None), True),
)


@pytest.mark.parametrize(("case", "save_state"), CASES, ids=str)
def test_numbers(libraries: dict[str, Path], case: Case, save_state: bool) -> None:
    check(libraries, case, save_state=save_state)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "save_state"), MORE_CASES, ids=str)
def test_more_numbers(libraries: dict[str, Path], case: Case, save_state: bool) -> None:
    check(libraries, case, save_state=save_state)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, torch.bfloat16, heads=4, queries=133, keys=70, num_splits=2, order="reverse"),
        Case(32, torch.float16, heads=4, queries=33, keys=70, eps=0.5),
        Case(32, heads=4, queries=33, keys=70, num_splits=2),
        Case(128, heads=1, kv_heads=1, queries=70, keys=35, num_splits=2),
    ],
    ids=str,
)
def test_streaming_operators(libraries: dict[str, Path], case: Case) -> None:
    check(libraries, case, parts=True)


def test_results_repeat_bit_for_bit_whatever_the_thread_order(libraries: dict[str, Path]) -> None:
    for splits in (2, None):
        case = Case(32, torch.bfloat16, heads=2, kv_heads=1, queries=40, keys=50, num_splits=splits)
        runs = [check(libraries, replace(case, order=order)) for order in ORDERS]
        for other in runs[1:]:
            for name, x in runs[0].items():
                assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "mean"), [(1e-2, 0.0), (1.0, 1.0), (1e-2, 1.0), (30.0, 1.0)])
@pytest.mark.parametrize(
    ("num_splits", "parts"), [(1, False), (None, False), (2, True)], ids=["1", "None", "parts"]
)
def test_no_worse_than_composition_where_gradients_cancel(
    libraries: dict[str, Path],
    dtype: torch.dtype,
    scale: float,
    mean: float,
    num_splits: int | None,
    parts: bool,
) -> None:
    """The bound of tests/kernels/test_cross_check.py: 1.5 × the float32 composition's error.

    In parts, by the operators that stream, each is given what another wrote to memory.
    """
    random = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn((1, 2, tokens, 32), generator=random).to(dtype) for tokens in (64, 96, 96, 64)
    )
    q, k, v = q * scale, k * scale, v + mean
    exact = double(q, k, v)
    expected = reference.linear_attention(*exact, 1e-6)
    expected.backward(gradient.double())
    composed = [x.clone().requires_grad_() for x in (q, k, v)]
    composition = torch_backend.linear_attention(*composed, 1e-6)
    composition.backward(gradient)
    emulated = LinearAttention(libraries, num_splits=num_splits)
    if parts:
        actual = run_parts(emulated, q, k, v, gradient, 1e-6)
    else:
        actual = run(emulated, q, k, v, gradient, 1e-6, save_state=False)
    wanted = [expected.detach(), *(grad(x) for x in exact)]
    bounds = [composition.detach(), *(grad(x) for x in composed)]
    for name, exact_one, bound in zip(("out", "dq", "dk", "dv"), wanted, bounds, strict=True):
        error = compare(actual[name], exact_one, gradient=True).rms_error
        limit = 1.5 * compare(bound, exact_one, gradient=True).rms_error
        assert error <= max(limit, torch.finfo(dtype).eps / 4), f"{name}: {error} of {limit}"


@pytest.mark.parametrize("num_splits", [1, None])
def test_float16_of_great_range(libraries: dict[str, Path], num_splits: int | None) -> None:
    """Queries from subnormal to 1000, values of 10,000: nothing leaves float16's range."""
    q, k, v, gradient = Case(32, torch.float16, queries=48, keys=64).inputs()
    q *= torch.logspace(-6, 3, 48, dtype=torch.float16)[:, None]
    v *= 10_000 / v.abs().max()
    actual = run(LinearAttention(libraries, num_splits=num_splits), q, k, v, gradient, 1e-6)
    exact = double(q, k, v)
    reference.linear_attention(*exact, 1e-6).backward(gradient.double())
    for name, x in zip(("dk", "dv"), exact[1:], strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)
    # The gradient of smaller queries is beyond float16.
    dq, expected = (x[:, :, 24:] for x in (actual["dq"], grad(exact[0])))
    assert_accurate("dq", dq, expected, gradient=True)


@pytest.mark.parametrize("num_splits", [1, None])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_float16_of_a_query_that_hardly_meets_a_key(
    libraries: dict[str, Path], head_dim: int, num_splits: int | None
) -> None:
    """Large where no key has anything, and nearly 0 where they have: 1 / E times it is beyond
    float16, but nobody else's gradient may hear of it."""
    q, k, v, gradient = Case(head_dim, torch.float16, 1, 1, 1, 40, 40).inputs()
    k.abs_()
    q[0, 0, 5] = -60.0
    q[0, 0, 5, 3] = 1e-4
    actual = run(LinearAttention(libraries, num_splits=num_splits), q, k, v, gradient, 1e-6)
    exact = double(q, k, v)
    reference.linear_attention(*exact, 1e-6).backward(gradient.double())
    for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)


@pytest.mark.parametrize("num_splits", [1, None])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_float16_of_a_query_whose_inverse_is_beyond_its_range(
    libraries: dict[str, Path], head_dim: int, num_splits: int | None
) -> None:
    """The smallest float16, which meets small keys among large ones: its own part is lost, and
    the others' is not."""
    q, k, v, gradient = Case(head_dim, torch.float16, 1, 1, 1, 40, 64).inputs()
    k *= 100
    k[..., 7] *= 1e-4
    q[0, 0, 5] = 0
    q[0, 0, 5, 7] = 6e-8
    actual = run(LinearAttention(libraries, num_splits=num_splits), q, k, v, gradient, 1e-6)
    exact = double(q, k, v)
    reference.linear_attention(*exact, 1e-6).backward(gradient.double())
    others = torch.arange(head_dim) != 7
    assert_accurate("dk", actual["dk"][..., others], grad(exact[1])[..., others], gradient=True)
    assert actual["dk"].isfinite().all()
    assert actual["dv"].isfinite().all()


# ---- traffic -------------------------------------------------------------------------------------


TRAFFIC_CASES = (
    # one launch; by steps, several tiles and splits a head; grouped queries; keys of another number
    Case(64, torch.bfloat16, heads=2, queries=70, keys=70, num_splits=None),
    Case(64, torch.bfloat16, heads=1, kv_heads=1, queries=200, keys=200, num_splits=2),
    Case(64, torch.float16, heads=4, kv_heads=1, queries=70, keys=200, num_splits=2),
    Case(64, heads=2, kv_heads=1, queries=70, keys=140, num_splits=2),
    *(Case(d, torch.float16, heads=2, kv_heads=1, num_splits=2) for d in (16, 32, 48, 96, 128)),
)


@pytest.mark.parametrize("case", TRAFFIC_CASES, ids=str)
def test_each_element_is_moved_once_and_sixteen_bytes_at_a_time(
    libraries: dict[str, Path], case: Case
) -> None:
    for row in measure(libraries, case, save_state=True):
        assert (row.loaded, row.stored) in ((row.least, 0), (0, row.least)), row
        assert row.narrow == 0 or (case.dtype == torch.float32 and row.tensor == "dq"), row


@pytest.mark.parametrize("keys", [64, 200])
def test_recomputing_the_state_moves_no_more_where_keys_stay(
    libraries: dict[str, Path], keys: int
) -> None:
    case = Case(64, torch.bfloat16, heads=2, kv_heads=1, queries=70, keys=keys, num_splits=None)
    for row in measure(libraries, case, save_state=False):
        assert row.loaded + row.stored == row.least, row


def test_misaligned_tensors_are_read_in_place_narrowly(libraries: dict[str, Path]) -> None:
    case = Case(64, torch.bfloat16, heads=1, kv_heads=1, layout="misaligned", num_splits=2)
    for row in measure(libraries, case, save_state=True):
        assert row.loaded + row.stored == row.least, row
        if row.loaded:
            assert row.narrow == row.loaded, row


def test_packed_gradient_is_one_tensor(libraries: dict[str, Path]) -> None:
    case = Case(64, torch.bfloat16, heads=2, kv_heads=2, layout="packed")
    q, k, v, gradient = case.inputs()
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    S, z = LinearAttention(libraries).linear_attention_state(k, v)
    for state in ((S, z), (torch.empty(0), torch.empty(0))):
        emulated = LinearAttention(libraries)
        dqkv = emulated.linear_attention_packed_backward(
            gradient.transpose(1, 2), qkv, *state, case.eps
        )
        emulated.check_guards()
        assert dqkv.is_contiguous()
        assert emulated.traffic()["dqkv"].stored_wide == dqkv.numel() * 2
        expected = run(LinearAttention(libraries), q, k, v, gradient, case.eps, save_state=False)
        for i, name in enumerate(("dq", "dk", "dv")):
            torch.testing.assert_close(dqkv[:, :, i].transpose(1, 2), expected[name], **CLOSE)


def test_workspace_traffic_is_what_is_counted(libraries: dict[str, Path]) -> None:
    """The formula that the bound below trusts, against the bytes of real launches."""
    for splits, save_state in ((1, True), (3, True), (3, False), (None, True), (None, False)):
        case = Case(32, torch.bfloat16, heads=4, queries=150, keys=300, num_splits=splits)
        q, k, v, gradient = case.inputs()
        emulated = LinearAttention(libraries, num_splits=splits)
        S = torch.empty(1, 2, 64, 32) if save_state else torch.empty(0)
        arguments = emulated.arguments(q, k, S, 1e-6)
        emulated.watch(q=q, k=k, v=v, dout=gradient)
        _, S, z = emulated.linear_attention(q, k, v, 1e-6, save_state)
        forward = workspace_bytes(emulated)
        assert forward == emulated.ask("workspace_bytes", arguments, "forward")
        emulated.linear_attention_backward(gradient, q, k, v, S, z, 1e-6)
        backward = workspace_bytes(emulated) - forward
        assert backward == emulated.ask("workspace_bytes", arguments, "backward"), splits


@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.bfloat16), (96, torch.float32)])
def test_dq_alone_needs_no_keys(
    libraries: dict[str, Path], head_dim: int, dtype: torch.dtype
) -> None:
    """The same bits, by fewer launches: nothing is read of k and v, nothing written of their
    gradients, and no partial sums are added up."""
    case = Case(head_dim, dtype, heads=4, queries=150, keys=100, num_splits=3)
    q, k, v, gradient = case.inputs()
    found, launches = {}, {}
    for only_dq in (False, True):
        emulated = LinearAttention(libraries, num_splits=3)
        S, z = emulated.linear_attention_state(k, v)
        emulated.watch(k=k, v=v)
        of_state = emulated.linear_attention_apply_backward(gradient, q, S, z, 1e-6, only_dq)
        dq, *_ = emulated.linear_attention_backward(gradient, q, k, v, S, z, 1e-6, only_dq)
        emulated.check_guards()
        found[only_dq] = dq, of_state[0]
        arguments = emulated.arguments(q, k, S, 1e-6)
        arguments.only_dq = only_dq
        launches[only_dq] = [
            emulated.ask("launches", arguments, which) for which in ("backward", "apply_backward")
        ]
        counted = emulated.traffic()
        moved = sum(
            counted[name].loaded + counted[name].stored
            for name in ("k", "v", "dk", "dv", "dS", "dz")
            if name in counted
        )
        assert (moved == 0) == only_dq
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    assert launches[True] == [1, 1]
    assert min(launches[False]) >= 2


def workspace_bytes(emulated: LinearAttention) -> int:
    beside = ("S", "z", "workspace", "other")
    counted = emulated.traffic()
    return sum(counted[name].loaded + counted[name].stored for name in beside if name in counted)


@pytest.mark.parametrize("batch_heads", [1, 4, 16, 64, 128, 256, 512, 2048])
@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 4096, 32_768, 131_072, 1_048_576])
def test_workspace_is_at_most_8_percent_of_least_traffic(
    libraries: dict[str, Path], batch_heads: int, tokens: int
) -> None:
    """From B·H·N = 512k on, at D = 64 in half precision on 132 multiprocessors."""
    if batch_heads * tokens < 512 * 1024:
        pytest.skip("fewer than 512k tokens in all")
    emulated = LinearAttention(libraries, multiprocessors=132)
    x = torch.empty(64, dtype=torch.bfloat16).expand(batch_heads, 1, tokens, 64)
    kept = torch.empty(1) if tokens > 256 else torch.empty(0)
    element = batch_heads * tokens * 64 * 2
    inference = emulated.ask("workspace_bytes", emulated.arguments(x, x, None, 0.0), "forward")
    backward = emulated.ask("workspace_bytes", emulated.arguments(x, x, kept, 0.0), "backward")
    assert inference <= 0.08 * 4 * element
    assert backward <= 0.08 * 7 * element


def test_few_launches(libraries: dict[str, Path]) -> None:
    def launches(batch_heads: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[int]:
        emulated = LinearAttention(libraries, multiprocessors=132)
        x = torch.empty(64, dtype=dtype).expand(batch_heads, 1, tokens, 64)
        kept = torch.empty(1) if tokens > 256 else torch.empty(0)
        return [
            emulated.ask("launches", emulated.arguments(x, x, S, 0.0), which)
            for which, S in (("forward", None), ("backward", kept))
        ]

    assert launches(768, 64) == [1, 1]  # a ViT: 128 images, 6 heads
    assert launches(768, 1024) == [1, 1]
    assert launches(6, 256) == [1, 1]  # one image
    assert launches(1, 1 << 20) == [3, 3]  # state, reduce, apply; dq and dS, reduce, dk and dv
    assert launches(256, 4096) == [2, 2]  # a block a head is all the sums need


@pytest.mark.parametrize(
    ("heads", "tokens", "splits"),
    [
        (96, 1024, 1),  # what a fuller machine saves is less than a launch
        (96, 8192, 1),
        (96, 16_384, 4),  # 384 blocks of 132 at once
        (67, 8192, 3),  # half of the multiprocessors would be idle
        (132, 16_384, 1),  # full waves as they are
        (264, 16_384, 1),
        (140, 16_384, 3),  # one of two waves would be nearly empty
        (16, 65_536, 8),  # 128 of 132
        (1, 1 << 20, 132),
    ],
)
def test_the_query_gradients_blocks_come_in_full_waves(
    libraries: dict[str, Path], heads: int, tokens: int, splits: int
) -> None:
    """Where instructions bind it: on GPUs with the shared memory of 8.0 and 9.0."""
    emulated = LinearAttention(libraries, multiprocessors=132)
    x = torch.empty(64, dtype=torch.bfloat16).expand(heads, 1, tokens, 64)
    arguments = emulated.arguments(x, x, torch.empty(1), 0.0)

    def found(shared_memory: int) -> float:
        emulated.library.cuda_host_set_most_shared(shared_memory)
        try:
            partials = emulated.ask("workspace", arguments, "apply_backward") - heads * 64
        finally:
            emulated.library.cuda_host_set_most_shared(99 * 1024)
        return max(1.0, partials / (heads * (2 * 64 * 64 + 2 * 64)))

    assert found(227 * 1024) == splits
    assert found(99 * 1024) == max(1, 132 // heads)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_where_it_must_and_nowhere_else(
    libraries: dict[str, Path], dtype: torch.dtype
) -> None:
    clean = Case(16, dtype, queries=70, keys=40).inputs()

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

    # By a state's gradient from elsewhere, which knows of no NaN.
    q, k, v, gradient = (guarded(x) for x in clean)
    dS, dz = torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32)
    k[0, 0, 33, 5] = torch.nan
    dk, dv = LinearAttention(libraries).linear_attention_state_backward(dS, dz, k, v)
    assert dk[0, 0, 33, 5].isnan()
    assert dk.isnan().sum() == 1
    assert dv[0, 0, 33].isnan().all()
    assert dv.isnan().sum() == dv.shape[-1]

    q, k, v, gradient = (guarded(x) for x in clean)
    v[0, 0, 33, 5] = torch.inf
    dk, dv = LinearAttention(libraries).linear_attention_state_backward(dS, dz, k, v)
    dk[0, 0, 33] = 0
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-39, 1e-37, 1e-15, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, None])
def test_a_query_that_meets_no_key_gives_zero_and_finite_gradients(
    libraries: dict[str, Path], eps: float, dtype: torch.dtype, num_splits: int | None
) -> None:
    """Rows of zeros, and of a sign that no key has; a tile that is not full has more of them."""
    q, k, v, gradient = Case(16, dtype, queries=75, keys=40).inputs()
    k.abs_()
    q[:, :, ::3] = 0
    q[:, :, 1::3] = -q[:, :, 1::3].abs()
    exact = double(q, k, v)
    reference.linear_attention(*exact, eps).backward(gradient.double())
    emulated = LinearAttention(libraries, num_splits=num_splits)
    for result in (
        run(emulated, q, k, v, gradient, eps),
        run_parts(emulated, q, k, v, gradient, eps),
    ):
        assert (result["out"][:, :, ::3] == 0).all()
        assert (result["dq"][:, :, 1::3] == 0).all()
        for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
            assert_accurate(name, result[name], grad(x), gradient=True)


# ---- do these tests fail when they should? -------------------------------------------------------

HALF, FLOAT = "linear_attention/half.cuh", "linear_attention/float32.cuh"
MUTATIONS = (
    Mutation(
        "no barrier before a tile is read",
        HALF,
        "__syncthreads();  // this tile is here, and the one before has been read",
        "",
    ),
    Mutation(
        "no wait for a tile's copies",
        HALF,
        "if constexpr (kStages > 1) ptx::cp_async_wait<kStages - 2>();",
        "",
    ),
    Mutation(
        "lanes of a row exchange the wrong registers",
        HALF,
        "const bool upper = threadIdx.x & bit;",
        "const bool upper = !(threadIdx.x & bit);",
    ),
    Mutation("rows past the end count", HALF, "own.row(i) < rows.valid ? 16 : 0);", "16);"),
    Mutation("rows past the end are stored", HALF, "if (own >= target.valid) return;", ""),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "swapped halves of phi",
        HALF,
        "phi[0][i] = ptx::relu2<T>(x[i]);",
        "phi[0][i] = ptx::relu2<T>(ptx::negate2<T>(x[i]));",
    ),
    Mutation(
        "a fragment's rows in the wrong lanes",
        HALF,
        "ptx::ldmatrix_x4(a, tile + H::at(row, lane % 16, block, lane / 16));",
        "ptx::ldmatrix_x4(a, tile + H::at(row, lane / 2, block, lane % 2));",
    ),
    Mutation(
        "a transposed fragment's blocks swapped",
        HALF,
        "x4_trans(a, tile + H::at(row, lane / 16 * 8 + lane % 8, block, lane / 8 % 2));",
        "x4_trans(a, tile + H::at(row, lane / 8 % 2 * 8 + lane % 8, block, lane / 16));",
    ),
    Mutation(
        "b's rows read as columns",
        HALF,
        "ptx::ldmatrix_x4_trans(b, tile",
        "ptx::ldmatrix_x4(b, tile",
    ),
    Mutation(
        "no barrier before the rows' sums are read",
        HALF,
        "__syncthreads();  // every group's part is there",
        "",
    ),
    Mutation(
        "no barrier before g / E is read",
        HALF,
        "__syncthreads();  // g / E and the weights are there",
        "",
    ),
    Mutation(
        "no barrier before keys that stay are read",
        "linear_attention/half_kernels.cuh",
        "__syncthreads();  // every key and value is here",
        "",
    ),
    Mutation(
        "one warp's tokens are left out",
        HALF,
        "for (int warp = 1; warp < H::kTokenWarps; ++warp) {",
        "for (int warp = 2; warp < H::kTokenWarps; ++warp) {",
    ),
    Mutation(
        "the rounding of dS is not corrected for the mean",
        HALF,
        "x -= sign_of(threadIdx.x) * load_global(exact",
        "x -= 0.0f * load_global(exact",
    ),
    Mutation("no mean in out", HALF, "+ m.x * of_mean[i % 2],", ","),
    Mutation(
        "no eps in the gradient",
        HALF,
        "unscale_of(state) - eps * mean_dot[r]);",
        "unscale_of(state));",
    ),
    Mutation("no eps", HALF, "quick_inverse(dot, eps);", "quick_inverse(dot, 0.0f);"),
    Mutation(
        "the mean is not taken from the bias",
        HALF,
        "this->z[threadIdx.x] -= sum;",
        "",
    ),
    Mutation(
        "a weight's first term is lost",
        HALF,
        "state.row.weight[lane_group() < 3 ? lane_group() : 2];",
        "state.row.weight[lane_group() == 1 ? 1 : 2];",
    ),
    Mutation(
        "the operand's scale is not undone",
        HALF,
        "this->unscale = binade / 8192.0f;",
        "this->unscale = binade / 4096.0f;",
    ),
    Mutation(
        "a split's last tile is dropped",
        "linear_attention/problem.cuh",
        "end = static_cast<int>(begin + each < tiles ? begin + each : tiles);",
        "end = static_cast<int>(begin + each < tiles ? begin + each : tiles - 1);",
    ),
    Mutation(
        "one query head of a group",
        HALF,
        "if (++in_head == per_head) in_head = 0, ++head;",
        "if (++in_head == per_head) in_head = 0;",
    ),
    Mutation(
        "no barrier before 1 / E is read, and g and q are overwritten",
        HALF,
        "if (__syncthreads_or(beyond)) sums.limit_queries",
        "if (beyond) sums.limit_queries",
    ),
    Mutation(
        "the wrong row's 1 / E",
        HALF,
        "state.row.scale[row] = second",
        "state.row.scale[row ^ 1] = second",
    ),
    Mutation(
        "the wrong row's 1 / E in a warp's own rows",
        HALF,
        "const Terms& of_row = scales[i % 2];",
        "const Terms& of_row = scales[0];",
    ),
    Mutation(
        "rows past the end that a sum reads have no weight",
        HALF,
        "kPastEnd = (kAtOnce - 1) * 16 * H::kTokenWarps;",
        "kPastEnd = 0;",
    ),
    Mutation(
        "the other row's weight",
        HALF,
        "float own_weight = second ? weight[1] : weight[0];",
        "float own_weight = second ? weight[0] : weight[1];",
    ),
    Mutation(
        "a token's weight in another's place",
        HALF,
        "token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;",
        "token % 8 / 2 * 4 + token % 2 * 2 + token / 8 % 2;",
    ),
    Mutation(
        "a sign is turned twice",
        HALF,
        "if (half == 1 && turn) of_S = -of_S, of_z = -of_z;",
        "",
    ),
    Mutation(
        "the low term of a warp's own rows is lost",
        HALF,
        "store_rows<H>(q.rows, low, rows, step);",
        "store_rows<H>(q.rows, high, rows, step);",
    ),
    Mutation(
        "a warp's own rows past the end are stored",
        HALF,
        "if (own.row(i) < valid) store_global(",
        "store_global(",
    ),
    Mutation(
        "a matrix is stored with its blocks swapped",
        HALF,
        "ptx::stmatrix_x4(tile + H::at(row, lane % 16, block, lane / 16), a);",
        "ptx::stmatrix_x4(tile + H::at(row, lane / 16 * 8 + lane % 8, block, lane / 8 % 2), a);",
    ),
    Mutation(
        "a thread's next chunk is not below its last",
        HALF,
        "i * (kRows * rows.stride);",
        "i * (kRows * rows.stride + 8);",
    ),
    Mutation(
        "z's first term is lost",
        HALF,
        "return lane_pair() <= 2 ?",
        "return lane_pair() == 2 ?",
    ),
    Mutation(
        "the second half of S keeps its sign",
        HALF,
        "return row < D ? 1.0f : -1.0f;",
        "return row < D ? 1.0f : 1.0f;",
    ),
    Mutation(
        "the second half of S is given out with its sign turned",
        HALF,
        "const float sign = half ? -1.0f : 1.0f;",
        "const float sign = 1.0f;",
    ),
    Mutation(
        "a key's gradient where it is zero",
        HALF,
        "(packed[i] & ptx::nonzero2(x[i])) | ptx::nan2<T>(x[i]);",
        "packed[i];",
    ),
    Mutation(
        "a query's gradient where it is zero",
        HALF,
        " &\n                  ptx::nonzero2(q[block][i]);",
        ";",
    ),
    Mutation(
        "a's halves swapped",
        HALF,
        "x.low ? positive[first] : negative[first],",
        "x.low ? negative[first] : positive[first],",
    ),
    Mutation(
        "the last sixteen tokens of a tile are left out of a sum",
        HALF,
        "if (has_none(step, valid)) break;\n      unsigned a",
        "if (has_none(step, valid - 16) && step > 0) break;\n      unsigned a",
    ),
    Mutation(
        "one query tile takes the other's place",
        HALF,
        "if (more && stages == 2) load((tile + 1) % 2);",
        "if (more && stages == 2) load(tile % 2);",
    ),
    Mutation(
        "no barrier before the only query tile is filled again",
        HALF,
        "__syncthreads();  // the only tile has been read",
        "",
    ),
    Mutation(
        "no barrier before queries give their place to keys",
        "linear_attention/half_kernels.cuh",
        "__syncthreads();  // the last queries have been read",
        "",
    ),
    Mutation(
        "a head's last tile is taken for a whole one",
        HALF,
        "valid = in_head + 1 == per_head ? left : tile_tokens;",
        "valid = tile_tokens;",
    ),
    Mutation(
        "every split begins with the head's first tile",
        HALF,
        "    in_head = tile;",
        "    in_head = 0;",
    ),
    Mutation(
        "a split within a later head begins with the first",
        HALF,
        "head += tile / per_head, in_head = tile % per_head;",
        "in_head = tile % per_head;",
    ),
    Mutation(
        "tiles and their stages are out of step",
        HALF,
        "stage = stage + 1 < kStages ? stage + 1 : 0;",
        "stage = stage + 2 < kStages ? stage + 1 : 0;",
    ),
    Mutation(
        "a thread's second chunk is not copied",
        HALF,
        "for (int i = 0; i < kEach; ++i) {\n      ptx::cp_async_16",
        "for (int i = 0; i < kEach - 1; ++i) {\n      ptx::cp_async_16",
    ),
    Mutation(
        "a split is dropped",
        "linear_attention/problem.cuh",
        "split < p.num_splits; split += Reduce::kAdders) {",
        "split + 1 < p.num_splits; split += Reduce::kAdders) {",
    ),
    Mutation(
        "no barrier before the adders' sums are read",
        "linear_attention/problem.cuh",
        "  sums[threadIdx.x] = sum;\n  __syncthreads();",
        "  sums[threadIdx.x] = sum;",
    ),
    Mutation(
        "one adder's splits are dropped",
        "linear_attention/problem.cuh",
        "for (int other = 1; other",
        "for (int other = 2; other",
    ),
)
# Of float16 that is about to leave its range.
RANGE_MUTATIONS = (
    Mutation(
        "a query times its row's factor is infinite",
        HALF,
        "if (__syncthreads_or(beyond)) sums.limit_queries(of_q, state, dq.valid);",
        "__syncthreads();",
    ),
    Mutation(
        "only a row's own lanes limit it",
        HALF,
        "if (__syncthreads_or(beyond)) sums",
        "__syncthreads();\n    if (beyond) sums",
    ),
    Mutation(
        "a limit that is none",
        HALF,
        "const unsigned limit = 0x7bff7bffu - ((high - one) << 16 | (low - one));",
        "const unsigned limit = 0x7bff7bffu;",
    ),
)
# Of the float32 kernels.
FLOAT_MUTATIONS = (
    Mutation(
        "gradient at zero's wrong side",
        "linear_attention/features.cuh",
        "x < 0.0f ? -by_negative : x;",
        "x < 0.0f ? by_negative : x;",
    ),
    Mutation(
        "swap the halves of phi",
        FLOAT,
        "phi[0][i] = positive_part(x);\n            phi[1][i] = negative_part(x);\n          }\n"
        "#pragma unroll\n          for (int j = 0; j < C; ++j) w",
        "phi[0][i] = negative_part(x);\n            phi[1][i] = negative_part(x);\n          }\n"
        "#pragma unroll\n          for (int j = 0; j < C; ++j) w",
    ),
    Mutation("skip dz", FLOAT, "dphi[0][i][j] + load_global(dz + feature),", "dphi[0][i][j],"),
    Mutation(
        "no barrier before g / E is read",
        FLOAT,
        "__syncthreads();  // g / E and the weights are there",
        "",
    ),
    Mutation(
        "no barrier between tiles",
        FLOAT,
        "__syncthreads();  // the tile before has been read\n      load_tile<kRows",
        "load_tile<kRows",
    ),
    Mutation(
        "no eps",
        FLOAT,
        "scale[i] = inverse(row_sum(normaliser), p.eps);",
        "scale[i] = inverse(row_sum(normaliser), 0.0f);",
    ),
    Mutation("no edge mask on stores", "cuda/common.cuh", "if (row >= valid) return;", ""),
    Mutation("no edge mask on loads", "cuda/common.cuh", "if (row < valid) {", "if (true) {"),
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

# One head dim and element type: a mutant compiles in a few seconds.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=__half")
NARROW_FLOAT = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float")


def narrow_checks(libraries: dict[str, Path], dtype: torch.dtype) -> list[Callable[[], object]]:
    # eps is of the normaliser's size, so that its absence shows in half precision too.
    several = Case(32, dtype, heads=4, queries=300, keys=270, num_splits=2, eps=2000.0)
    alone = replace(several, num_splits=None)
    cases = (
        (several, True),
        (alone, False),
        (alone, True),
        (replace(alone, heads=1, kv_heads=1, queries=70, keys=500), False),  # little room
        (Case(32, dtype, heads=1, kv_heads=1, queries=21, keys=21), False),  # less than a tile
    )
    return [
        partial(check, libraries, replace(case, order=order), save_state=save_state)
        for order in ("forward", "reverse")
        for case, save_state in cases
    ] + [partial(check, libraries, several, parts=True, zeros=True)]


half_checks = partial(narrow_checks, dtype=torch.float16)
float_checks = partial(narrow_checks, dtype=torch.float32)


@pytest.fixture(scope="session")
def sound() -> None:
    """The unbroken kernels, built as the mutants are, pass."""
    libraries = build_once(ROOM, NARROW)
    assert first_failure(half_checks(libraries)) is None


@pytest.fixture(scope="session")
def sound_float() -> None:
    libraries = build_once(ROOM, NARROW_FLOAT)
    assert first_failure(float_checks(libraries)) is None


@pytest.mark.slow
def test_matrices_are_stored_word_by_word_where_they_have_to_be() -> None:
    """As on GPUs before compute capability 9.0."""
    libraries = build_once(ROOM, (*NARROW, "-DLINEAR_VIT_NO_STMATRIX"))
    assert first_failure(half_checks(libraries)) is None


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MUTATIONS[:2], ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, half_checks)


@pytest.mark.slow
@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", [*MUTATIONS[2:], *MORE_MUTATIONS], ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, half_checks)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", RANGE_MUTATIONS, ids=lambda m: m.name)
def test_a_float16_beyond_its_range_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    def checks(libraries: dict[str, Path]) -> list[Callable[[], object]]:
        one = test_float16_of_a_query_that_hardly_meets_a_key
        return [partial(one, libraries, 32, num_splits) for num_splits in (1, None)]

    see_red(mutation, ROOM, NARROW, tmp_path, checks)


@pytest.mark.slow
@pytest.mark.usefixtures("sound_float")
@pytest.mark.parametrize("mutation", FLOAT_MUTATIONS, ids=lambda m: m.name)
def test_broken_float32_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW_FLOAT, tmp_path, float_checks)


SANITIZED = """
import sys
from pathlib import Path
from tests.cuda_host import test_linear_attention as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
for splits in (2, None):
    case = t.Case(32, t.DTYPE, heads=4, queries=37, keys=35, num_splits=splits)
    for layout in ("contiguous", "misaligned"):
        t.check(libraries, t.replace(case, layout=layout), save_state=layout == "contiguous")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "dtype"), [(NARROW, "float16"), (NARROW_FLOAT, "float32")])
def test_sanitizers_find_nothing(tmp_path: Path, flags: tuple[str, ...], dtype: str) -> None:
    script = SANITIZED.replace("t.DTYPE", f"t.torch.{dtype}")
    assert_sanitizers_find_nothing(ROOM, flags, tmp_path, script)
