"""``key_mask``: keys where it is False are not there, whatever they hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from linear_vit import kernels
from linear_vit.kernels import registry
from linear_vit.kernels.accuracy import compare
from tests.kernels.cases import DEVICE, DTYPES, PACKED, Attention, op_backend_pairs

MASKED = (
    "linear_attention",
    "softmax_attention",
    "linear_attention_packed",
    "softmax_attention_packed",
)


def masks(keys: int) -> Tensor:
    """(6, keys): all there, none, every other one, padding behind, padding before, the last two."""
    there = torch.ones(6, keys, dtype=torch.bool)
    there[1] = False
    there[2, ::2] = False
    there[3, max(2, keys // 3) :] = False
    there[4, : keys // 2] = False
    there[5, :-2] = False
    return there.to(DEVICE)


def case_of(op: str, **changes: Any) -> Attention:
    sizes = {"heads": 2, "kv_heads": 2, "queries": 45, "keys": 45, "head_dim": 32}
    if op not in PACKED:
        sizes |= {"kv_heads": 1, "queries": 20}
    return replace(Attention(op, batch=6, **sizes), **changes)


def run(case: Attention, backend: str, inputs: list[Tensor], there: Tensor) -> Tensor:
    return getattr(kernels, case.op)(*inputs, key_mask=there, backend=backend)


def spoiled(case: Attention, there: Tensor) -> list[Tensor]:
    """The inputs, with NaN in every masked key and value, in memory as they were."""
    inputs = [x.detach() for x in case.inputs()]
    if case.op in PACKED:
        inputs[0][:, :, 1:][~there] = torch.nan
    else:
        for x in inputs[1:]:
            x.transpose(1, 2)[~there] = torch.nan
    return [x.requires_grad_() for x in inputs]


def without(case: Attention, inputs: list[Tensor], there: Tensor) -> list[Tensor]:
    """Out and gradients in float64, of each sequence by itself and of the keys that it has."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    attend = getattr(kernels, case.op.removesuffix("_packed"))
    rows = []
    for b, mask in enumerate(there):
        if case.op in PACKED:
            q, k, v = exact[0][b : b + 1].permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (x[b : b + 1] for x in exact)
        rows.append(attend(q, k[:, :, mask], v[:, :, mask], backend="reference"))
    out = torch.cat(rows)
    if case.op in PACKED:
        out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, exact, case.gradient().double())]


def of_masked(case: Attention, gradients: list[Tensor], there: Tensor) -> list[Tensor]:
    if case.op in PACKED:
        return [gradients[0][:, :, 1:][~there]]
    return [x.transpose(1, 2)[~there] for x in gradients[1:]]


def check(case: Attention, backend: str, there: Tensor) -> None:
    inputs = spoiled(case, there)
    out = run(case, backend, inputs, there)
    gradients = list(torch.autograd.grad(out, inputs, case.gradient()))
    for i, (a, b) in enumerate(
        zip([out.detach(), *gradients], without(case, inputs, there), strict=True)
    ):
        comparison = compare(a, b, gradient=i > 0)
        assert comparison.passed, f"{'out' if i == 0 else f'gradient {i - 1}'}: {comparison}"
    for gradient in of_masked(case, gradients, there):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    if case.batch > 1:  # the second has no key
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert all(g.isfinite().all() for g in gradients)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_are_not_there(op: str, backend: str, dtype: torch.dtype) -> None:
    check(case_of(op, dtype=dtype), backend, masks(45))


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED[:2], compiled=False))
@pytest.mark.parametrize("layout", ["tokens_first", "odd"])
def test_in_every_memory_order(op: str, backend: str, layout: str) -> None:
    """The mask is one of every other column of a larger one."""
    there = torch.stack([masks(45), masks(45)], dim=2).flatten(1)[:, ::2]
    assert not there.is_contiguous()
    check(case_of(op, layout=layout, dtype=torch.float16, heads=4, kv_heads=2), backend, there)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED[:2], compiled=False))
