"""What softmax attention's kernels have to get right beyond the cases every operation shares."""

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels.accuracy import compare
from linear_vit.kernels.softmax_attention.torch import grouped_as_rows
from tests.kernels.cases import DEVICE, DTYPES, Attention, assert_accurate, op_backend_pairs

BACKENDS = op_backend_pairs("softmax_attention", compiled=False)
OP = "softmax_attention"


def run(backend: str, inputs: list[Tensor], gradient: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients; of the backend "exact", in float64 from the definition."""
    if backend == "exact":
        inputs = [x.detach().double().requires_grad_() for x in inputs]
        backend, gradient = "reference", gradient.double()
    out = kernels.softmax_attention(*inputs, scale=scale, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


# Tiles are 16 to 128 rows: whole ones, cut ones, and both sides of more than one.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(128, 128, 16), (200, 130, 64), (1, 300, 96), (260, 5, 48)]
)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_many_tiles(
    op: str, backend: str, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = Attention(op, 1, 2, 1, queries, keys, head_dim, dtype)
    assert_accurate(case, backend)


@pytest.mark.parametrize(
    ("keys", "scale", "gradient_scale", "seen_in"),
    [
        # Weights of 1 / 41,891 are 400.5 of float16's smallest steps: half a step is 1.2e-3 of
        # them. A large gradient keeps dv itself out of the subnormals.
        pytest.param(41_891, 0.0, 1024.0, (0, 3), id="weights"),
        # Score gradients of 2e-6, whose sum over the keys is not small.
        pytest.param(20_000, 0.25, 1 / 32, (1,), id="score gradients"),
    ],
)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_float16_may_be_subnormal_on_the_way(
    op: str,
    backend: str,
    keys: int,
    scale: float,
    gradient_scale: float,
    seen_in: tuple[int, ...],
) -> None:
    if backend == "torch":
        pytest.skip("PyTorch's kernels round such weights to float16 as they are")
    case = Attention(op, 1, 1, 1, 4, keys, 16, torch.float16)
    inputs, gradient = case.inputs(), case.gradient() * gradient_scale
    actual = run(backend, inputs, gradient, scale)
    expected = run("exact", inputs, gradient, scale)
    for index in seen_in:
        comparison = compare(
            actual[index], expected[index], gradient=index > 0, dtype=torch.float16
        )
        assert comparison.passed, f"{index}: {comparison}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_any_scale(op: str, backend: str, scale: float, dtype: torch.dtype) -> None:
    """A negative scale turns the largest product into the smallest score; 0 weighs all alike."""
    case = Attention(op, 1, 2, 1, 40, 70, 16, dtype)
    inputs, gradient = case.inputs(), case.gradient()
    actual = run(backend, inputs, gradient, scale)
    expected = run("exact", inputs, gradient, scale)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if scale == 0.0 and index in (1, 2):
            assert (a == 0).all(), index
        else:
            comparison = compare(a, b, gradient=index > 0)
            assert comparison.passed, f"{index}: {comparison}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_scores_far_below_zero(op: str, backend: str, dtype: torch.dtype) -> None:
    """Zeros that fill a tile of keys up would score highest, and must not count."""
    case = Attention(op, 1, 1, 1, 40, 37, 16, dtype)
    q, k, v = (x.detach() for x in case.inputs())
    inputs = [x.requires_grad_() for x in (q + 24, k - 24, v)]
    actual = run(backend, inputs, case.gradient(), 0.25)
    expected = run("exact", inputs, case.gradient(), 0.25)
    assert all(x.isfinite().all() for x in actual)
    # Scores of 2e3 are off by 1e-4 in float32 already, which is more than SPEC's tolerances.
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_packed_is_the_same(op: str, backend: str, dtype: torch.dtype) -> None:
    """A packed projection gives what its three parts give, and one gradient in its memory order."""
    case = Attention(op, 2, 3, 3, 70, 70, 32, dtype, "packed")
    parts = [x.detach() for x in case.inputs()]
    qkv = torch.stack([x.transpose(1, 2) for x in parts], dim=2).requires_grad_()
    gradient = case.gradient().transpose(1, 2).contiguous()
    out = kernels.softmax_attention_packed(qkv, backend=backend)
    (dqkv,) = torch.autograd.grad(out, qkv, gradient)
    inputs = [x.requires_grad_() for x in parts]
    expected = run(backend, inputs, gradient.transpose(1, 2), 32**-0.5)
    assert out.stride() == torch.empty(2, 70, 3, 32).stride()
    assert dqkv.stride() == qkv.stride()
    assert torch.equal(out.transpose(1, 2), expected[0])
    for index, part in enumerate(expected[1:]):
        assert torch.equal(dqkv[:, :, index].transpose(1, 2), part), index


@pytest.mark.parametrize("op", [OP, "softmax_attention_packed"])
@pytest.mark.parametrize("backend", [pair.values[1] for pair in BACKENDS])
def test_implementation_is_one_line(op: str, backend: str) -> None:
    qkv = torch.randn(1, 16, 3, 2, 32, device=DEVICE)
    tensors = [qkv] if op.endswith("packed") else list(qkv.permute(2, 0, 3, 1, 4).unbind())
    said = kernels.implementation(op, backend, *tensors)
    assert said
    assert "\n" not in said


def test_grouped_queries_as_rows() -> None:
    """What the torch backend does for float32 on CUDA, wherever this runs."""
    for layout in ("contiguous", "tokens_first"):
        case = Attention(OP, 2, 6, 2, 20, 30, 16, layout=layout)
        q, k, v = case.inputs()
        out = grouped_as_rows(q, k, v, 0.25)
        expected = run("exact", [q, k, v], case.gradient(), 0.25)
        gradients = torch.autograd.grad(out, [q, k, v], case.gradient())
        for a, b in zip([out.detach(), *gradients], expected, strict=True):
            assert compare(a, b, gradient=True).passed


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_what_lies_past_the_end_is_never_seen(op: str, backend: str) -> None:
    """The memory behind the last query and key of each head is NaN."""
    case = Attention(op, 1, 2, 2, 37, 70, 16, torch.float32)

    def in_nan(x: Tensor) -> Tensor:
        wider = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3]), float("nan"))
        wider[:, :, : x.shape[2]] = x
        return wider[:, :, : x.shape[2]]

    inputs = [x.detach() for x in case.inputs()]
    expected = run(backend, [x.clone().requires_grad_() for x in inputs], case.gradient(), 0.25)
    surrounded = [in_nan(x).requires_grad_() for x in inputs]
    actual = run(backend, surrounded, in_nan(case.gradient()), 0.25)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
