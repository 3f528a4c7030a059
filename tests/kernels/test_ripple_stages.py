"""The pyramid in one call: every usable backend beside the float64 reference, level by level."""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from linear_vit import kernels
from linear_vit.attention import RippleAttention
from linear_vit.kernels.accuracy import compare
from linear_vit.kernels.ripple import (
    ripple_expand,
    ripple_expand_stages,
    ripple_pool,
    ripple_pool_stages,
    stages,
)
from linear_vit.kernels.ripple.reference import ripple_pool as exact_pool
from tests.kernels.cases import DEVICE, usable_backends

FUSED = ("triton", "cuda")  # backends with kernels of their own for a pyramid


def backends(*, fused: bool = False) -> list[Any]:
    """Usable backends as parameters; ``compiled`` compiles for seconds, and is slow."""
    marks = {"compiled": [pytest.mark.slow]}
    return [
        pytest.param(name, id=name, marks=marks.get(name, []))
        for name in usable_backends("ripple_pool_stages")
        if not fused or name in FUSED
    ]


@dataclass(frozen=True)
class Pyramid:
    """Level 0 (batch, rows, cols, channels) and the axis that each stage halves."""

    shape: tuple[int, int, int, int]
    axes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes, axes = "x".join(map(str, self.shape)), "".join(map(str, self.axes))
        return f"{sizes}-axes{axes}-{dtype}-{self.layout}"

    def shapes(self) -> list[tuple[int, int, int, int]]:
        return stages.level_shapes(self.shape, self.axes)

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
        wider = (*shape[:-1], shape[-1] + 3) if self.layout == "sliced" else shape
        x = torch.randn(wider, generator=generator).to(DEVICE, self.dtype)
        if len(shape) == 4 and self.layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":  # rows of an odd length from an odd offset
            x = x[..., 1 : 1 + shape[-1]]
        return x.detach().requires_grad_()

    def pool_inputs(self) -> list[Tensor]:
        channels = self.shape[3]
        weights = [self.normal(channels, 3, 3, seed=s) for s in range(len(self.axes))]
        return [self.normal(*self.shape), *weights]

    def level_gradients(self) -> list[Tensor]:
        return [self.normal(*shape, seed=1).detach() for shape in self.shapes()[1:]]

    def expand_inputs(self) -> list[Tensor]:
        """z, then the levels, the pair weights and the lateral weights."""
        channels, count = self.shape[3], range(len(self.axes))
        *finer, coarsest = self.shapes()
        return [
            self.normal(*coarsest),
            *(self.normal(*shape, seed=2) for shape in finer),
            *(self.normal(2, channels, seed=3 + s) for s in count),
            *(self.normal(channels, 3, 3, seed=4 + s) for s in count),
        ]

    def pool(self, inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        return ripple_pool_stages(inputs[0], inputs[1:], axes=self.axes, backend=backend)

    def expand(self, inputs: list[Tensor], backend: str) -> Tensor:
        count = len(self.axes)
        z, *rest = inputs
        lists = [rest[i * count : (i + 1) * count] for i in range(3)]
        return ripple_expand_stages(z, *lists, axes=self.axes, backend=backend)


CASES = (
    Pyramid((2, 5, 6, 20), (0, 1, 0)),
    Pyramid((3, 8, 8, 72), (0, 1), torch.bfloat16),
    Pyramid((1, 1, 7, 9), (1, 1, 1), torch.float16),
    Pyramid((2, 4, 3, 16), (1, 0, 1, 0), layout="transposed"),
    Pyramid((1, 6, 5, 17), (0, 0), torch.float16, layout="sliced"),
    Pyramid((1, 8, 8, 8), (0, 1, 0, 1, 0)),  # more stages than the fused kernels take
    Pyramid((2, 3, 4, 8), (1,), torch.bfloat16),
    Pyramid((1, 1, 1, 8), (0, 1)),
)


def assert_accurate(
    name: str, actual: Tensor, exact: Tensor, *, gradient: bool, roundings: int = 1
) -> None:
    """The accuracy rule; the errors of several ``roundings`` on the way add up as squares."""
    comparison = compare(actual.detach(), exact.detach(), gradient=gradient)
    slack = math.sqrt(roundings)
    assert comparison.rms_error <= slack * comparison.rms_tolerance, f"{name}: {comparison}"
    assert comparison.max_error <= slack * comparison.max_tolerance, f"{name}: {comparison}"


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pool(case: Pyramid, backend: str) -> None:
    """Each level from the level before as it was rounded, forward and backward."""
    inputs = case.pool_inputs()
    levels = case.pool(inputs, backend)
    gradients = torch.autograd.grad(levels, inputs, case.level_gradients())

    finer = [x.detach().double().requires_grad_() for x in (inputs[0], *levels[:-1])]
    weights = [w.detach().double().requires_grad_() for w in inputs[1:]]
    total = case.level_gradients()[-1].double()
    expected = []
    for s in reversed(range(len(case.axes))):
        exact = exact_pool(finer[s], weights[s], case.axes[s])
        assert levels[s].dtype == case.dtype
        assert_accurate(f"level {s + 1}", levels[s], exact, gradient=False)
        dx, dweight = torch.autograd.grad(exact, (finer[s], weights[s]), total)
        expected.append(dweight)
        total = dx + case.level_gradients()[s - 1].double() if s > 0 else dx
    for i, (a, b) in enumerate(zip(gradients, [total, *reversed(expected)], strict=True)):
        assert a.dtype == case.dtype
        assert_accurate("dx" if i == 0 else f"dweight {i - 1}", a, b, gradient=True)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_expand(case: Pyramid, backend: str) -> None:
    inputs, dout = case.expand_inputs(), case.normal(*case.shape, seed=5).detach()
    out = case.expand(inputs, backend)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = case.expand(exact_inputs, "reference")
    assert out.dtype == case.dtype
    # Single stages round between them; a fused kernel does not.
    roundings = 1 if backend in FUSED else len(case.axes)
    assert_accurate("out", out, exact, gradient=False, roundings=roundings)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(exact, exact_inputs, dout.double())
    for i, (a, b) in enumerate(zip(gradients, expected, strict=True)):
        name = f"gradient {i} of z, levels, weights, laterals"
        assert_accurate(name, a, b, gradient=True, roundings=roundings)


@pytest.mark.parametrize("backend", backends(fused=True))
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_fused_equals_single_stages(case: Pyramid, backend: str) -> None:
    """Pooled levels bit for bit; expansion too where nothing is rounded in between."""
    inputs = case.pool_inputs()
    x = inputs[0]
    for weight, axis, level in zip(inputs[1:], case.axes, case.pool(inputs, backend), strict=True):
        x = kernels.ripple_pool(x, weight, axis=axis, backend=backend)
        assert torch.equal(x, level)
        assert x.stride() == level.stride()
    if case.dtype == torch.float32:
        composed = stages.compose(*_single_stages(backend)).ripple_expand_stages
        z, *rest = case.expand_inputs()
        count = len(case.axes)
        lists = [rest[i * count : (i + 1) * count] for i in range(3)]
        expected = composed(z, *lists, case.axes)
        torch.testing.assert_close(case.expand([z, *rest], backend), expected, rtol=0, atol=1e-5)


def _single_stages(backend: str):  # type: ignore[no-untyped-def]
    module = importlib.import_module(f"linear_vit.kernels.ripple.{backend}")
    return module.ripple_pool, module.ripple_expand


@pytest.mark.parametrize("backend", backends())
def test_a_gradient_of_one_level_alone(backend: str) -> None:
    case = CASES[0]
    inputs = case.pool_inputs()
    levels = case.pool(inputs, backend)
    found = torch.autograd.grad(levels[0], inputs[:2], torch.ones_like(levels[0]))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs[:2]]
    exact = exact_pool(*exact_inputs, case.axes[0])
    expected = torch.autograd.grad(exact, exact_inputs, torch.ones_like(exact))
    for a, b in zip(found, expected, strict=True):
        assert_accurate("gradient", a, b, gradient=True)