@pytest.mark.parametrize("keys", [5, 64, 200])
def test_tiles_and_tails(op: str, backend: str, keys: int) -> None:
    """Less than a tile, whole ones, and several of which some are masked throughout."""
    case = case_of(op, keys=keys, queries=9, head_dim=16)
    check(case, backend, masks(keys))


@pytest.mark.parametrize(("_", "backend"), op_backend_pairs("linear_attention_state"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state(_: str, backend: str, dtype: torch.dtype) -> None:
    case, there = case_of("linear_attention", dtype=dtype), masks(45)
    _q, k, v = spoiled(case, there)
    S, z = kernels.linear_attention_state(k, v, key_mask=there, backend=backend)
    exact = [
        kernels.linear_attention_state(
            *(x[b : b + 1, :, mask].detach().double() for x in (k, v)), backend="reference"
        )
        for b, mask in enumerate(there)
    ]
    for found, expected in zip((S, z), map(torch.cat, zip(*exact, strict=True)), strict=True):
        assert compare(found.detach().to(dtype), expected, gradient=False).passed
    gradients = torch.autograd.grad([S, z], [k, v], [torch.ones_like(S), torch.ones_like(z)])
    for gradient in of_masked(case, [k, *gradients], there):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert gradients[1][0].abs().min() > 0


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED, compiled=False))
@pytest.mark.parametrize("empty", ["batch", "keys", "queries"])
def test_nothing_to_mask(op: str, backend: str, empty: str) -> None:
    changes = {"queries": 0, "keys": 0} if op in PACKED and empty != "batch" else {empty: 0}
    case = case_of(op, **changes)
    there = torch.zeros(case.batch, case.keys, dtype=torch.bool, device=DEVICE)
    inputs = case.inputs()
    out = run(case, backend, inputs, there)
    assert torch.equal(out, torch.zeros_like(case.gradient()))
    gradients = torch.autograd.grad(out, inputs, case.gradient())
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs, strict=True))


# ---- through PyTorch's own machinery -------------------------------------------------------------


def small(op: str) -> tuple[Attention, list[Tensor], Tensor]:
    case = case_of(op, queries=7, keys=7, kv_heads=2, head_dim=16)
    there = masks(7)
    return case, spoiled(case, there), there


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED, compiled=False))
@pytest.mark.parametrize(
    "dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"]
)
def test_full_graph(op: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    case, inputs, there = small(op)

    def call(mask: Tensor, *x: Tensor) -> Tensor:
        return run(case, backend, list(x), mask)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found, expected = compiled(there, *inputs), call(there, *inputs)
    torch.testing.assert_close(found, expected)
    pairs = zip(
        torch.autograd.grad(found, inputs, case.gradient()),
        torch.autograd.grad(expected, inputs, case.gradient()),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("op", MASKED)
def test_compiled_once_for_all_sizes(op: str) -> None:
    """The mask's sizes are symbolic, as the others' are, whatever was compiled without one."""
    if kernels.backends(op, DEVICE)["compiled"] is not None:
        pytest.skip("torch.compile is not usable here")
    from linear_vit.kernels import compilation

    compilation.forget()
    for size in (9, 12, 17):
        case = case_of(op, queries=size, keys=size, head_dim=16)
        case.run("compiled", case.inputs())
        with torch.compiler.set_stance("default" if size == 9 else "fail_on_recompile"):
            check(case, "compiled", masks(size))


class _Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *x: Tensor) -> Tensor:
        return self.call(*x)


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED, compiled=False))
@pytest.mark.parametrize("through", ["export", "func.grad", "vmap", "autocast", "fake"])
def test_through_transforms(op: str, backend: str, through: str) -> None:
    case, inputs, there = small(op)
    *plain, last = (x.detach() for x in inputs)

    def call(x: Tensor, mask: Tensor) -> Tensor:
        return run(case, backend, [*plain, x], mask)

    expected = call(last, there)
    if through == "export":
        program = torch.export.export(_Module(call), (last, there))
        torch.testing.assert_close(program.module()(last, there), expected)
    elif through == "func.grad":
        loss = lambda x: (call(x, there) * case.gradient()).sum()  # noqa: E731
        leaf = last.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), [leaf])
        found = torch.func.grad(loss)(last)
        torch.testing.assert_close(found, gradient)
        assert found.isfinite().all()
    elif through == "vmap":
        both = torch.func.vmap(call)(torch.stack([2 * last, last]), torch.stack([~there, there]))
        torch.testing.assert_close(both[1], expected)
        alone = torch.func.vmap(call, in_dims=(0, None))(torch.stack([last, last]), there)
        torch.testing.assert_close(alone[0], expected)
    elif through == "autocast":
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = call(last, there)
        plain = [x.bfloat16() for x in plain]
        assert torch.equal(out, call(last.bfloat16(), there))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run(case, backend, [mode.from_tensor(x) for x in (*plain, last)], there)
        assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)
        assert fake.stride() == expected.stride()


