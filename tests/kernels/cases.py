"""Inputs for the kernel tests, and the comparison of a backend with the float64 reference."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels.accuracy import Comparison, compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION = ("linear_attention", "softmax_attention")
PACKED = ("linear_attention_packed", "softmax_attention_packed")


def usable_backends(op: str) -> list[str]:
    """The backends under test: all usable ones, or the one a parent process asks about.

    Triton's interpreter has to be chosen before Python starts, so tests/kernels/test_triton.py
    runs these tests again in a process of its own and names the backend.
    """
    only = os.environ.get("KERNEL_TESTS_BACKEND")
    usable = [name for name, reason in kernels.backends(op, DEVICE).items() if reason is None]
    return [name for name in usable if only in (None, name)]


def op_backend_pairs(*ops: str, compiled: bool = True) -> list[Any]:
    """(op, backend) parameters. ``compiled`` is slow: it compiles for seconds, and again for every
    head dim, dtype and kind of layout; tests that draw many shapes leave it out."""
    return [
        pytest.param(op, backend, id=f"{op}-{backend}", marks=_marks(backend))
        for op in ops
        for backend in usable_backends(op)
        if compiled or not kernels.backend_rows()[backend].compiles
    ]


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if kernels.backend_rows()[backend].compiles else []


@dataclass(frozen=True)
class Attention:
    """One call of an attention operation: sizes, dtype, memory layout and the inputs' scale.

    A packed operation has as many keys as queries, and as many key/value heads.
    """

    op: str = "linear_attention"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 70
    keys: int = 70
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float = 1.0  # of q and k
    mean: float = 0.0  # of v
    seed: int = 0
    eps: float = 1e-6

    def inputs(self) -> list[Tensor]:
        """q, k, v, or qkv, in the layout asked for, requiring gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        b, h, hk, d = self.batch, self.heads, self.kv_heads, self.head_dim
        n, m = self.queries, self.keys
        if self.op in PACKED:
            return [self._packed(normal).requires_grad_()]
        if self.layout == "packed":  # views into one qkv projection
            assert (h, n) == (hk, m), "a packed projection has as many keys as queries"
            packed = normal(b, n, 3, h, d).to(DEVICE, self.dtype)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "tokens_first":  # (B, N, H, D) projections
            q = normal(b, n, h, d).to(DEVICE, self.dtype).transpose(1, 2)
            k = normal(b, m, hk, d).to(DEVICE, self.dtype).transpose(1, 2)
            v = normal(b, m, hk, d).to(DEVICE, self.dtype).transpose(1, 2)
        elif self.layout == "expanded":  # one head of keys and values behind every head
            q = normal(b, h, n, d).to(DEVICE, self.dtype)
            k = normal(b, 1, m, d).to(DEVICE, self.dtype).expand(b, hk, m, d)
            v = normal(b, 1, m, d).to(DEVICE, self.dtype).expand(b, hk, m, d)
        elif self.layout == "odd":  # rows of an odd length from an odd offset: no 16-byte access
            q, k, v = (
                normal(b, heads, tokens, d + 3).to(DEVICE, self.dtype)[..., 1 : d + 1]
                for heads, tokens in ((h, n), (hk, m), (hk, m))
            )
        else:
            q = normal(b, h, n, d).to(DEVICE, self.dtype)
            k = normal(b, hk, m, d).to(DEVICE, self.dtype)
            v = normal(b, hk, m, d).to(DEVICE, self.dtype)
        if self.layout != "expanded":  # in place, to keep the layout
            q.mul_(self.scale)
            k.mul_(self.scale)
            v.add_(self.mean)
        return [x.detach().requires_grad_() for x in (q, k, v)]

    def _packed(self, normal: Callable[..., Tensor]) -> Tensor:
        """qkv (B, N, 3, H, D)."""
        b, n, h, d = self.batch, self.queries, self.heads, self.head_dim
        assert (h, n) == (self.kv_heads, self.keys)
        if self.layout == "odd":  # rows of an odd length from an odd offset
            qkv = normal(b, n, 3, h, d + 3)[..., 1 : d + 1]
        elif self.layout == "heads_first":  # memory is (B, H, N, 3, D)
            qkv = normal(b, h, n, 3, d).permute(0, 2, 3, 1, 4)
        else:
            qkv = normal(b, n, 3, h, d)
        qkv = qkv.to(DEVICE, self.dtype)
        qkv[:, :, :2] *= self.scale
        qkv[:, :, 2] += self.mean
        return qkv.detach()

    def gradient(self) -> Tensor:
        shape = (self.batch, self.heads, self.queries, self.head_dim)
        if self.op in PACKED:
            shape = (self.batch, self.queries, self.heads, self.head_dim)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

    def run(self, backend: str, inputs: list[Tensor]) -> Tensor:
        options = {"eps": self.eps} if self.op.startswith("linear_attention") else {}
        return getattr(kernels, self.op)(*inputs, backend=backend, **options)


