"""``torch.func`` and forward-mode AD: right on every backend, or an error in one sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from linear_vit import attention, kernels
from tests.kernels.cases import DEVICE, Attention, Ripple, op_backend_pairs

SAMPLES = 3
AXES = (0, 1)


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def _state_inputs() -> list[Tensor]:
    k, v = _normal((2, 1, 6, 16), (2, 1, 6, 16))
    return [*_normal((2, 2, 5, 16)), *kernels.linear_attention_state(k, v, backend="reference")]


# An operation's inputs, and its call with them alone: float32, tiny.
CALLS: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Any]]] = {
    **{
        op: (Attention(op, 2, 2, 1, 5, 6, 16).inputs, getattr(kernels, op))
        for op in ("linear_attention", "softmax_attention")
    },
    **{
        op: (Attention(op, 2, 2, 2, 5, 5, 16).inputs, getattr(kernels, op))
        for op in ("linear_attention_packed", "softmax_attention_packed")
    },
    "linear_attention_state": (
        lambda: _normal((2, 1, 6, 16), (2, 1, 6, 16)),
        kernels.linear_attention_state,
    ),
    "linear_attention_apply": (_state_inputs, kernels.linear_attention_apply),
    "ripple_pool": (
        Ripple("ripple_pool", 2, 3, 4, 4).inputs,
        lambda *x, backend: kernels.ripple_pool(*x, axis=0, backend=backend),
    ),
    "ripple_expand": (
        Ripple("ripple_expand", 2, 3, 4, 4).inputs,
        lambda *x, backend: kernels.ripple_expand(*x, axis=0, backend=backend),
    ),
    "ripple_pool_stages": (
        lambda: _normal((2, 3, 4, 4), (4, 3, 3), (4, 3, 3)),
        lambda x, *w, backend: kernels.ripple_pool_stages(x, w, axes=AXES, backend=backend),
    ),
    "ripple_expand_stages": (
        lambda: _normal((2, 2, 2, 4), (2, 3, 4, 4), (2, 2, 4, 4), *[(2, 4)] * 2, *[(4, 3, 3)] * 2),
        lambda z, *x, backend: kernels.ripple_expand_stages(
            z, x[:2], x[2:4], x[4:], axes=AXES, backend=backend
        ),
    ),
}
EVERY = op_backend_pairs(*CALLS, compiled=False)
OWN = [pair for pair in EVERY if kernels.backend_rows()[pair.values[1]].own]
COMPOSED = [pair for pair in EVERY if not kernels.backend_rows()[pair.values[1]].own]


def _function(op: str, backend: str) -> Callable[..., Tensor]:
    """The operation's results as one vector."""

    def function(*inputs: Tensor) -> Tensor:
        results = CALLS[op][1](*inputs, backend=backend)
        results = [results] if isinstance(results, Tensor) else results
        return torch.cat([x.flatten() for x in results])

    return function


def _inputs(op: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.detach().to(dtype) for x in CALLS[op][0]()]


def _loss(op: str, backend: str) -> Callable[..., Tensor]:
    """A number whose gradient is different in every element of the results."""
    function = _function(op, backend)

    def loss(*inputs: Tensor) -> Tensor:
        out = function(*inputs)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE)).sum()

    return loss


