"""Every usable backend against the float64 reference: output and gradients, by the accuracy rule.

The named cases are the edges worth a name; hypothesis draws the rest.
"""

import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from linear_vit import kernels
from linear_vit.kernels.rows import HEAD_DIMS
from tests.kernels.cases import (
    ATTENTION,
    DEVICE,
    DTYPES,
    PACKED,
    Attention,
    Case,
    Ripple,
    assert_accurate,
    comparisons,
    on_every,
    op_backend_pairs,
    reference_results,
    results,
)

ATTENTION_CASES: list[Case] = [
    case
    for op in ATTENTION
    for case in (
        *(Attention(op, dtype=dtype, queries=70, keys=77, head_dim=64) for dtype in DTYPES),
        Attention(op, heads=4, kv_heads=2, queries=33, keys=65, head_dim=48, batch=2),
        Attention(op, heads=4, kv_heads=1, layout="tokens_first", head_dim=16),
        Attention(op, layout="packed", dtype=torch.bfloat16),
        Attention(op, heads=2, kv_heads=2, layout="expanded", queries=9, keys=40),
        Attention(op, layout="odd", dtype=torch.float16, queries=31, keys=50, head_dim=16),
        Attention(op, queries=1, keys=2, head_dim=96),
        Attention(op, heads=1, kv_heads=1, queries=40, keys=150, head_dim=128),
        Attention(op, heads=1, kv_heads=1, queries=300, keys=290, head_dim=16),
    )
]
PACKED_CASES: list[Case] = [
    case
    for op in PACKED
    for case in (
        *(Attention(op, dtype=dtype, head_dim=64) for dtype in DTYPES),
        Attention(op, batch=2, heads=3, kv_heads=3, queries=33, keys=33, head_dim=48),
        Attention(op, layout="odd", dtype=torch.float16, queries=31, keys=31, head_dim=16),
        Attention(op, layout="heads_first", dtype=torch.bfloat16, queries=40, keys=40),
        Attention(op, heads=1, kv_heads=1, queries=290, keys=290, head_dim=16),
    )
]
RIPPLE_CASES: list[Case] = [
    case
    for op in ("ripple_pool", "ripple_expand")
    for case in (
        *(Ripple(op, axis=axis, dtype=dtype) for axis in (0, 1) for dtype in DTYPES),
        Ripple(op, rows=1, cols=1, axis=0),
        Ripple(op, rows=1, cols=7, axis=1, layout="transposed"),
        Ripple(op, rows=8, cols=3, axis=1, channels=70, batch=1),
        Ripple(op, rows=4, cols=4, axis=0, layout="sliced", dtype=torch.float16),
    )
]


@pytest.mark.parametrize(
    ("case", "backend"), on_every(ATTENTION_CASES + PACKED_CASES + RIPPLE_CASES, compiled=6)
)
def test_named_cases(case: Case, backend: str) -> None:
    assert_accurate(case, backend)


@st.composite
def attention_cases(draw: st.DrawFn, op: str) -> Attention:
    kv_heads = draw(st.integers(1, 2))
    case = Attention(
        op,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        queries=draw(st.integers(1, 90)),
        keys=draw(st.integers(2, 90)),
        head_dim=draw(st.sampled_from((16, 32, 48))),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(("contiguous", "tokens_first", "packed", "odd", "expanded"))),
        seed=draw(st.integers(0, 1000)),
    )
    if case.layout == "packed":
        case = dataclasses.replace(case, kv_heads=case.heads, keys=case.queries + 1)
        case = dataclasses.replace(case, queries=case.keys)
    return case


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION, compiled=False))
@hypothesis.given(data=st.data())
def test_drawn_attention(op: str, backend: str, data: st.DataObject) -> None:
    assert_accurate(data.draw(attention_cases(op)), backend)


@pytest.mark.parametrize(
    ("op", "backend"), op_backend_pairs("ripple_pool", "ripple_expand", compiled=False)
)
@hypothesis.given(data=st.data())
def test_drawn_ripple(op: str, backend: str, data: st.DataObject) -> None:
    case = Ripple(
        op,
        batch=data.draw(st.integers(1, 2)),
        rows=data.draw(st.integers(1, 9)),
        cols=data.draw(st.integers(1, 9)),
        channels=data.draw(st.integers(1, 40)),
        axis=data.draw(st.integers(0, 1)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_accurate(case, backend)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION, compiled=False))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(op: str, backend: str, head_dim: int) -> None:
    assert_accurate(Attention(op, head_dim=head_dim, queries=40, keys=35), backend)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention", compiled=False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "mean"), [(1e-2, 0.0), (1.0, 1.0), (1e-2, 1.0), (30.0, 1.0)])
def test_no_worse_than_composition_where_gradients_cancel(
    op: str, backend: str, dtype: torch.dtype, scale: float, mean: float
) -> None:
    """Off the unit-variance contract: at most 1.5× the error of the float32 composition."""
    case = Attention(op, dtype=dtype, scale=scale, mean=mean, queries=64, keys=96)
    _assert_no_worse_than_composition(case, backend)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention", compiled=False))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 16])
