"""The C++ kernels on every instruction set this machine has, and what only they promise."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels.layout import empty_like
from tests.kernels.cases import (
    DTYPES,
    Attention,
    Ripple,
    assert_accurate,
    reference_results,
    results,
)

REASON = kernels.backends("linear_attention", "cpu")["cpu"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the cases' tensors are on the GPU"),
]
NAMES = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "portable": "portable code"}


@pytest.fixture(params=NAMES)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LINEAR_VIT_CPU", request.param)
    try:
        said = kernels.implementation("linear_attention", "cpu")
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert NAMES[request.param] in said
    return request.param


def precision(instruction_set: str) -> torch.dtype:
    """What the instruction set is for."""
    return torch.bfloat16 if instruction_set == "amx" else torch.float32


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- linear attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 7, 16, 32, 40, 48, 64, 80, 96, 128, 200, 256])
def test_head_dims(instruction_set: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_accurate(Attention(head_dim=head_dim, dtype=dtype, queries=67, keys=71), "cpu")


@pytest.mark.parametrize("layout", ["packed", "tokens_first", "expanded", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(instruction_set: str, layout: str, dtype: torch.dtype) -> None:
    case = Attention(layout=layout, dtype=dtype, head_dim=24, queries=33, keys=33, batch=2)
    assert_accurate(case, "cpu")


@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 1, "keys": 2},
        {"queries": 64, "keys": 65},
        {"queries": 1500, "keys": 600, "heads": 1, "kv_heads": 1},  # in parts
        {"queries": 700, "keys": 900, "heads": 6, "kv_heads": 2},
        {"queries": 20, "keys": 30, "batch": 9, "heads": 8, "kv_heads": 8},  # whole heads
        {"queries": 20, "keys": 20_000, "heads": 1, "kv_heads": 1, "head_dim": 16},
    ],
    ids=str,
)
def test_sizes(instruction_set: str, sizes: dict[str, int]) -> None:
    assert_accurate(Attention(dtype=precision(instruction_set), **sizes), "cpu")


@pytest.mark.parametrize(
    "case",
    [
        Attention(heads=1, kv_heads=1, queries=3000, keys=2000),
        Attention(heads=4, kv_heads=2, queries=900, keys=700, dtype=torch.bfloat16),
        Attention(heads=8, kv_heads=8, queries=50, keys=50, batch=9),
        Ripple("ripple_pool", rows=40, cols=9, channels=48),
        Ripple("ripple_expand", rows=40, cols=9, channels=48, axis=1),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(case: Attention | Ripple, threads: None) -> None:
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(results(case, "cpu"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_packed_is_the_same_in_place(instruction_set: str) -> None:
    """Bit for bit what the views give, its gradient in one dense tensor of the same order."""
    dtype = precision(instruction_set)
    qkv = torch.randn(2, 90, 3, 4, 32, dtype=dtype).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    gradient = torch.randn(2, 90, 4, 32, dtype=dtype)
    packed = kernels.linear_attention_packed(qkv, backend="cpu")
    views = kernels.linear_attention(q, k, v, backend="cpu").transpose(1, 2)
    assert torch.equal(packed, views)
    (dqkv,) = torch.autograd.grad(packed, qkv, gradient)
    (expected,) = torch.autograd.grad(views, qkv, gradient)
    assert torch.equal(dqkv, expected)
    assert dqkv.stride() == qkv.stride()


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((2, 3, 4, 8), (96, 8, 24, 1)),
        ((1, 3, 4, 8), (7, 32, 8, 1)),
        ((2, 3, 4, 8), (200, 64, 16, 1)),
        ((2, 3, 4, 8), (0, 32, 8, 1)),
        ((2, 3, 4, 1), (12, 4, 1, 5)),
        ((2, 3, 0, 8), (100, 8, 24, 1)),
        ((2, 2, 4, 4), (16, 16, 4, 1)),
    ],
    ids=["heads last", "one", "gaps", "expanded", "narrow", "empty", "overlapping"],
)
def test_memory_order_is_what_pytorch_is_told(
    sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    q = torch.zeros(1000).as_strided(sizes, strides)
    k = torch.randn(sizes)
    out, *_ = torch.ops.linear_vit.cpu_linear_attention(q, k, k, 1e-6, False)
    assert out.stride() == empty_like(q).stride()


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64])
def test_rows_are_read_in_place_or_copied_alike(instruction_set: str, head_dim: int) -> None:
    """Bit for bit: blocks of 64 dense, aligned rows are not copied, but the last 22 here are, and
    all of those that begin between cache lines."""
    shape, dtype = (2, 3, 150, head_dim), precision(instruction_set)
    dense = [torch.randn(shape, dtype=dtype) for _ in range(4)]
    apart = [torch.empty(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x) for x in dense]
    assert all(x.data_ptr() % 64 == 0 for x in dense)

    def outputs(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = kernels.linear_attention(*inputs, backend="cpu")
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    for one, other in zip(outputs(*dense), outputs(*apart), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [50, 1000])  # whole heads, and parts
def test_state_is_worked_out_again_alike(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in Attention(queries=tokens, keys=tokens, dtype=dtype).inputs())
    ops = torch.ops.linear_vit
    out, S, z = ops.cpu_linear_attention(q, k, v, 1e-6, True)
    saved = ops.cpu_linear_attention_backward(out, q, k, v, S, z, 1e-6, 0b111)
    nothing = torch.empty(0)
    again = ops.cpu_linear_attention_backward(out, q, k, v, nothing, nothing, 1e-6, 0b111)
    assert all(torch.equal(a, b) for a, b in zip(saved, again, strict=True))


def test_no_keys(instruction_set: str) -> None:
    q, k, v = Attention(keys=0, queries=9, dtype=precision(instruction_set)).inputs()
    for eps in (1e-6, 0.0):
        out = kernels.linear_attention(q, k, v, eps=eps, backend="cpu")
        assert torch.equal(out, torch.zeros_like(out))
        dq, dk, _ = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert torch.equal(dq, torch.zeros_like(q))
        assert dk.shape == k.shape


def test_no_queries_and_no_batch(instruction_set: str) -> None:
    for sizes in ({"queries": 0}, {"batch": 0}):
        q, k, v = Attention(dtype=precision(instruction_set), **sizes).inputs()
        out = kernels.linear_attention(q, k, v, backend="cpu")
        assert out.shape == q.shape
        gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_a_query_with_no_key_on_its_side(instruction_set: str) -> None:
    """0 / 0 is 0, with gradients of 0."""
    case = Attention(queries=5, keys=6, dtype=precision(instruction_set))
    q, k, v = (x.detach() for x in case.inputs())
    q, k = q.abs().requires_grad_(), (-k.abs()).requires_grad_()
    v.requires_grad_()
    out = kernels.linear_attention(q, k, v, eps=0.0, backend="cpu")
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_goes_where_the_reference_sends_it(instruction_set: str, where: str) -> None:
    case = Attention(dtype=precision(instruction_set))
    tensors = dict(zip("qkv", (x.detach() for x in case.inputs()), strict=True))
    tensors["k"] = tensors["k"].abs()  # so that a sign's rows hold no NaN of their own
    tensors["q"][0, 0, :9] = -tensors["q"][0, 0, :9].abs()
    tensors[where][0, 0, 3, 5] = float("nan")
    out = kernels.linear_attention(*tensors.values(), backend="cpu")
    exact = kernels.linear_attention(*(x.double() for x in tensors.values()), backend="reference")
    assert torch.equal(out.isnan(), exact.isnan())
    assert out.isnan().any()


def test_zeros_have_no_gradient(instruction_set: str) -> None:
    q, k, v = (x.detach() for x in Attention(dtype=precision(instruction_set)).inputs())
    for x in (q, k):
        x[..., ::3] = 0.0
        x[..., 1::3] *= -0.0
    q, k = q.requires_grad_(), k.requires_grad_()
    out = kernels.linear_attention(q, k, v, backend="cpu")
    for x, gradient in zip((q, k), torch.autograd.grad(out.sum(), (q, k)), strict=True):
        assert torch.equal(gradient[x == 0], torch.zeros_like(gradient[x == 0]))
        assert gradient[x != 0].abs().sum() > 0


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_VIT_CPU", "sse9")
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="LINEAR_VIT_CPU is 'sse9'"):
        kernels.linear_attention(q, q, q, backend="cpu")


def test_what_it_is_not_for() -> None:
    assert "use backend='torch'" in (kernels.backends("softmax_attention", "cpu")["cpu"] or "")
    usable = kernels.backends("linear_attention", "cpu", head_dim=257)["cpu"]
    assert usable is not None
    assert "head dim 257 is more than" in usable
    assert kernels.backends("linear_attention", "cuda")["cpu"] is not None


def test_it_is_the_default() -> None:
    for op in ("linear_attention", "linear_attention_packed", "ripple_pool", "ripple_expand"):
        assert kernels.default_backend(op, "cpu") == "cpu"
    assert kernels.default_backend("softmax_attention", "cpu") == "torch"


# ---- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_written(instruction_set: str, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns through a filter that only copies its middle token."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = patterns.view(1, 1, 1, -1)
    weight = torch.zeros(x.shape[-1], 3, 3, dtype=dtype)
    weight[:, 1, 1] = 1.0
    out = kernels.ripple_pool(x, weight, axis=0, backend="cpu")
    finite = x.isfinite()
    assert torch.equal(out[finite], x[finite])
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(instruction_set: str, dtype: torch.dtype) -> None:
    """Products of halves, exact in float32, rounded as PyTorch does, subnormals too."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 1, 4096)
    scale = 2.0 ** torch.randint(-24, 8, shape, generator=generator)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    weight = torch.zeros(4096, 3, 3, dtype=dtype)
    weight[:, 1, 1] = torch.randn(4096, generator=generator).to(dtype)
    out = kernels.ripple_pool(x, weight, axis=0, backend="cpu")
    assert torch.equal(out, (x.float() * weight[:, 1, 1].float()).to(dtype))


