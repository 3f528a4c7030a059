"""Only what is asked for is computed: each subset of the gradients, bit for bit those of all."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from linear_vit import kernels
from tests.kernels.cases import DEVICE, DTYPES, Attention, Case, Ripple, op_backend_pairs
from tests.kernels.test_ripple_stages import Pyramid

OWN = [name for name, row in kernels.backend_rows().items() if row.own]
ATTENTION = ("linear_attention", "softmax_attention")
RIPPLE = ("ripple_pool", "ripple_expand")


def own(*ops: str) -> list[Any]:
    return [pair for pair in op_backend_pairs(*ops) if pair.values[1] in OWN]


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count + 1):
        yield from itertools.combinations(range(count), size)


def some_subsets(count: int) -> list[tuple[int, ...]]:
    """Each one alone, and all but each one."""
    alone = [(i,) for i in range(count)]
    return alone + [tuple(j for j in range(count) if j != i) for i in range(count)]


def differentiate(outputs: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Backward from those outputs that have a gradient: a pyramid's levels are made in turn."""
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad]
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def assert_each_subset_is_of_all(
    run: Any,
    inputs: list[Tensor],
    gradients: list[Tensor],
    tried: Callable[[int], Iterable[tuple[int, ...]]] = subsets,
) -> None:
    """``run(*inputs)`` gives what the gradients belong to; the inputs are leaves."""

    def found(needed: tuple[int, ...]) -> list[Tensor | None]:
        leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)]
        outputs = run(*leaves)
        differentiate([outputs] if isinstance(outputs, Tensor) else outputs, gradients)
        return [x.grad for x in leaves]

    everything = tuple(range(len(inputs)))
    expected = found(everything)
    for needed in tried(len(inputs)):
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


@pytest.mark.parametrize(("op", "backend"), own(*RIPPLE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_ripple(op: str, backend: str, dtype: torch.dtype, axis: int) -> None:
    case = Ripple(op, dtype=dtype, axis=axis, layout="transposed")
    assert_each_subset_is_of_all(
        lambda *x: case.run(backend, list(x)), case.inputs(), [case.gradient()]
    )


PYRAMID = Pyramid((2, 5, 6, 12), (0, 1, 0))


@pytest.mark.parametrize(("_", "backend"), own("ripple_pool_stages"))
def test_pyramid(_: str, backend: str) -> None:
    """Where the kernels are fused, what passes between stages is left out as well."""
    case = PYRAMID
    run = lambda function: lambda *x: function(list(x), backend)  # noqa: E731
    assert_each_subset_is_of_all(run(case.pool), case.pool_inputs(), case.level_gradients())
    dout = case.normal(*case.shape, seed=5).detach()
    assert_each_subset_is_of_all(run(case.expand), case.expand_inputs(), [dout], tried=some_subsets)


# ---- through PyTorch's own machinery -------------------------------------------------------------

SMALL: dict[str, Case] = {
    "linear_attention": Attention(queries=9, keys=12, head_dim=16),
    "softmax_attention": Attention("softmax_attention", queries=9, keys=12, head_dim=16),
    "ripple_pool": Ripple("ripple_pool", rows=3, channels=4),
    "ripple_expand": Ripple("ripple_expand", rows=3, channels=4),
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


@pytest.mark.parametrize(("_", "backend"), own("ripple_pool_stages"))
def test_a_pyramid_is_counted_as_far_as_it_is_asked_for(_: str, backend: str) -> None:
    """The gradient of a coarse level alone: of all finer ones on the way, and of no filter."""
    case = PYRAMID
    n = [shape[0] * shape[1] * shape[2] * shape[3] for shape in case.shapes()]
    dout = case.normal(*case.shape, seed=5).detach()

    def counted(run: Any, inputs: list[Tensor], needed: int, gradients: list[Tensor]) -> int:
        leaves = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
        out = run(leaves, backend)
        with FlopCounterMode(display=False) as counter:
            differentiate([out] if isinstance(out, Tensor) else out, gradients)
        return counter.get_total_flops()

    pooled = [counted(case.pool, case.pool_inputs(), i, case.level_gradients()) for i in range(4)]
    assert pooled[0] == 18 * (n[1] + n[2] + n[3])  # x
    assert pooled[1:] == [18 * sum(n[s + 1 :]) for s in range(3)]  # a filter, and down to it
    up = [counted(case.expand, case.expand_inputs(), i, [dout]) for i in range(10)]
    assert up[0] == 2 * (n[0] + n[1] + n[2])  # z
    for s in range(3):
        way = 2 * sum(n[:s])
        assert up[1 + s] == up[7 + s] == way + 18 * n[s]  # a level, a lateral filter
        assert up[4 + s] == way + 2 * n[s]  # a pair


@pytest.mark.parametrize(("op", "backend"), own(*RIPPLE))
def test_a_ripple_operator_leaves_out_what_is_not_wanted(op: str, backend: str) -> None:
    case = SMALL[op]
    inputs = [x.detach() for x in case.inputs()]
    case.run(backend, inputs)  # loads it
    backward = getattr(torch.ops.linear_vit, f"{backend}_{op}_backward")
    for wanted in range(1 << len(inputs)):
        found = backward(case.gradient(), *inputs, 0, wanted)
        expected = [x.shape if wanted >> i & 1 else (0,) for i, x in enumerate(inputs)]
        assert [tuple(x.shape) for x in found] == [tuple(shape) for shape in expected]


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
GRID, COARSE = (2, 10, 12, 32), (2, 5, 12, 32)
POOL = ("kernels.ripple_pool(*inputs, axis=0, backend='cpu')", [GRID, (32, 3, 3)])
EXPAND = (
    "kernels.ripple_expand(*inputs, axis=0, backend='cpu')",
    [COARSE, GRID, (2, 32), (32, 3, 3)],
)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the memory is the host's")
@pytest.mark.parametrize(
    ("call", "needed", "unread"),
    [
        pytest.param(LINEAR, (0,), (1, 2), id="q"),
        pytest.param(LINEAR, (2,), (2,), id="v"),
        pytest.param(LINEAR, (0, 2), (2,), id="q-v"),
        pytest.param(POOL, (0,), (0,), id="pool-x"),
        pytest.param(EXPAND, (0,), (0, 1), id="expand-z"),
        pytest.param(EXPAND, (0, 1), (0, 1), id="expand-z-x"),
        pytest.param(EXPAND, (2,), (1,), id="expand-weight"),
        pytest.param(EXPAND, (3,), (0,), id="expand-lateral"),
    ],
)
def test_cpu_reads_only_what_it_needs(
    call: tuple[str, list[tuple[int, ...]]], needed: tuple[int, ...], unread: tuple[int, ...]
) -> None:
    """The key pass is left out for q alone, and v's half of it for v alone; of grids, those that
    only weights' gradients are made of; and so on."""
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