@pytest.mark.parametrize("backend", backends())
def test_no_stages(backend: str) -> None:
    x = torch.randn(1, 2, 3, 4, device=DEVICE)
    assert ripple_pool_stages(x, [], axes=[], backend=backend) == ()
    assert torch.equal(ripple_expand_stages(x, [], [], [], axes=[], backend=backend), x)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_memory_order_is_kept(backend: str, layout: str) -> None:
    case = Pyramid((2, 4, 6, 8), (0, 1), layout=layout)
    inputs, expand_inputs = case.pool_inputs(), case.expand_inputs()
    order = torch.empty_like(inputs[0]).stride()
    levels = case.pool(inputs, backend)
    (dx,) = torch.autograd.grad(levels, inputs[:1], case.level_gradients())
    out = case.expand(expand_inputs, backend)
    gradients = torch.autograd.grad(out, expand_inputs[:3], torch.ones_like(out))
    assert dx.stride() == out.stride() == order
    for x, gradient in zip(expand_inputs, gradients, strict=False):
        assert gradient.stride() == x.stride()
    if backend in ("torch", "compiled"):  # conv2d chooses the order of a coarser grid itself
        return
    nested = [sorted(range(3), key=lambda axis, x=x: -x.stride(axis)) for x in levels]
    assert nested[0] == nested[1] == sorted(range(3), key=lambda axis: -order[axis])


