"""Every way that Triton's linear attention may go, whatever the interpreter's own choice would be.

Run interpreted, by tests/kernels/test_triton.py: which kernels run depends on the device, and here
it is pretended.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from linear_vit.kernels.accuracy import compare
from linear_vit.kernels.triton import tuning
from tests.kernels.cases import DTYPES, Attention, assert_accurate, results, usable_backends

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1"
    or "triton" not in usable_backends("linear_attention"),
    reason="run interpreted, by tests/kernels/test_triton.py",
)

# So many multiprocessors that no number of heads below fills them: tokens are split.
MANY = 64
LONG = {"queries": 400, "keys": 390, "heads": 2, "kv_heads": 2}


@pytest.fixture
def split() -> Iterator[None]:
    with tuning.assume("sm_90", MANY):
        yield


@pytest.fixture
def streamed() -> Iterator[None]:
    tile = {"RESIDENT": 0, "BLOCK_N": 32, "BLOCK_F": 16, "num_warps": 4, "num_stages": 2}
    rules = {
        name: (tuning.Rule(tile),)
        for name in tuning.TABLE
        if name.startswith("linear_attention.") and "reduce" not in name
    }
    with tuning.using(rules), tuning.assume("sm_90", 8):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_split_over_programs(dtype: torch.dtype, split: None) -> None:
    assert_accurate(Attention(dtype=dtype, head_dim=32, **LONG), "triton")


@pytest.mark.parametrize("layout", ["packed", "odd", "tokens_first"])
def test_triton_split_in_every_layout(layout: str, split: None) -> None:
    sizes = {**LONG, "keys": LONG["queries"]}
    case = Attention(dtype=torch.float16, head_dim=16, layout=layout, **sizes)
    assert_accurate(case, "triton")


def test_triton_split_grouped(split: None) -> None:
    case = Attention(head_dim=48, queries=300, keys=333, heads=4, kv_heads=2, batch=2)
    assert_accurate(case, "triton")


def test_triton_split_repeats_bit_for_bit(split: None) -> None:
    case = Attention(head_dim=16, **LONG)
    first, second = results(case, "triton"), results(case, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_state_kept_for_one_launch(dtype: torch.dtype) -> None:
    """More keys than are read twice, few enough for one program: S comes from the forward."""
    assert_accurate(Attention(dtype=dtype, head_dim=16, queries=65, keys=300), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_one_tile_of_keys(dtype: torch.dtype) -> None:
    """Fewer keys than a tile, of grouped queries: one launch each way, which sums S again."""
    case = Attention(dtype=dtype, head_dim=16, queries=65, keys=15, heads=4, kv_heads=2)
    assert_accurate(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_streamed(dtype: torch.dtype, streamed: None) -> None:
    case = Attention(dtype=dtype, head_dim=48, queries=90, keys=80, heads=4, kv_heads=2)
    assert_accurate(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["split", "streamed"])
def test_triton_zero_query_rows(
    dtype: torch.dtype, path: str, request: pytest.FixtureRequest
) -> None:
    """Rows that meet no key have no part in the sums, however large their 1/E is."""
    request.getfixturevalue(path)
    case = Attention(dtype=dtype, head_dim=16, queries=300, keys=300, eps=1e-37)
    inputs = case.inputs()
    with torch.no_grad():
        inputs[0][:, :, ::3] = 0.0
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(case.run("reference", exact), exact, case.gradient().double())
    for a, b in zip(results(case, "triton", inputs)[1:], wanted, strict=True):
        assert compare(a, b, gradient=True).passed, compare(a, b, gradient=True)


def test_the_choice_depends_on_shape_and_device() -> None:
    from linear_vit.kernels.linear_attention.triton import implementation

    short, long = Attention(queries=64, keys=64), Attention(queries=900, keys=900)
    with tuning.assume("sm_90a", 132):
        assert "short_forward" in implementation("linear_attention", *short.inputs())
        assert "state" in implementation("linear_attention", *long.inputs())
        assert "sm_90:" in implementation("linear_attention", *long.inputs())
    with tuning.assume("sm_86", 2):
        assert "short_forward" in implementation("linear_attention", *long.inputs())


@pytest.mark.parametrize("heads", [1, 2, 16, 64, 100, 132, 200, 263, 264, 300, 768, 3000])
def test_splits_cover_the_tokens_and_fill_the_gpu(heads: int) -> None:
    from linear_vit.kernels.triton.support import balanced_splits

    for tokens in (1, 64, 1000, 8192, 65536, 1 << 20):
        with tuning.assume("sm_90", 132):
            splits, per_split = balanced_splits(tokens, heads, 64, torch.device("cpu"))
        assert splits >= 1
        assert (splits - 1) * per_split < tokens <= splits * per_split
        assert per_split % 64 == 0
        if tokens * heads >= 64 * 1024 and tokens >= 64 * 132:
            assert splits * heads >= 100, "one head of one sequence fills the GPU"


@pytest.mark.parametrize("heads", [1, 4, 16, 64, 256])
def test_workspace_is_small_beside_the_least_traffic(heads: int) -> None:
    """From 512k tokens of D = 64, half precision, on: at most 8 % of either pass."""
    from linear_vit.kernels.triton.support import balanced_splits

    D, state = 64, 4 * (2 * 64 * 64 + 2 * 64)
    for total in (1 << 19, 1 << 20, 1 << 23):
        with tuning.assume("sm_90", 132):
            splits, _ = balanced_splits(total // heads, heads, 64, torch.device("cpu"))
        programs = splits * heads
        # Partials are written and read, their sums written, and read by every program.
        reduced = 2 * programs * state + heads * state if splits > 1 else programs * state
        assert reduced + programs * state <= 0.08 * total * 4 * D * 2
        backward = reduced + 2 * programs * state
        assert backward <= 0.08 * total * 7 * D * 2
