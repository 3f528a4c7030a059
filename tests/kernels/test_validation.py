"""Bad input: one error for every backend, naming the argument, what it got and what is allowed."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels import BACKENDS


def qkv(**changes: Tensor) -> dict[str, Tensor]:
    good = {"q": (1, 4, 6, 32), "k": (1, 2, 5, 32), "v": (1, 2, 5, 32)}
    return {name: changes.get(name, torch.randn(shape)) for name, shape in good.items()}


def attend(op: str, backend: str, changes: dict[str, Any], **options: Any) -> None:
    getattr(kernels, op)(**qkv(**changes), backend=backend, **options)


BAD_ATTENTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"k": [1.0]}, TypeError, r"k must be a torch\.Tensor.*list"),
    "rank": ({"q": torch.randn(6, 32)}, ValueError, r"q must have 4 axes .*got 2: shape \(6, 32\)"),
    "heads": (
        {"q": torch.randn(1, 3, 6, 32)},
        ValueError,
        r"q's heads must be a positive multiple of k's 2 heads, got 3",
    ),
    "head dims": (
        {"q": torch.randn(1, 4, 6, 16)},
        ValueError,
        r"k must have size 16.*q's head dim",
    ),
    "value head dim": ({"v": torch.randn(1, 2, 5, 16)}, ValueError, r"v must have size 32.*axis 3"),
    "batch": (
        {"k": torch.randn(2, 2, 5, 32), "v": torch.randn(2, 2, 5, 32)},
        ValueError,
        "q's batch",
    ),
    "tokens": ({"v": torch.randn(1, 2, 4, 32)}, ValueError, r"v must have size 5.*k's tokens"),
    "no heads": (
        {"k": torch.randn(1, 0, 5, 32), "v": torch.randn(1, 0, 5, 32)},
        ValueError,
        "k must have at least one head",
    ),
    "empty head dim": ({"q": torch.randn(1, 4, 6, 0)}, ValueError, "q must have a last axis"),
    "mixed dtypes": (
        {"k": torch.randn(1, 2, 5, 32).half()},
        TypeError,
        r"k must have q's dtype torch\.float32, got torch\.float16",
    ),
    "mixed devices": (
        {"v": torch.empty(1, 2, 5, 32, device="meta")},
        ValueError,
        "v must be on q's device cpu, got meta",
    ),
    "integers": (
        {"q": torch.ones(1, 4, 6, 32, dtype=torch.int64)},
        TypeError,
        r"q must be float32",
    ),
    "complex": (
        {"q": torch.ones(1, 4, 6, 32, dtype=torch.complex64)},
        TypeError,
        r"q must be float32.*complex64",
    ),
    "sparse": (
        {"q": torch.randn(1, 4, 6, 32).to_sparse()},
        TypeError,
        "q must be a strided tensor",
    ),
    "last axis": (
        {"q": torch.randn(1, 4, 32, 6).transpose(-1, -2)},
        ValueError,
        r"q must have a contiguous last axis .*call \.contiguous\(\)",
    ),
}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_bad_attention_input(op: str, name: str, backend: str) -> None:
    changes, error, message = BAD_ATTENTION[name]
    with pytest.raises(error, match=message):
        attend(op, backend, changes)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (-1e-6, ValueError, "eps must be at least 0.0, got -1e-06"),
        (float("nan"), ValueError, "eps must be finite, got nan"),
        (float("inf"), ValueError, "eps must be finite, got inf"),
        (10**400, ValueError, "eps must be finite, got 1000"),
        ("1e-6", TypeError, "eps must be a real number, got str"),
        (True, TypeError, "eps must be a real number, got bool"),
    ],
)
def test_bad_eps(eps: Any, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=message):
        attend("linear_attention", backend, {}, eps=eps)


def test_bad_scale() -> None:
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        attend("softmax_attention", "torch", {}, scale=float("inf"))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("op", ["linear_attention_packed", "softmax_attention_packed"])
@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        (torch.randn(1, 6, 3, 32), ValueError, r"qkv must have 5 axes \(B, N, 3, H, D\), got 4"),
        (torch.randn(1, 3, 6, 2, 32), ValueError, r"qkv must have size 3 along axis 2"),
        (torch.randn(1, 6, 3, 0, 32), ValueError, "qkv must have at least one head"),
        (torch.ones(1, 6, 3, 2, 32, dtype=torch.int8), TypeError, "qkv must be float32"),
        (torch.randn(1, 6, 3, 32, 2).transpose(3, 4), ValueError, r"contiguous last axis"),
    ],
    ids=["rank", "not three", "no heads", "integers", "last axis"],
)
def test_bad_packed_input(
    op: str, qkv: Tensor, error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(kernels, op)(qkv, backend=backend)


BAD_RIPPLE: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: kernels.ripple_pool(torch.randn(4, 4, 8), torch.randn(8, 3, 3), axis=0),
     ValueError, r"x must have 4 axes \(B, rows, cols, C\), got 3"),
    (lambda: kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(7, 3, 3), axis=0),
     ValueError, r"weight must have size 8 along axis 0 \(x's channels\)"),
    (lambda: kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(8, 5, 5), axis=0),
     ValueError, r"weight must have size 3 along axis 1"),
    (lambda: kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3), axis=2),
     ValueError, r"axis must be 0 \(rows\) or 1 \(columns\), got 2"),
    (lambda: kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3), axis=True),
     TypeError, r"axis must be the int 0 \(rows\) or 1 \(columns\)"),
    (lambda: kernels.ripple_pool(torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3).half(), axis=0),
     TypeError, "weight must have x's dtype"),
    (lambda: kernels.ripple_expand(torch.randn(1, 2, 4, 8), torch.randn(1, 5, 4, 8),
                                   torch.randn(2, 8), torch.randn(8, 3, 3), axis=0),
     ValueError, r"z must have size 3 along axis 1 \(half of x's rows, rounded up\)"),
    (lambda: kernels.ripple_expand(torch.randn(1, 2, 4, 8), torch.randn(1, 4, 4, 8),
                                   torch.randn(8, 2), torch.randn(8, 3, 3), axis=0),
     ValueError, r"weight must have size 2 along axis 0 \(even and odd tokens\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_RIPPLE)
def test_bad_ripple_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numbers_and_sequences_of_other_kinds() -> None:
    """What counts as an integer, a real number or a sequence elsewhere does here."""
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(8, 3, 3)
    filters = torch.nn.ParameterList([weight, weight])
    axes: Any = np.array([0, 1])
    levels = kernels.ripple_pool_stages(x, filters, axes=axes, backend="torch")
    expected = kernels.ripple_pool(x, weight, axis=np.int64(0), backend="torch")
    assert torch.equal(levels[0], expected)
    back = kernels.ripple_expand_stages(
        levels[1],
        [x, levels[0]],
        torch.nn.ParameterList([torch.ones(2, 8)] * 2),
        filters,
        axes=axes,
        backend="torch",
    )
    assert back.shape == x.shape
    q = torch.randn(1, 2, 3, 16)
    for number in (np.float32(0.5), np.int64(1), Fraction(1, 2)):
        eps: Any = number
        out = kernels.linear_attention(q, q, q, eps=eps)
        assert torch.equal(out, kernels.linear_attention(q, q, q, eps=float(number)))
    with pytest.raises(TypeError, match="weights must be a sequence of tensors"):
        kernels.ripple_pool_stages(x, {0: weight}, axes=(0,))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_jit_trace(op: str, backend: str | None) -> None:
    """TensorBoard draws a model's graph with it."""
    q = torch.randn(1, 2, 3, 16)
    attend = getattr(kernels, op)
    traced = torch.jit.trace(lambda q: attend(q, q, q, backend=backend), (q,))
    torch.testing.assert_close(traced(q), attend(q, q, q, backend=backend))