# ---- ripple --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["ripple_pool", "ripple_expand"])
def test_ripple(instruction_set: str, op: str, axis: int, dtype: torch.dtype) -> None:
    for rows, cols, channels in ((1, 1, 3), (1, 6, 64), (7, 1, 16), (5, 6, 70), (8, 9, 133)):
        case = Ripple(op, rows=rows, cols=cols, channels=channels, axis=axis, dtype=dtype)
        for layout in ("contiguous", "transposed", "sliced"):
            assert_accurate(dataclasses.replace(case, layout=layout), "cpu")


@pytest.mark.parametrize("cols", [15, 16, 17, 32, 33])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["ripple_pool", "ripple_expand"])
def test_ripple_where_its_pieces_of_16_tokens_end(
    instruction_set: str, op: str, axis: int, cols: int
) -> None:
    assert_accurate(Ripple(op, rows=3, cols=cols, channels=70, axis=axis), "cpu")


@pytest.mark.parametrize("op", ["ripple_pool", "ripple_expand"])
@pytest.mark.parametrize("batch", [0, 40])
def test_ripple_batches(op: str, batch: int) -> None:
    case = Ripple(op, batch=batch, rows=3, cols=4)
    if batch:
        assert_accurate(case, "cpu")
        return
    for actual, expected in zip(results(case, "cpu"), reference_results(case), strict=True):
        assert actual.shape == expected.shape
        assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [96, 100])  # lines of whole cache lines, and others