@dataclass(frozen=True)
class Ripple:
    """One call of a ripple operation."""

    op: str = "ripple_pool"
    batch: int = 2
    rows: int = 5
    cols: int = 6
    channels: int = 20
    axis: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

        c = self.channels
        if self.layout == "transposed":  # memory holds columns outside rows
            x = normal(self.batch, self.cols, self.rows, c).transpose(1, 2)
        elif self.layout == "sliced":
            x = normal(self.batch, self.rows, self.cols, c + 3)[..., 1 : c + 1]
        else:
            x = normal(self.batch, self.rows, self.cols, c)
        if self.op == "ripple_pool":
            tensors = [x, normal(c, 3, 3)]
        else:
            tensors = [normal(*self.pooled()), x, normal(2, c), normal(c, 3, 3)]
        return [t.detach().requires_grad_() for t in tensors]

    def pooled(self) -> tuple[int, int, int, int]:
        rows, cols = self.rows, self.cols
        if self.axis == 0:
            rows = (rows + 1) // 2
        else:
            cols = (cols + 1) // 2
        return self.batch, rows, cols, self.channels

    def gradient(self) -> Tensor:
        fine = (self.batch, self.rows, self.cols, self.channels)
        shape = self.pooled() if self.op == "ripple_pool" else fine
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

    def run(self, backend: str, inputs: list[Tensor]) -> Tensor:
        return getattr(kernels, self.op)(*inputs, axis=self.axis, backend=backend)


Case = Attention | Ripple


def results(case: Case, backend: str, inputs: list[Tensor] | None = None) -> list[Tensor]:
    """Output and the gradient of every input."""
    inputs = case.inputs() if inputs is None else inputs
    out = case.run(backend, inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, case.gradient())]


def reference_results(case: Case) -> list[Tensor]:
    """The same in float64, from the inputs as they were rounded."""
    inputs = [x.detach().double().requires_grad_() for x in case.inputs()]
    out = case.run("reference", inputs)
    gradients = torch.autograd.grad(out, inputs, case.gradient().double())
    return [out.detach(), *gradients]


def comparisons(case: Case, backend: str) -> Iterator[tuple[str, Comparison]]:
    """Each result beside the reference, by the accuracy rule."""
    names = ["out"] + [f"gradient {i}" for i in range(len(case.inputs()))]
    pairs = zip(names, results(case, backend), reference_results(case), strict=True)
    for name, actual, expected in pairs:
        assert actual.dtype == case.dtype, f"{name} is {actual.dtype}, not {case.dtype}"
        yield name, compare(actual, expected, gradient=name != "out")


def assert_accurate(case: Case, backend: str) -> None:
    """SPEC's accuracy rule for the output and every gradient."""
    for name, comparison in comparisons(case, backend):
        assert comparison.passed, f"{backend}: {name} of {case}: {comparison}"


def on_every(cases: list[Case], *, compiled: int) -> list[Any]:
    """(case, backend) parameters; ``compiled`` takes only the first few cases of each operation,
    and all but the very first are slow."""
    parameters = []
    for op in dict.fromkeys(case.op for case in cases):
        for index, case in enumerate(case for case in cases if case.op == op):
            for backend in usable_backends(op):
                if backend == "compiled" and index >= compiled:
                    continue
                marks = _marks(backend) if index or op != cases[0].op else []
                name = f"{backend}-{_label(case)}"
                parameters.append(pytest.param(case, backend, id=name, marks=marks))
    return parameters


def _label(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    if isinstance(case, Ripple):
        sizes = f"axis{case.axis}-{case.rows}x{case.cols}x{case.channels}"
    else:
        heads = f"B{case.batch}-H{case.heads}over{case.kv_heads}"
        sizes = f"{heads}-N{case.queries}-M{case.keys}-D{case.head_dim}"
    return f"{case.op}-{sizes}-{dtype}-{case.layout}"