@pytest.mark.parametrize("backend", backends(fused=True))
def test_repeats_bit_for_bit(backend: str) -> None:
    case = CASES[1]
    inputs, dout = case.expand_inputs(), case.normal(*case.shape, seed=5).detach()
    runs = [torch.autograd.grad(case.expand(inputs, backend), inputs, dout) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", backends(fused=True))
def test_opcheck(backend: str) -> None:
    importlib.import_module(f"linear_vit.kernels.ripple.{backend}")
    case = Pyramid((2, 5, 6, 8), (0, 1))
    axes = list(case.axes)
    op = lambda name: getattr(torch.ops.linear_vit, f"{backend}_ripple_{name}").default  # noqa: E731
    # Derivatives are those of the function around the operators.
    x, *weights = (tensor.detach() for tensor in case.pool_inputs())
    torch.library.opcheck(op("pool_stages"), (x, weights, axes))
    levels = [x, *op("pool_stages")(x, weights, axes)]
    torch.library.opcheck(
        op("pool_stages_backward"), (case.level_gradients(), levels[:-1], weights, axes, 0b101)
    )
    z, *rest = (tensor.detach() for tensor in case.expand_inputs())
    lists = [rest[i * 2 : (i + 1) * 2] for i in range(3)]
    torch.library.opcheck(op("expand_stages"), (z, *lists, axes))
    dout = torch.ones_like(levels[0])
    torch.library.opcheck(op("expand_stages_backward"), (dout, z, *lists, axes, 0b1011011))


@pytest.mark.parametrize("backend", backends(fused=True))
def test_module_compiles_in_one_graph(backend: str) -> None:
    """RippleAttention on a backend's kernels, under torch.compile(fullgraph=True), both passes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = RippleAttention(32, heads=2, ripple_stages=3, backend=backend).to(DEVICE)
    x = torch.randn(2, 30, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = [x, *module.parameters()]
    out = compiled(x, (5, 6))
    expected = module(x, (5, 6))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), parameters)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends(fused=True))
def test_double_backward_says_it_is_not_there(backend: str) -> None:
    case = CASES[0]
    inputs = case.pool_inputs()
    levels = case.pool(inputs, backend)
    (dx,) = torch.autograd.grad(levels[-1].sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dx.sum(), inputs[1:])


def test_other_lists_and_integers() -> None:
    """``nn.ParameterList`` and NumPy's integers, alone and in arrays."""
    x, weights = torch.randn(2, 4, 8, 16), [torch.randn(16, 3, 3) for _ in range(2)]
    pairs = [torch.randn(2, 16) for _ in range(2)]
    levels = ripple_pool_stages(x, weights, axes=[0, 1])
    finer = [x, levels[0]]
    expanded = ripple_expand_stages(levels[1], finer, pairs, weights, axes=[0, 1])
    one, two = nn.ParameterList(weights), nn.ParameterList(pairs)
    for axes in (np.array([0, 1]), (np.int64(0), np.int32(1))):
        for found, expected in zip(ripple_pool_stages(x, one, axes=axes), levels, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(ripple_expand_stages(levels[1], finer, two, one, axes=axes), expanded)
    pooled = ripple_pool(x, weights[0], axis=np.int64(1))
    assert torch.equal(pooled, ripple_pool(x, weights[0], axis=1))
    back = ripple_expand(pooled, x, pairs[0], weights[0], axis=np.int64(1))
    assert torch.equal(back, ripple_expand(pooled, x, pairs[0], weights[0], axis=1))
    for wrong in (np.bool_(True), 1.0, "0", np.array(0)):
        with pytest.raises(TypeError, match="axis must be the int 0"):
            ripple_pool(x, weights[0], axis=wrong)


def test_where_the_fused_kernels_are_taken() -> None:
    def fits(*shape: int, stages_: int = 3, multiprocessors: int = 132) -> bool:
        x = torch.empty(shape, device="meta")
        return stages.fits(x, [0, 1, 0, 1, 0][:stages_], multiprocessors)

    assert fits(128, 8, 8, 384)
    assert fits(11, 32, 32, 384)
    assert not fits(10, 32, 32, 384)  # 60 blocks would leave more than half of the GPU idle
    assert not fits(128, 33, 32, 384)
    assert not fits(128, 8, 8, 384, stages_=1)
    assert not fits(128, 8, 8, 384, stages_=5)
    assert not fits(0, 8, 8, 384, multiprocessors=1)


X = torch.zeros(1, 4, 6, 8)
W, P = torch.zeros(8, 3, 3), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "axes", "error", "message"),
    [
        ((X, [W]), (0, 1), ValueError, "weights must be 2, one a stage of axes, got 1"),
        ((X, W), (0,) * 8, TypeError, "weights must be a sequence of tensors.*got Tensor"),
        ((X, [W]), 0, TypeError, r"axes must be a sequence of 0 \(rows\) and 1 \(columns\), got 0"),
        ((X, [W]), (2,), ValueError, "axis must be 0"),
        ((X, [W, W[:, :2]]), (0, 1), ValueError, r"weights\[1\] must have size 3 along axis 1"),
        ((X, [W, W.half()]), (0, 1), TypeError, r"weights\[1\] must have x's dtype"),
        ((X[0], [W]), (0,), ValueError, r"x must have 4 axes \(B, rows, cols, C\)"),
        (
            (X, [X, X], [P, P], [W, W]),
            (0, 1),
            ValueError,
            r"levels\[1\] must have size 2 along axis 1 \(levels\[0\]'s after 1 halvings\)",
        ),
        ((X, [X], [P], [W]), (0,), ValueError, "z must have size 2 along axis 1"),
        ((X[:, :2], [X], [W], [W]), (0,), ValueError, r"weights\[0\] must have 2 axes \(2, C\)"),
        ((X[:, :2], [X], [P], [P]), (0,), ValueError, r"lateral_weights\[0\] must have 3 axes"),
    ],
)
def test_bad_arguments(
    arguments: tuple, axes: object, error: type[Exception], message: str
) -> None:
    function = ripple_pool_stages if len(arguments) == 2 else ripple_expand_stages
    with pytest.raises(error, match=message):
        function(*arguments, axes=axes)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("grid", [(1, 0, 3), (1, 3, 0), (2, 0, 0), (0, 2, 3)])
def test_empty_grid(backend: str, grid: tuple[int, int, int]) -> None:
    """A side of 0, or no image, gives empty grids, and gradients of 0."""
    x, up = torch.randn(*grid, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    weight = torch.randn(4, 3, 3, device=DEVICE)
    inputs = [t.requires_grad_() for t in (x, weight, up)]
    levels = ripple_pool_stages(x, [weight] * 2, axes=(0, 1), backend=backend)
    assert [tuple(x.shape) for x in levels] == stages.level_shapes(x.shape, (0, 1))[1:]
    out = ripple_expand_stages(
        levels[-1], [x, levels[0]], [up] * 2, [weight] * 2, axes=(0, 1), backend=backend
    )
    assert out.shape == x.shape
    gradients = torch.autograd.grad(out.sum() + levels[-1].sum(), inputs)
    assert all((gradient == 0).all() for gradient in gradients)
