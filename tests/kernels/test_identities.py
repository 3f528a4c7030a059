"""What must hold whatever the numbers: identities and edge cases of every usable backend."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from linear_vit import kernels
from linear_vit.kernels.accuracy import compare
from tests.kernels.cases import ATTENTION, DEVICE, DTYPES, Attention, op_backend_pairs

LINEAR = op_backend_pairs("linear_attention")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _inputs(case: Attention) -> list[torch.Tensor]:
    return [x.detach() for x in case.inputs()]


def _drawn(data: st.DataObject, op: str) -> list[torch.Tensor]:
    case = Attention(
        op,
        queries=data.draw(st.integers(1, 60)),
        keys=data.draw(st.integers(2, 60)),
        head_dim=32,
        seed=data.draw(st.integers(0, 1000)),
    )
    return _inputs(case)


few = hypothesis.settings(max_examples=4)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION, compiled=False))
@few
@hypothesis.given(data=st.data())
def test_permutations(op: str, backend: str, data: st.DataObject) -> None:
    """Permuting keys with their values changes nothing; permuting queries permutes rows."""
    q, k, v = _drawn(data, op)
    attend = getattr(kernels, op)
    out = attend(q, k, v, backend=backend)
    keys = torch.randperm(k.shape[2], device=DEVICE)
    shuffled = attend(q, k[:, :, keys], v[:, :, keys], backend=backend)
    torch.testing.assert_close(shuffled, out, **CLOSE)
    rows = torch.randperm(q.shape[2], device=DEVICE)
    torch.testing.assert_close(
        attend(q[:, :, rows], k, v, backend=backend), out[:, :, rows], **CLOSE
    )


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION, compiled=False))
@few
@hypothesis.given(data=st.data())
def test_convexity(op: str, backend: str, data: st.DataObject) -> None:
    """Each coordinate lies between the least and the greatest v; constant v comes back."""
    q, k, v = _drawn(data, op)
    attend = getattr(kernels, op)
    out = attend(q, k, v, backend=backend)
    slack = 1e-4
    assert (out <= v.amax(2, keepdim=True) + slack).all()
    assert (out >= v.amin(2, keepdim=True) - slack).all()
    constant = torch.full_like(v, 2.5)
    torch.testing.assert_close(
        attend(q, k, constant, backend=backend), torch.full_like(q, 2.5), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention", compiled=False))
@few
@hypothesis.given(data=st.data(), c=st.sampled_from((1e-2, 0.5, 8.0, 1e3)))
def test_scale_of_q_and_k_is_immaterial(
    op: str, backend: str, data: st.DataObject, c: float
) -> None:
    q, k, v = _drawn(data, op)
    out = kernels.linear_attention(q, k, v, eps=0.0, backend=backend)
    for scaled in ((q * c, k, v), (q, k * c, v)):
        torch.testing.assert_close(
            kernels.linear_attention(*scaled, eps=0.0, backend=backend), out, **CLOSE
        )


@pytest.mark.parametrize(("op", "backend"), LINEAR)
def test_kernel_is_half_the_norms_plus_the_product(op: str, backend: str) -> None:
    """φ(q)·φ(k) = ½(Σ|qᵢkᵢ| + q·k): the weights the operation must give one-hot values."""
    q, k, _ = _inputs(Attention(queries=9, keys=32, head_dim=32))
    one_hot = torch.eye(32, device=DEVICE).expand(1, 2, 32, 32)
    out = kernels.linear_attention(q, k, one_hot, backend=backend)
    weights = 0.5 * (q.abs() @ k.abs().transpose(-1, -2) + q @ k.transpose(-1, -2))
    expected = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("op", "backend"), LINEAR)
def test_states_of_token_ranges_add_up(op: str, backend: str) -> None:
    q, k, v = _inputs(Attention(heads=4, kv_heads=2, queries=20, keys=75))
    whole = kernels.linear_attention(q, k, v, backend=backend)
    parts = [
        kernels.linear_attention_state(k[:, :, a:b], v[:, :, a:b], backend=backend)
        for a, b in ((0, 30), (30, 31), (31, 75))
    ]
    S, z = (sum(part[i] for part in parts) for i in (0, 1))
    out = kernels.linear_attention_apply(q, S, z, backend=backend)
    torch.testing.assert_close(out, whole, **CLOSE)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION))
def test_grouped_queries_equal_repeated_heads(op: str, backend: str) -> None:
    q, k, v = _inputs(Attention(op, heads=4, kv_heads=2, queries=20, keys=24))
    attend = getattr(kernels, op)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(
        attend(q, k, v, backend=backend), attend(q, *repeated, backend=backend), **CLOSE
    )


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION))
@pytest.mark.parametrize("sizes", [(1, 3, 0), (1, 0, 5), (0, 3, 5), (1, 0, 0)])
def test_empty_axes(op: str, backend: str, sizes: tuple[int, int, int]) -> None:
    """M = 0 gives zeros, N = 0 or B = 0 an empty result; gradients are zeros of the right shape."""
    batch, queries, keys = sizes
    case = Attention(op, batch=batch, queries=queries, keys=keys)
    inputs = case.inputs()
    out = case.run(backend, inputs)
    assert out.shape == (batch, 2, queries, 32)
    assert (out == 0).all()
    for x, gradient in zip(
        inputs, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True
    ):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


TINY_EPS = (0.0, 1e-50, 1e-39, 1e-37, 1e-15, 1e-6)  # below float32's range, subnormal, ...


@pytest.mark.parametrize(("op", "backend"), LINEAR)
@pytest.mark.parametrize("eps", TINY_EPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["zero", "unmet", "all"])
def test_zero_query_row_and_any_eps(
    op: str, backend: str, eps: float, dtype: torch.dtype, rows: str
) -> None:
    """A query of zeros, or of a sign that no key has, comes out zero, with finite gradients, and
    leaves its neighbours accurate. Queries are no whole number of tiles: the last one has more."""
    case = Attention(queries=75, keys=40, head_dim=16, eps=eps, dtype=dtype)
    inputs = case.inputs()
    few = torch.arange(75, device=DEVICE) % 3 == 0
    with torch.no_grad():
        if rows == "zero":
            inputs[0][:, :, few] = 0.0
        elif rows == "unmet":
            inputs[1].abs_()
            inputs[0][:, :, few] = -inputs[0][:, :, few].abs()
    out = case.run(backend, inputs)
    gradients = torch.autograd.grad(out, inputs, case.gradient())
    if rows != "all":
        assert (out[:, :, few] == 0).all()
        assert (gradients[0][:, :, few] == 0).all()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = case.run("reference", exact)
    exact_gradients = torch.autograd.grad(exact_out, exact, case.gradient().double())
    assert compare(out, exact_out.detach(), gradient=False).passed
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert compare(a, b, gradient=True).passed, compare(a, b, gradient=True)


@pytest.mark.parametrize(("op", "backend"), LINEAR)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("rest", [-60.0, 0.0])
def test_float16_of_a_query_that_hardly_meets_a_key(
    op: str, backend: str, head_dim: int, rest: float
) -> None:
    """1 / E times what it has where no key has anything is beyond float16, but nobody else's
    gradient may hear of it."""
    case = Attention(queries=40, keys=40, head_dim=head_dim, dtype=torch.float16)
    inputs = case.inputs()
    with torch.no_grad():
        inputs[0][0, 0, 5] = rest
        inputs[0][0, 0, 5, 3] = 1e-4
        inputs[1].abs_()
    gradients = torch.autograd.grad(case.run(backend, inputs), inputs, case.gradient())
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = case.run("reference", exact)
    expected = torch.autograd.grad(out, exact, case.gradient().double())
    for a, b in zip(gradients, expected, strict=True):
        assert compare(a, b, gradient=True).rms_error < 2e-3, compare(a, b, gradient=True)


@pytest.mark.parametrize(("op", "backend"), LINEAR)
@pytest.mark.parametrize("sparse", [1e-4, 1e-6])
def test_float16_of_what_few_keys_have(op: str, backend: str, sparse: float) -> None:
    """A feature that one key has, a little of it: its gradient is as accurate as the others'."""
    case = Attention(queries=200, keys=200, head_dim=64, dtype=torch.float16)
    inputs = case.inputs()
    with torch.no_grad():
        inputs[1].abs_().mul_(100)
        inputs[1][..., 7, 5] = -sparse
    dk = torch.autograd.grad(case.run(backend, inputs), inputs, case.gradient())[1][..., 7, 5]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = case.run("reference", exact)
    expected = torch.autograd.grad(out, exact, case.gradient().double())[1][..., 7, 5]
    torch.testing.assert_close(dk.double(), expected, rtol=5e-3, atol=0.0)


