"""What is set around a call changes neither its result nor its gradients."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels.accuracy import compare
from tests.kernels.cases import (
    ATTENTION,
    DEVICE,
    DTYPES,
    PACKED,
    Attention,
    Case,
    Ripple,
    assert_accurate,
    op_backend_pairs,
    reference_results,
)

RIPPLE = ("ripple_pool", "ripple_expand")
EVERY = op_backend_pairs(*ATTENTION, *PACKED, *RIPPLE, compiled=False)


def _case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    if op in RIPPLE:
        return Ripple(op, dtype=dtype)
    return Attention(op, dtype=dtype, queries=130, keys=130, head_dim=32)


def _gradients(
    case: Case, backend: str, around_forward: object = None, around_backward: object = None
) -> tuple[Tensor, ...]:
    inputs = case.inputs()
    with around_forward or contextlib.nullcontext():  # type: ignore[attr-defined]
        out = case.run(backend, inputs)
    with around_backward or contextlib.nullcontext():  # type: ignore[attr-defined]
        return torch.autograd.grad(out, inputs, case.gradient().to(out.dtype))


@pytest.mark.parametrize(("op", "backend"), EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_inside_autocast(op: str, backend: str, dtype: torch.dtype) -> None:
    """It gives the gradients of a backward pass outside, wherever the forward was."""
    case = _case(op, dtype)
    amp = torch.bfloat16 if dtype == torch.float32 else dtype

    def autocast() -> torch.autocast:
        return torch.autocast(DEVICE.type, dtype=amp)

    outside = _gradients(case, backend, autocast()), _gradients(case, backend)
    inside = (
        _gradients(case, backend, autocast(), autocast()),
        _gradients(case, backend, None, autocast()),
    )
    for expected, found in zip(outside, inside, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _medium() -> None:
    torch.set_float32_matmul_precision("medium")


def _high() -> None:
    torch.set_float32_matmul_precision("high")


def _bfloat16_everywhere() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def _settings() -> list[Any]:
    """Of the older functions too, which raise where the two kinds contradict one another."""
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    found: list[Any] = [kind.fp32_precision for kind in (*kinds, torch.backends.cudnn.conv)]
    for older in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(older())
        except RuntimeError:
            found.append("contradicted")
    return found


def _tf32_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "none"


@pytest.mark.parametrize(("op", "backend"), EVERY)
@pytest.mark.parametrize("relax", [_medium, _high, _bfloat16_everywhere, _tf32_for_all])
def test_float32_is_float32(
    op: str, backend: str, relax: Callable[[], None], restored: None
) -> None:
    relax()
    before = _settings()
    assert_accurate(_case(op), backend)
    assert _settings() == before


def test_what_is_inherited_stays_inherited(restored: None) -> None:
    """A kind of product that follows the process's setting follows it after a call, too."""
    kinds = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    for kind in kinds:
        kind.fp32_precision = "none"
    _tf32_for_all()
    before = [kind.fp32_precision for kind in kinds]
    assert "tf32" in before
    assert_accurate(_case("linear_attention"), "torch")
    assert [kind.fp32_precision for kind in kinds] == before
    torch.backends.fp32_precision = "ieee"
    assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]


@pytest.mark.slow
@pytest.mark.parametrize("op", ATTENTION)
def test_compiled_float32_is_float32(op: str, restored: None) -> None:
    """Its backward pass may run twice, too."""
    _medium()
    case = _case(op)
    inputs = case.inputs()
    out = case.run("compiled", inputs)
    for retain_graph in (True, False):
        found = torch.autograd.grad(out, inputs, case.gradient(), retain_graph=retain_graph)
        for a, b in zip(found, reference_results(case)[1:], strict=True):
            assert compare(a, b, gradient=True).passed


@pytest.mark.slow
def test_compiled_state_of_which_one_half_has_a_gradient(restored: None) -> None:
    """z does not depend on v."""
    _medium()
    k, v = torch.randn(2, 1, 2, 6, 16).unbind()
    found = []
    for backend in ("compiled", "reference"):
        given = v.clone().requires_grad_()
        kernels.linear_attention_state(k, given, backend=backend)[0].sum().backward()
        found.append(given.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float32_is_float32_where_the_setting_comes_later(backend: str, restored: None) -> None:
    case = _case("linear_attention")
    inputs = case.inputs()
    out = case.run(backend, inputs)
    _medium()
    gradients = torch.autograd.grad(out, inputs, case.gradient())
    for a, b in zip(gradients, reference_results(case)[1:], strict=True):
        assert compare(a, b, gradient=True).passed


def test_the_settings_survive_threads(restored: None) -> None:
    """Calls that overlap put back what was set before the first of them."""
    _medium()
    before = _settings()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert_accurate(Attention(queries=40, keys=40, head_dim=16), "torch")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert _settings() == before