@pytest.mark.parametrize("axis", [0, 1])
def test_large_grids_are_written_past_the_caches_alike(
    instruction_set: str, axis: int, channels: int, dtype: torch.dtype
) -> None:
    """The same bits as where its images are few: outputs and gradients of tokens."""
    size = dtype.itemsize
    batch = 2 * (4 << 20) // (16 * 6 * channels * size) + 1  # half of it is over 4 MB, too
    x, z, weight, pair = (
        torch.randn(*sizes, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_()
        for i, sizes in enumerate(
            [
                (batch, 16, 6, channels),
                (batch, 8, 6, channels) if axis == 0 else (batch, 16, 3, channels),
                (channels, 3, 3),
                (2, channels),
            ]
        )
    )

    def made(count: int) -> list[Tensor]:
        pooled = kernels.ripple_pool(x[:count], weight, axis=axis, backend="cpu")
        expanded = kernels.ripple_expand(
            z[:count], x[:count], pair, weight, axis=axis, backend="cpu"
        )
        by_pool = torch.autograd.grad(pooled, x, z.detach()[:count])
        by_expand = torch.autograd.grad(expanded, (z, x), x.detach()[:count])
        return [y[:2] for y in (pooled, expanded, *by_pool, *by_expand)]

    for many, few in zip(made(batch), made(2), strict=True):
        assert torch.equal(many, few)


def test_a_large_grid_sums_its_weights_gradient_accurately() -> None:
    assert_accurate(Ripple("ripple_expand", batch=3, rows=64, cols=64, channels=16), "cpu")


def test_one_nan_token_reaches_its_neighbours_only(instruction_set: str) -> None:
    x, weight = (t.detach() for t in Ripple(rows=9, cols=9).inputs())
    x[0, 4, 4, 2] = float("nan")
    out: Tensor = kernels.ripple_pool(x, weight, axis=0, backend="cpu")
    expected = kernels.ripple_pool(x.double(), weight.double(), axis=0, backend="reference")
    assert torch.equal(out.isnan(), expected.isnan())