@pytest.mark.parametrize(("op", "backend"), op_backend_pairs(*MASKED, compiled=False))
def test_masked_keys_count_as_work(op: str, backend: str) -> None:
    """What is counted is read off the shapes; the mask itself is no work."""
    case, inputs, there = small(op)
    counted = []
    for mask in (there, None):
        with FlopCounterMode(display=False) as counter:
            out = getattr(kernels, op)(*inputs, key_mask=mask, backend=backend)
            torch.autograd.grad(out, inputs, case.gradient())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


# ---- arguments, and backends of others -----------------------------------------------------------

Q = torch.randn(2, 1, 4, 16)


@pytest.mark.parametrize(
    ("key_mask", "error", "message"),
    [
        ([[True] * 4] * 2, TypeError, r"key_mask must be a torch\.Tensor of shape \(B, M\).*list"),
        (torch.ones(2, 4), TypeError, "key_mask must be bool, True where a key is there, got.*32"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"\(B, M\) = \(2, 4\), got \(4,\)"),
        (torch.ones(2, 5, dtype=torch.bool), ValueError, r"\(B, M\) = \(2, 4\), got \(2, 5\)"),
        (
            torch.ones(2, 4, dtype=torch.bool, device="meta"),
            ValueError,
            "key_mask must be on the keys' device cpu, got meta",
        ),
    ],
)
def test_bad_masks(key_mask: Any, error: type[Exception], message: str) -> None:
    qkv = Q.transpose(1, 2).unsqueeze(2).expand(2, 4, 3, 1, 16)
    for op, inputs in (
        ("linear_attention", (Q, Q, Q)),
        ("softmax_attention", (Q, Q, Q)),
        ("linear_attention_state", (Q, Q)),
        ("linear_attention_packed", (qkv,)),
        ("softmax_attention_packed", (qkv,)),
    ):
        with pytest.raises(error, match=message):
            getattr(kernels, op)(*inputs, key_mask=key_mask)


def test_a_function_without_a_mask_is_not_given_one() -> None:
    there, given = torch.ones(2, 4, dtype=torch.bool), []
    with registry.temporarily():

        @kernels.register("linear_attention", "plain", devices=("cpu",))
        def plain(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
            return q

        @kernels.register("linear_attention", "masking", devices=("cpu",))
        def masking(
            q: Tensor, k: Tensor, v: Tensor, eps: float, *, key_mask: Tensor | None = None
        ) -> Tensor:
            given.append(key_mask)
            return q

        assert torch.equal(kernels.linear_attention(Q, Q, Q, backend="plain"), Q)
        reason = "plain takes no key_mask: its function has no parameter of that name"
        assert kernels.backends("linear_attention", "cpu")["plain"] is None
        assert kernels.backends("linear_attention", "cpu", key_mask=True)["plain"] == reason
        with pytest.raises(ValueError, match=f"'plain' can't run linear_attention .*{reason}"):
            kernels.linear_attention(Q, Q, Q, key_mask=there, backend="plain")
        kernels.linear_attention(Q, Q, Q, backend="masking")
        kernels.linear_attention(Q, Q, Q, key_mask=there, backend="masking")
        assert given[0] is None
        assert given[1] is there