def test_no_worse_than_composition_with_few_features(
    op: str, backend: str, dtype: torch.dtype, head_dim: int
) -> None:
    """Roundings don't average out over few features, and of one nothing is left of dq but eps."""
    reason = kernels.backends(op, DEVICE, dtype=dtype, head_dim=head_dim)[backend]
    if reason is not None:
        pytest.skip(reason)
    for seed in range(2):
        case = Attention(
            op, dtype=dtype, mean=3.3, heads=4, kv_heads=4, head_dim=head_dim, seed=seed
        )
        of_keys = 1.5 if backend == "cpu" else 1.25  # the GPU kernels take another term there
        _assert_no_worse_than_composition(case, backend, of_keys=of_keys)


def _assert_no_worse_than_composition(
    case: Attention, backend: str, *, of_keys: float = 1.5
) -> None:
    dtype, bounds = case.dtype, dict(comparisons(case, "torch"))
    for name, comparison in comparisons(case, backend):
        # Both round their result once; below that, a float32 composition has noise of its own.
        floor = torch.finfo(dtype).eps / 4
        times = of_keys if name == "gradient 1" else 1.5
        limit = max(times * bounds[name].rms_error, floor)
        assert comparison.rms_error <= limit, f"{name}: {comparison}, composition {bounds[name]}"


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention"))
@pytest.mark.parametrize("tokens", [200_000, pytest.param(1_048_576, marks=pytest.mark.slow)])
def test_long_float16_sequence_stays_finite(op: str, backend: str, tokens: int) -> None:
    """A float16 normaliser overflows near 164,000 tokens; a float32 one does not."""
    if backend == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter would take minutes")
    case = Attention(
        op, heads=1, kv_heads=1, queries=64, keys=tokens, head_dim=16, dtype=torch.float16
    )
    assert_accurate(case, backend)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION, "ripple_expand"))
def test_repeats_bit_for_bit(op: str, backend: str) -> None:
    case = Ripple(op) if op == "ripple_expand" else Attention(op, queries=130, keys=150)
    first, second = results(case, backend), results(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention_state"))
def test_state_and_apply(op: str, backend: str) -> None:
    """Float32 states against float64 ones; their gradients too, through arbitrary weights."""
    case = Attention(heads=4, kv_heads=2, queries=50, keys=45, head_dim=32)
    q, k, v = case.inputs()
    state_inputs = [k, v]
    exact_inputs = [x.detach().double().requires_grad_() for x in state_inputs]
    state = kernels.linear_attention_state(*state_inputs, backend=backend)
    exact = kernels.linear_attention_state(*exact_inputs, backend="reference")
    weights = [torch.randn(x.shape).to(DEVICE) for x in state]
    _compare_all(state, exact, state_inputs, exact_inputs, weights)

    apply_inputs = [q, *(x.detach().requires_grad_() for x in state)]
    exact_inputs = [x.detach().double().requires_grad_() for x in apply_inputs]
    out = kernels.linear_attention_apply(*apply_inputs, backend=backend)
    exact_out = kernels.linear_attention_apply(*exact_inputs, backend="reference")
    _compare_all([out], [exact_out], apply_inputs, exact_inputs, [case.gradient()])


def _compare_all(actual, expected, inputs, exact_inputs, weights) -> None:  # type: ignore[no-untyped-def]
    from linear_vit.kernels.accuracy import compare

    gradients = torch.autograd.grad(actual, inputs, weights)
    exact = torch.autograd.grad(expected, exact_inputs, [w.double() for w in weights])
    for a, b in zip(actual, expected, strict=True):
        assert compare(a, b, gradient=False).passed
    for a, b in zip(gradients, exact, strict=True):
        assert compare(a, b, gradient=True).passed


def test_reference_is_held_to_itself() -> None:
    """The float64 reference agrees with the explicit N × M matrix."""
    case = Attention(queries=20, keys=30)
    q, k, v = (x.detach().double() for x in case.inputs())
    phi_q, phi_k = (torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1) for x in (q, k))
    weights = phi_q @ phi_k.transpose(-1, -2)
    expected = (weights / (weights.sum(-1, keepdim=True) + case.eps)) @ v
    torch.testing.assert_close(reference_results(case)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "backend"), op_backend_pairs("linear_attention_state", compiled=False)
)
def test_float32_sum_over_many_tokens(op: str, backend: str) -> None:
    """The state of many tokens is still float32-accurate: sums over tokens are not plain."""
    from linear_vit.kernels.accuracy import compare

    k, v = torch.randn(2, 1, 1, 20_000, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = kernels.linear_attention_state(k.double(), v.double(), backend="reference")
    for a, b in zip(kernels.linear_attention_state(k, v, backend=backend), exact, strict=True):
        assert compare(a, b, gradient=False).passed, compare(a, b, gradient=False)
