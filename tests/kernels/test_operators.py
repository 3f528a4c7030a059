"""What PyTorch asks of an operator: opcheck, torch.compile, autocast, FakeTensor, second order."""

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from linear_vit import kernels
from tests.kernels.cases import ATTENTION, DEVICE, Attention, Case, Ripple, op_backend_pairs

CASES: dict[str, Case] = {
    "linear_attention": Attention(heads=4, kv_heads=2, queries=20, keys=24, head_dim=16),
    "softmax_attention": Attention(
        "softmax_attention", heads=4, kv_heads=2, queries=20, keys=24, head_dim=16
    ),
    "linear_attention_packed": Attention("linear_attention_packed", head_dim=16),
    "softmax_attention_packed": Attention("softmax_attention_packed", head_dim=16),
    "ripple_pool": Ripple("ripple_pool", channels=8),
    "ripple_expand": Ripple("ripple_expand", channels=8),
}
RIPPLE = ("ripple_pool", "ripple_expand")
KERNEL_BACKENDS = tuple(name for name, row in kernels.backend_rows().items() if row.own)


def _operators(op: str, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The backend's operators behind an operation, with arguments to call them with."""
    importlib.import_module(f"{kernels.operations()[op].package}.{backend}")
    case = CASES[op]
    # Detached: the operators have no gradients of their own, the functions around them do.
    plain, gradient = [x.detach() for x in case.inputs()], case.gradient()
    named = lambda name: getattr(torch.ops.linear_vit, f"{backend}_{name}").default  # noqa: E731
    if op == "linear_attention":
        S, z = named("linear_attention_state")(*plain[1:])
        dS, dz = torch.randn_like(S), torch.randn_like(z)
        out, *state = named(op)(*plain, 1e-6, True)
        _, *no_state = named(op)(*plain, 1e-6, False)
        return [
            (named(op), (*plain, 1e-6, True)),
            (named(op), (*plain, 1e-6, False)),
            (named(f"{op}_backward"), (gradient, *plain, *state, 1e-6, 0b111)),
            (named(f"{op}_backward"), (gradient, *plain, *no_state, 1e-6, 0b101)),
            (named("linear_attention_state"), (*plain[1:],)),
            (named("linear_attention_state_backward"), (dS, dz, *plain[1:], 0b11)),
            (named("linear_attention_apply"), (plain[0], S, z, 1e-6)),
            (named("linear_attention_apply_backward"), (gradient, plain[0], S, z, 1e-6, 0b111)),
        ]
    if op == "linear_attention_packed":
        out, S, z = named(op)(*plain, 1e-6, True)
        return [
            (named(op), (*plain, 1e-6, True)),
            (named(op), (*plain, 1e-6, False)),
            (named(f"{op}_backward"), (gradient, *plain, S, z, 1e-6)),
        ]
    if op in ("softmax_attention", "softmax_attention_packed"):
        wanted = () if len(plain) == 1 else (0b101,)
        key_mask = torch.ones(case.batch, case.keys, dtype=torch.bool, device=DEVICE)
        key_mask[:, 1::2] = False
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        for mask in (None, key_mask):
            out, lse = named(op)(*plain, mask, 0.25)
            calls.append((named(op), (*plain, mask, 0.25)))
            saved = (*plain, mask, out, lse, 0.25)
            calls.append((named(f"{op}_backward"), (gradient, *saved, *wanted)))
        return calls
    assert isinstance(case, Ripple)
    return [
        (named(op), (*plain, case.axis)),
        (named(f"{op}_backward"), (gradient, *plain, case.axis, (1 << len(plain)) - 1)),
        (named(f"{op}_backward"), (gradient, *plain, case.axis, 0b10)),
    ]


@pytest.mark.parametrize(
    ("op", "backend"),
    [pair for pair in op_backend_pairs(*CASES) if pair.values[1] in KERNEL_BACKENDS],
)
def test_opcheck(op: str, backend: str) -> None:
    for operator, arguments in _operators(op, backend):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("op", "backend"),
    [pair for pair in op_backend_pairs(*CASES) if pair.values[1] in KERNEL_BACKENDS],
)
def test_operators_read_no_other_strides_than_they_are_given(op: str, backend: str) -> None:
    """Validation comes before them, but an exported program has the operators alone."""
    refused = 0
    for operator, arguments in _operators(op, backend):
        expected = operator(*arguments)
        for i, x in enumerate(arguments):
            if not isinstance(x, Tensor) or x.dim() < 4:
                continue
            turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
            assert turned.stride(-1) != 1
            given = (*arguments[:i], turned, *arguments[i + 1 :])
            try:
                torch.testing.assert_close(operator(*given), expected)
            except RuntimeError:
                refused += 1
                with pytest.raises(RuntimeError, match="the last axis must be contiguous"):
                    operator(*given)
    assert refused or backend == "triton"


@pytest.mark.parametrize(
    ("op", "backend"),
    [pair for pair in op_backend_pairs(*CASES) if pair.values[1] in KERNEL_BACKENDS],
)
def test_a_later_function_may_give_no_gradient(op: str, backend: str) -> None:
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    inputs = CASES[op].inputs()
    Ends.apply(CASES[op].run(backend, inputs)).sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*CASES, compiled=False))
