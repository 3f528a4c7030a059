"""Only what is asked for is computed: each subset of the gradients, bit for bit those of all."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from linear_vit import kernels
from tests.kernels.cases import DEVICE, DTYPES, Attention, Case, op_backend_pairs

OWN = [name for name, row in kernels.backend_rows().items() if row.own]
ATTENTION = ("linear_attention", "softmax_attention")
RIPPLE = ("ripple_pool", "ripple_expand")


def own(*ops: str) -> list[Any]:
    return [pair for pair in op_backend_pairs(*ops) if pair.values[1] in OWN]


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count + 1):
        yield from itertools.combinations(range(count), size)


def assert_each_subset_is_of_all(run: Any, inputs: list[Tensor], gradients: list[Tensor]) -> None:
    """``run(*inputs)`` gives what the gradients belong to; the inputs are leaves."""

    def found(needed: tuple[int, ...]) -> list[Tensor | None]:
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        outputs = run(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        torch.autograd.backward(outputs, gradients)
        return [x.grad for x in leaves]

    everything = tuple(range(len(inputs)))
    expected = found(everything)
    for needed in subsets(len(inputs)):
        for i, (a, b) in enumerate(zip(found(needed), expected, strict=True)):
            if i not in needed:
                assert a is None
                continue
            assert a is not None
            assert b is not None
            assert torch.equal(a, b), f"gradient {i} of {needed}"
            assert a.stride() == b.stride()


def sizes(op: str) -> list[dict[str, int]]:
    short = {"queries": 70, "keys": 45, "heads": 4, "kv_heads": 2, "head_dim": 32}
    long = {"queries": 600, "keys": 700, "heads": 2, "kv_heads": 1, "head_dim": 64}
    return [short, long] if op == "linear_attention" else [short]


@pytest.mark.parametrize(("op", "backend"), own(*ATTENTION))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(op: str, backend: str, dtype: torch.dtype) -> None:
    for size in sizes(op):
        if backend == "triton" and size["queries"] > 100:
            continue  # minutes, interpreted
        case = Attention(op, dtype=dtype, mean=1.0, **size)
        assert_each_subset_is_of_all(
            lambda *x, case=case: case.run(backend, list(x)), case.inputs(), [case.gradient()]
        )


@pytest.mark.parametrize(("_", "backend"), own("linear_attention_state"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_and_apply(_: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = Attention(queries=50, keys=45, dtype=dtype, mean=1.0, kv_heads=1).inputs()

    def state(*x: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.linear_attention_state(*x, backend=backend)

    def apply(*x: Tensor) -> Tensor:
        return kernels.linear_attention_apply(*x, backend=backend)

    S, z = (x.detach() for x in state(k, v))
    assert_each_subset_is_of_all(state, [k, v], [torch.randn_like(S), torch.randn_like(z)])
    assert_each_subset_is_of_all(apply, [q, S, z], [torch.randn_like(q)])


# ---- through PyTorch's own machinery -------------------------------------------------------------

SMALL: dict[str, Case] = {
    "linear_attention": Attention(queries=9, keys=12, head_dim=16),
    "softmax_attention": Attention("softmax_attention", queries=9, keys=12, head_dim=16),
}


@pytest.mark.parametrize(("op", "backend"), own(*SMALL))
@pytest.mark.parametrize("through", ["compile", "dynamic", "func.grad", "vmap"])
def test_through_transforms(op: str, backend: str, through: str) -> None:
    """The last input's gradient alone, as an eager call gives it."""
    case = SMALL[op]
    *others, last = (x.detach() for x in case.inputs())
    gradient = case.gradient()

    def loss(x: Tensor) -> Tensor:
        return (case.run(backend, [*others, x]) * gradient).sum()

    leaf = last.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), [leaf])
    if through in ("compile", "dynamic"):
        torch._dynamo.reset()
        dynamic = through == "dynamic"
        run = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        (found,) = torch.autograd.grad(run(leaf), [leaf])
    elif through == "func.grad":
        found = torch.func.grad(loss)(last)
    else:
        found = torch.func.vmap(torch.func.grad(loss))(torch.stack([2 * last, last]))[1]
    torch.testing.assert_close(found, expected)


# ---- work ----------------------------------------------------------------------------------------