@pytest.mark.parametrize(("op", "backend"), LINEAR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_keys_of_two_kinds_cancels(op: str, backend: str, dtype: torch.dtype) -> None:
    """Queries meet keys of their own kind, all with nearly one value: out is about v, and dS v and
    dz are much larger than dk."""
    kinds = torch.where(torch.arange(128, device=DEVICE) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    case = Attention(queries=128, keys=128, head_dim=64, dtype=dtype)
    inputs = case.inputs()
    with torch.no_grad():
        inputs[0].abs_().mul_(kinds)
        inputs[0].copy_(inputs[0][:, :, :2].repeat(1, 1, 64, 1))
        inputs[1].abs_().mul_(kinds)
        inputs[2].add_(3 * kinds)
    gradient = case.gradient() + 3
    dk = torch.autograd.grad(case.run(backend, inputs), inputs, gradient)[1]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(case.run("reference", exact), exact, gradient.double())[1]
    error = (dk.double() - expected).norm() / expected.norm()
    assert error < 1.5 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize(("_", "backend"), op_backend_pairs("linear_attention_apply"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normaliser_of_what_is_tiny_beside_the_rest(
    _: str, backend: str, dtype: torch.dtype
) -> None:
    """S = z gives E/(E + eps), which shows E where eps is about as large."""
    torch.manual_seed(0)
    for eps in (1e6, 1.0, 1e-6):
        z = eps * 2 * (1 + torch.rand(1, 1, 32, device=DEVICE))
        z[..., 3] = 3e6  # what the others are beside
        q = torch.rand(1, 1, 50, 16, device=DEVICE).to(dtype)
        q[..., 3] = 0.0
        S = z.unsqueeze(-1).expand(-1, -1, -1, 16).contiguous()
        out = kernels.linear_attention_apply(q, S, z, eps=eps, backend=backend)
        E = q.double() @ z[..., :16].double().unsqueeze(-1)
        expected = (E / (E + eps)).expand_as(out)
        assert compare(out, expected, gradient=False).passed


@pytest.mark.parametrize(("_", "backend"), op_backend_pairs("linear_attention_apply"))
@pytest.mark.parametrize("head_dim", [32, 64])
def test_gradient_of_a_state_whose_features_are_of_any_size(
    _: str, backend: str, head_dim: int
) -> None:
    """Each feature's is as accurate as the others', and so is that of one which no key has."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 200, head_dim, device=DEVICE) for _ in range(4))
    size = torch.logspace(-3, 3, head_dim, device=DEVICE)
    k[..., 7].abs_()
    S, z = kernels.linear_attention_state(k * size, v, backend="reference")
    q, dout = (q / size).half(), dout.half()
    exact = S.double().requires_grad_()
    out = kernels.linear_attention_apply(q, S.requires_grad_(), z, backend=backend)
    exact_out = kernels.linear_attention_apply(q.double(), exact, z.double(), backend="reference")
    (found,) = torch.autograd.grad(out, S, dout)
    (expected,) = torch.autograd.grad(exact_out, exact, dout.double())
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 2e-3, error


@pytest.mark.parametrize(("op", "backend"), LINEAR)
def test_no_gradient_at_zero(op: str, backend: str) -> None:
    """dx = 0 at x = 0, where φ has a corner."""
    case = Attention(queries=12, keys=12)
    inputs = case.inputs()
    with torch.no_grad():
        inputs[0][..., ::3] = 0.0
        inputs[1][..., ::2] = 0.0
    dq, dk, _ = torch.autograd.grad(case.run(backend, inputs), inputs, case.gradient())
    assert (dq[..., ::3] == 0).all()
    assert (dk[..., ::2] == 0).all()
    assert (dk[..., 1::2] != 0).any()


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION))
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_reaches_what_it_must(op: str, backend: str, poisoned: str) -> None:
    """A NaN in a key or value reaches every row of its head, one in a query its own row only."""
    case = Attention(op, queries=40, keys=70)
    inputs = _inputs(case)
    tensor = dict(zip("qkv", inputs, strict=True))[poisoned]
    tensor[0, 1, 33, 5] = float("nan")
    out = getattr(kernels, op)(*inputs, backend=backend)
    assert torch.isfinite(out[0, 0]).all()
    if poisoned == "q":
        assert out[0, 1, 33].isnan().all()
        others = torch.arange(40, device=DEVICE) != 33
        assert torch.isfinite(out[0, 1, others]).all()
    elif poisoned == "k":
        assert out[0, 1].isnan().all()
    else:
        assert out[0, 1, :, 5].isnan().all()


@pytest.mark.parametrize(("_", "backend"), op_backend_pairs("linear_attention_apply"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poisoned", ["S", "z", "dS", "dz"])
def test_nan_of_a_state_shows(_: str, backend: str, dtype: torch.dtype, poisoned: str) -> None:
    """Of either sign, whatever the signs of the queries and keys that meet it."""
    torch.manual_seed(0)
    x, v = (torch.rand(1, 2, 20, 16, dtype=dtype, device=DEVICE) for _ in range(2))
    S, z = kernels.linear_attention_state(x, v, backend="reference")
    if poisoned in ("S", "z"):
        (S if poisoned == "S" else z)[0, 1, 16 + 5] = float("nan")  # what no query here uses
        out = kernels.linear_attention_apply(x, S, z, backend=backend)
        assert out[0, 1].isnan().all()
        assert torch.isfinite(out[0, 0]).all()
    else:
        x.requires_grad_()
        found = kernels.linear_attention_state(x, v.requires_grad_(), backend=backend)
        gradients = [torch.zeros_like(S), torch.zeros_like(z)]
        gradients[poisoned == "dz"][0, 1, 16 + 5] = float("nan")
        dx, dv = torch.autograd.grad(found, [x, v], gradients)
        assert torch.isfinite(dx[0, 0]).all()
        # As PyTorch has it: relu's gradient passes none on where it was zero.
        assert dv[0, 1].isnan().all() == (poisoned == "dS")
        assert torch.isfinite(dv[0, 0]).all()


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION))
@pytest.mark.parametrize("layout", ["contiguous", "tokens_first", "packed", "expanded"])
def test_memory_order_is_the_inputs(op: str, backend: str, layout: str) -> None:
    """Output and gradients nest their axes as their inputs do: a projection is never copied."""
    case = Attention(op, batch=2, layout=layout, queries=20, keys=20)
    inputs = case.inputs()
    out = case.run(backend, inputs)
    assert out.stride() == torch.empty_like(inputs[0]).stride()
    gradients = torch.autograd.grad(out, inputs, case.gradient())
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*ATTENTION))
def test_one_tensor_as_all_three(op: str, backend: str) -> None:
    """Self-attention without projections: x is q, k and v, and collects three gradients."""
    x = _inputs(Attention(op, queries=12))[0].requires_grad_()
    attend = getattr(kernels, op)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    out, expected = attend(x, x, x, backend=backend), attend(*copies, backend=backend)
    torch.testing.assert_close(out, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    torch.testing.assert_close(
        gradient, sum(torch.autograd.grad(expected.sum(), copies)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("softmax_attention"))
def test_softmax_scale(op: str, backend: str) -> None:
    q, k, v = _inputs(Attention(op, queries=10, keys=20))
    out = kernels.softmax_attention(q, k, v, scale=0.3, backend=backend)
    expected = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v
    torch.testing.assert_close(out, expected, **CLOSE)