def test_full_graph(op: str, backend: str) -> None:
    """torch.compile(fullgraph=True) takes the public function, forward and backward, and where no
    gradient is asked for."""
    torch._dynamo.reset()  # one lambda's code serves every case: their variants must not add up
    case = CASES[op]
    compiled = torch.compile(
        lambda *inputs: case.run(backend, list(inputs)), fullgraph=True, backend="aot_eager"
    )
    inputs = case.inputs()
    out = compiled(*inputs)
    expected = case.run(backend, inputs)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, inputs, case.gradient())
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, case.gradient()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(compiled(*(x.detach() for x in inputs)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*CASES, compiled=False))
@pytest.mark.parametrize("dynamic", [True, None])
def test_full_graph_of_what_varies(op: str, backend: str, dynamic: bool | None) -> None:
    """Batch, tokens, head dim or channels, eps and scale differ from call to call: one graph each,
    with sizes and numbers symbolic from the first call on (True) or from the second (None)."""
    torch._dynamo.reset()
    option = "scale" if op.startswith("softmax") else "eps"
    attend = getattr(kernels, op)

    def call(number: float, *inputs: Tensor) -> Tensor:
        if op in RIPPLE:
            return attend(*inputs, axis=0, backend=backend)
        return attend(*inputs, **{option: number}, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for number, size, channels in ((1e-3, 5, 16), (0.1, 7, 16), (0.5, 9, 32)):
        case: Any = CASES[op]
        if op in RIPPLE:
            case = replace(case, batch=size, rows=size, channels=channels)
        else:
            case = replace(case, batch=size, queries=size, keys=size, head_dim=channels)
        inputs = case.inputs()
        out, expected = compiled(number, *inputs), call(number, *inputs)
        torch.testing.assert_close(out, expected)
        pairs = zip(
            torch.autograd.grad(out, inputs, case.gradient()),
            torch.autograd.grad(expected, inputs, case.gradient()),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*CASES, compiled=False))
def test_autocast_casts_inputs_first(op: str, backend: str) -> None:
    case = CASES[op]
    inputs = case.inputs()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = case.run(backend, inputs)
    cast = [x.detach().to(torch.bfloat16) for x in inputs]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, case.run(backend, cast))
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*CASES, compiled=False))
def test_fake_tensors(op: str, backend: str) -> None:
    """Shapes, dtypes and strides without a computation."""
    case = CASES[op]
    inputs = case.inputs()
    real = case.run(backend, inputs)
    with FakeTensorMode() as mode:
        fake = case.run(backend, [mode.from_tensor(x) for x in inputs])
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("op", "backend"),
    [pair for pair in op_backend_pairs(*CASES) if pair.values[1] in KERNEL_BACKENDS],
)
def test_double_backward_says_it_is_not_there(op: str, backend: str) -> None:
    case = CASES[op]
    inputs = case.inputs()
    out = case.run(backend, inputs)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward through the .* kernels"):
        torch.autograd.grad(gradients[0].sum(), inputs)


@pytest.mark.parametrize("op", [*ATTENTION, "ripple_pool", "ripple_expand"])
def test_reference_gradcheck(op: str) -> None:
    """First and second derivatives of the reference, by finite differences."""
    if op in ATTENTION:
        case: Case = Attention(op, heads=2, kv_heads=1, queries=3, keys=4, head_dim=4)
    else:
        case = Ripple(op, rows=3, cols=4, channels=2, batch=1)
    inputs = [x.detach().cpu().double().requires_grad_() for x in case.inputs()]

    def function(*tensors: Tensor) -> Tensor:
        return case.run("reference", list(tensors))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_expanded_incoming_gradient() -> None:
    """out.sum().backward() hands the kernels a gradient of stride 0."""
    for op, backend in (pair.values for pair in op_backend_pairs(*CASES, compiled=False)):
        case = CASES[op]
        inputs = case.inputs()
        summed = torch.autograd.grad(case.run(backend, inputs).sum(), inputs)
        out = case.run(backend, inputs)
        ones = torch.autograd.grad(out, inputs, torch.ones_like(out))
        for a, b in zip(summed, ones, strict=True):
            torch.testing.assert_close(a, b)


def test_state_gradient_flows_through_either_output() -> None:
    """A loss on S alone, or on z alone, has its gradient."""
    for _, backend in (
        pair.values for pair in op_backend_pairs("linear_attention_state", compiled=False)
    ):
        _, k, v = Attention(queries=8, keys=9).inputs()
        S, z = kernels.linear_attention_state(k, v, backend=backend)
        (dk,) = torch.autograd.grad(z.sum(), [k], retain_graph=True)
        torch.testing.assert_close(dk, torch.sign(k.detach()))
        dk, dv = torch.autograd.grad(S.sum(), [k, v])
        assert dk.abs().sum() > 0
        assert dv.abs().sum() > 0


@pytest.mark.parametrize(
    ("op", "backend"),
    [pair for pair in op_backend_pairs(*CASES) if pair.values[1] in KERNEL_BACKENDS],
)
def test_work_is_counted(op: str, backend: str) -> None:
    """FlopCounterMode sees the least work that SPEC has: forward, and twice that backward (two and
    five products of softmax attention)."""
    from torch.utils.flop_counter import FlopCounterMode

    case: Any = CASES[op]
    inputs = case.inputs()
    if op in RIPPLE:
        tokens = case.pooled() if op == "ripple_pool" else inputs[1].shape
        forward = math.prod(tokens) * (18 if op == "ripple_pool" else 20)
    else:
        rows = case.batch * case.heads * case.queries
        if op.startswith("softmax"):
            forward = 4 * rows * case.keys * case.head_dim
        else:
            keys = case.batch * case.kv_heads * case.keys
            forward = 4 * (rows + keys) * case.head_dim**2
    for grad, expected in ((False, 1.0), (True, 3.5 if op.startswith("softmax") else 3.0)):
        with FlopCounterMode(display=False) as counter:
            out = case.run(backend, inputs)
            if grad:
                torch.autograd.grad(out, inputs, case.gradient())
        assert counter.get_total_flops() == forward * expected