def share(op: str, needed: tuple[int, ...], case: Any) -> int:
    """Least FLOP of these gradients, by SPEC's count."""
    needs = [i in needed for i in range(4)]
    if op in RIPPLE:
        fine = case.batch * case.rows * case.cols * case.channels
        if op == "ripple_pool":
            batch, rows, cols, channels = case.pooled()
            return 18 * batch * rows * cols * channels * len(needed)
        return fine * sum(work for work, need in zip((2, 18, 2, 18), needs, strict=True) if need)
    q, k, v, _ = needs
    rows, keys = case.heads * case.queries, case.kv_heads * case.keys
    if op == "softmax_attention":
        products = 1 + (q or k) + q + k + v
        return 2 * products * rows * case.keys * case.head_dim
    return 4 * case.head_dim**2 * (rows * ((q or k) + (k or v)) + keys * (k + v))


@pytest.mark.parametrize(("op", "backend"), own(*SMALL))
def test_flop_counter_counts_what_is_asked_for(op: str, backend: str) -> None:
    case = SMALL[op]
    for needed in subsets(len(case.inputs())):
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(case.inputs())]
        out = case.run(backend, inputs)
        with FlopCounterMode(display=False) as counter:
            out.backward(case.gradient())
        assert counter.get_total_flops() == share(op, needed, case), needed


@pytest.mark.parametrize(("_", "backend"), own("linear_attention"))
def test_an_operator_leaves_out_what_is_not_wanted(_: str, backend: str) -> None:
    kernels.linear_attention(*SMALL["linear_attention"].inputs(), backend=backend)  # loads it
    ops = torch.ops.linear_vit
    q, k, v = (x.detach() for x in SMALL["linear_attention"].inputs())
    S, z = getattr(ops, f"{backend}_linear_attention_state")(k, v)
    backward = getattr(ops, f"{backend}_linear_attention_backward")
    for wanted in range(1, 8):
        found = backward(torch.ones_like(q), q, k, v, S, z, 1e-6, wanted)
        shapes = [tuple(x.shape) for x in found]
        expected = [x.shape if wanted >> i & 1 else (0,) for i, x in enumerate((q, k, v))]
        assert shapes == [tuple(shape) for shape in expected]


# Memory that may not be read: a process that does dies.
UNREADABLE = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, ".")
from linear_vit import kernels

kept = []

def copy_of(x):
    memory = mmap.mmap(-1, (x.numel() * x.element_size() + 4095) // 4096 * 4096)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape)
    copy.copy_(x)
    kept.append(memory)
    return copy

def hide(x):
    libc = ctypes.CDLL(None, use_errno=True)
    size = (x.numel() * x.element_size() + 4095) // 4096 * 4096
    assert libc.mprotect(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(size), 0) == 0

torch.manual_seed(0)
inputs = [copy_of(torch.randn(shape)) for shape in SHAPES]
for i in NEEDED:
    inputs[i].requires_grad_()
out = CALL
gradient = torch.randn(out.shape)
for i in HIDDEN:
    hide(inputs[i])
out.backward(gradient)
assert all(inputs[i].grad.isfinite().all() for i in NEEDED)
print("done")
"""
LINEAR = ("kernels.linear_attention(*inputs, backend='cpu')", [(1, 2, 100, 64)] * 3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the memory is the host's")
@pytest.mark.parametrize(
    ("call", "needed", "unread"),
    [
        pytest.param(LINEAR, (0,), (1, 2), id="q"),
        pytest.param(LINEAR, (2,), (2,), id="v"),
        pytest.param(LINEAR, (0, 2), (2,), id="q-v"),
    ],
)
def test_cpu_reads_only_what_it_needs(
    call: tuple[str, list[tuple[int, ...]]], needed: tuple[int, ...], unread: tuple[int, ...]
) -> None:
    """The key pass is left out for q alone, and v's half of it for v alone, and so on."""
    op = call[0].split("(")[0].removeprefix("kernels.")
    reason = kernels.backends(op, "cpu")["cpu"]
    if reason is not None:
        pytest.skip(reason)
    code = UNREADABLE
    for name, value in (("SHAPES", call[1]), ("NEEDED", needed), ("HIDDEN", unread)):
        code = code.replace(name, repr(value))
    done = subprocess.run(
        [sys.executable, "-c", code.replace("CALL", call[0])],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