def _exact_gradients(op: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return torch.autograd.grad(_loss(op, "reference")(*exact), exact)


def _assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_grad_and_jacrev(op: str, backend: str) -> None:
    inputs = _inputs(op)
    every = tuple(range(len(inputs)))
    found = grad(_loss(op, backend), argnums=every)(*inputs)
    _assert_close(found, _exact_gradients(op, inputs))
    # The Jacobian of a few results: as many backward passes in one vmap.
    few = jacrev(lambda *x: _function(op, backend)(*x)[:4], argnums=every)(*inputs)
    exact = [x.double() for x in inputs]
    _assert_close(few, jacrev(lambda *x: _function(op, "reference")(*x)[:4], argnums=every)(*exact))


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_ensembles_and_gradients_a_sample(op: str, backend: str) -> None:
    """vmap of the call, of its gradient, and the gradient of vmap; over all inputs, or the first
    alone."""
    inputs = _inputs(op)
    every = tuple(range(len(inputs)))
    samples = [[x * s for x in inputs] for s in (1.0, -0.5, 2.0)]
    stacked = [torch.stack(column, dim=1) for column in zip(*samples, strict=True)]
    out = vmap(_function(op, backend), in_dims=1)(*stacked)
    exact = [_function(op, "reference")(*(x.double() for x in sample)) for sample in samples]
    _assert_close(out, exact)

    found = vmap(grad(_loss(op, backend), argnums=every), in_dims=1)(*stacked)
    expected = [
        torch.stack(x) for x in zip(*(_exact_gradients(op, s) for s in samples), strict=True)
    ]
    _assert_close(found, expected)

    total = grad(lambda *x: vmap(_loss(op, backend), in_dims=1)(*x).sum(), argnums=every)(*stacked)
    _assert_close(total, [x.movedim(0, 1) for x in expected])

    one = vmap(grad(_loss(op, backend), argnums=every), in_dims=(1, *[None] * (len(inputs) - 1)))
    each = [_exact_gradients(op, [sample[0], *inputs[1:]]) for sample in samples]
    _assert_close(one(stacked[0], *inputs[1:]), [torch.stack(x) for x in zip(*each, strict=True)])


@pytest.mark.parametrize(("op", "backend"), COMPOSED)
def test_tangents(op: str, backend: str) -> None:
    """jvp of PyTorch's compositions; SDPA's own kernels have none and say so."""
    inputs, tangents = _inputs(op), [x.cos() for x in _inputs(op)]
    if op.startswith("softmax") and backend == "torch":
        with pytest.raises(NotImplementedError, match="forward AD"):
            jvp(_function(op, backend), tuple(inputs), tuple(tangents))
        return
    _, found = jvp(_function(op, backend), tuple(inputs), tuple(tangents))
    exact = (tuple(x.double() for x in inputs), tuple(x.double() for x in tangents))
    _, expected = jvp(_function(op, "reference"), *exact)
    _assert_close([found], [expected])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(_function(op, backend)(*duals)).tangent
    _assert_close([tangent], [expected])


@pytest.mark.parametrize("op", ["linear_attention", "ripple_expand"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_second_derivatives_in_forward_mode(op: str, backend: str) -> None:
    inputs = _inputs(op)
    found = hessian(lambda x: _loss(op, backend)(x, *inputs[1:]))(inputs[0])
    exact = [x.double() for x in inputs]
    expected = hessian(lambda x: _loss(op, "reference")(x, *exact[1:]))(exact[0])
    _assert_close([found], [expected])


@pytest.mark.parametrize(("op", "backend"), OWN)
def test_own_kernels_refuse_tangents(op: str, backend: str) -> None:
    """Zero, or nonsense, would be worse."""
    inputs = _inputs(op)
    says = rf"forward-mode differentiation through the {backend} kernels of \w+ is not available"
    with pytest.raises(NotImplementedError, match=says):
        jvp(_function(op, backend), tuple(inputs), tuple(inputs))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=says):
        _function(op, backend)(*(forward_ad.make_dual(x, x) for x in inputs))
    with pytest.raises(NotImplementedError, match=says):
        hessian(lambda x: _loss(op, backend)(x, *inputs[1:]))(inputs[0])


@pytest.mark.parametrize("backend", ["reference", "torch", None])
@pytest.mark.parametrize("kind", attention.ATTENTION_TYPES)
def test_an_ensemble_of_models(kind: str, backend: str | None) -> None:
    def model(seed: int) -> torch.nn.Module:
        return attention.VisionTransformer(
            img_size=8, patch_size=2, num_classes=3, dim=8, depth=1, heads=2, mlp_dim=8,
            attention_type=kind, backend=backend, seed=seed,
        ).to(DEVICE)  # fmt: skip

    models = [model(seed) for seed in range(SAMPLES)]
    parameters, buffers = stack_module_state(models)
    (images,) = _normal((2, 3, 8, 8))

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (images,)).square().sum()

    found = vmap(grad(loss))(parameters, buffers)
    for i, one in enumerate(models):
        one(images).square().sum().backward()
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention", compiled=False))
def test_a_compiled_tangent_is_right_or_fails(op: str, backend: str) -> None:
    (q,) = _normal((1, 2, 8, 16))

    def tangent(q: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, q)
            out = kernels.linear_attention(dual, q * 2, q * 3, backend=backend)
            return forward_ad.unpack_dual(out).tangent

    compiled = torch.compile(tangent, backend="aot_eager")
    if kernels.backend_rows()[backend].own:
        with pytest.raises(NotImplementedError, match="forward-mode differentiation through the"):
            compiled(q)
    else:
        torch.testing.assert_close(compiled(q), tangent(q))


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*CALLS, compiled=False))
def test_vmap_over_no_samples(op: str, backend: str) -> None:
    if not kernels.backend_rows()[backend].own:
        pytest.skip("PyTorch's own rules")
    make, call = CALLS[op]
    inputs = make()
    one = call(*inputs, backend=backend)
    none = vmap(lambda *x: call(*x, backend=backend))(*(x.new_zeros(0, *x.shape) for x in inputs))
    if isinstance(one, Tensor):
        none, one = (none,), (one,)
    assert [x.shape for x in none] == [(0, *x.shape) for x in one]


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs("linear_attention"))
def test_a_compiled_transform_is_right_or_fails(op: str, backend: str) -> None:
    """Dynamo can't differentiate own kernels inside a transform: what it can't do it has to say."""
    (q,) = _normal((1, 2, 8, 16))

    def loss(q: Tensor, backend: str) -> Tensor:
        return kernels.linear_attention(q, q, q, backend=backend).square().sum()

    try:
        found = torch.compile(grad(loss), backend="aot_eager")(q, backend)
    except torch._dynamo.exc.TorchDynamoException:
        return
    torch.testing.assert_close(found, grad(loss)(q, "reference"), atol=1e-4, rtol=1e-4)