def test_bad_state() -> None:
    q = torch.randn(1, 4, 6, 32)
    S, z = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64)
    apply = kernels.linear_attention_apply
    with pytest.raises(
        ValueError, match=r"S must have size 64 along axis 2 \(twice q's head dim\)"
    ):
        apply(q, S[:, :, :32], z)
    with pytest.raises(ValueError, match=r"z must have size 2 along axis 1 \(S's heads\)"):
        apply(q, S, z[:, :1])
    with pytest.raises(TypeError, match=r"S must be torch\.float32 for torch\.float16 queries"):
        apply(q.half(), S.half(), z)
    with pytest.raises(ValueError, match="q's heads must be a positive multiple of S's 2 heads"):
        apply(q[:, :3], S, z)


def test_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn' for linear_attention") as error:
        attend("linear_attention", "cudnn", {})
    for name in BACKENDS:
        assert f"{name} (" in str(error.value)
    with pytest.raises(TypeError, match="backend must be a name or None, got int"):
        attend("linear_attention", 3, {})  # type: ignore[arg-type]


def test_unknown_operation_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="unknown operation 'attention': there are linear_attention"
    ):
        kernels.backends("attention", "cpu")


def test_float64_is_the_references() -> None:
    q = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    assert kernels.linear_attention(q, q, q).dtype == torch.float64
    for backend in BACKENDS[1:]:
        with pytest.raises(ValueError, match="float64 is for the reference only"):
            kernels.linear_attention(q, q, q, backend=backend)
