"""A sequence over several processes: the whole sequence's result, for one exchange of a state, or
of every key and value."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit import kernels
from linear_vit.bench.instruments.exchanged import Exchanged
from linear_vit.kernels import accuracy
from tests import processes
from tests.kernels.cases import DEVICE, usable_backends

B, H, HK, D = 2, 4, 2, 16
BACKENDS = [
    (op, name)
    for op in ("linear_attention", "softmax_attention")
    for name in usable_backends(op)
    if not kernels.backend_rows()[name].compiles
]
Lengths = Sequence[tuple[int, int]]  # queries and keys of each process


def _inputs(lengths: Lengths, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence."""
    n, m = (sum(numbers) for numbers in zip(*lengths, strict=True))
    generator = torch.Generator().manual_seed(n)
    sizes = ((H, n), (HK, m), (HK, m), (H, n))
    return [torch.randn(B, h, t, D, generator=generator).to(DEVICE, dtype) for h, t in sizes]


def _part(rank: int, op: str, lengths: Lengths, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """Twice the output and gradients of one process, and the bytes that it sent each time."""
    n, m = ([sum(numbers[:r]) for r in (rank, rank + 1)] for numbers in zip(*lengths, strict=True))
    where = [slice(*n), slice(*m), slice(*m), slice(*n)]
    given = [x[:, :, at] for x, at in zip(_inputs(lengths, dtype), where, strict=True)]
    sharded = getattr(kernels, f"{op}_sharded")
    answers, sent = [], []
    for _ in range(2):
        q, k, v = (x.clone().requires_grad_() for x in given[:3])
        with Exchanged() as exchanged:
            out = sharded(q, k, v, backend=backend)
            gradients = torch.autograd.grad(out, (q, k, v), given[3])
        answers.append([x.detach().cpu() for x in (out, *gradients)])
        sent.append(exchanged.bytes)
    return {"answers": answers, "sent": sent}


def _sent(op: str, rank: int, lengths: Lengths, dtype: torch.dtype) -> float:
    """Of both passes by a process, where an all-reduce goes around a ring."""
    processes, keys = len(lengths), [m for _, m in lengths]
    if op == "linear_attention":  # S and z, and their gradients, whatever the lengths
        return 2 * 4 * B * HK * (2 * D * D + 2 * D) * 2 * (processes - 1) / processes
    # Its k and v to every other, then each other's gradients; and how many keys it has.
    rows = keys[rank] * (processes - 1) + sum(keys) - keys[rank]
    return 2 * B * HK * rows * D * dtype.itemsize + 8 * (processes - 1)


def _check(op: str, lengths: Lengths, backend: str, dtype: torch.dtype) -> None:
    parts = processes.together(len(lengths), _part, op, lengths, backend, dtype)
    q, k, v, dout = (x.cpu() for x in _inputs(lengths, dtype))
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out = getattr(kernels, op)(q, k, v, backend="reference")
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]
    for rank, part in enumerate(parts):
        first, second = part["answers"]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert part["sent"] == pytest.approx([_sent(op, rank, lengths, dtype)] * 2)
    for number, right in enumerate(expected):
        found = torch.cat([part["answers"][0][number] for part in parts], dim=2)
        assert found.dtype == dtype
        comparison = accuracy.compare(found, right, gradient=number > 0)
        assert comparison.passed, comparison


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_uneven_shards_give_the_whole_sequences_result(
    op: str, backend: str, dtype: torch.dtype
) -> None:
    _check(op, [(33, 40), (70, 5)], backend, dtype)


@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
@pytest.mark.parametrize("lengths", [[(5, 3), (0, 0), (7, 0), (0, 9)], [(3, 4)]])
def test_a_process_may_have_no_tokens(op: str, lengths: Lengths) -> None:
    _check(op, lengths, "torch", torch.float32)


def _in_a_subgroup(rank: int) -> str:
    group = dist.new_group([0, 1])
    x = torch.ones(1, 1, 4, 8)
    try:
        out = kernels.linear_attention_sharded(x, x, x, group, backend="torch")
    except RuntimeError as error:
        return str(error)
    return f"{out.sum().item():g}"


def test_a_group_of_some_processes() -> None:
    found = processes.together(3, _in_a_subgroup)
    assert found == ["32", "32", "linear_attention_sharded: this process is not of the group"]


def _compiled(rank: int) -> bool:
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.linear_attention_sharded(q, k, v, backend="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, right = compiled(q, k, v), call(q, k, v)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, right)]
    with torch.no_grad():
        read = compiled(q, k, v)
    pairs = [(found, right), (read, right), *zip(*gradients, strict=True)]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.slow
def test_it_compiles_as_one_graph() -> None:
    assert processes.together(2, _compiled) == [True, True]


def _masked(rank: int, op: str) -> float:
    """How far the result is from that of the keys that are there."""
    x = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    there = torch.arange(12).expand(2, 12) < torch.tensor([[9], [2]])
    mine = slice(6 * rank, 6 * rank + 6)
    y = x[:, :, mine]
    sharded, whole = (getattr(kernels, name) for name in (f"{op}_sharded", op))
    out = sharded(y, y, y, key_mask=there[:, mine], backend="torch")
    right = whole(x, x, x, key_mask=there, backend="torch")
    return (out - right[:, :, mine]).abs().max().item()


@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
def test_masked_keys_are_those_of_a_process(op: str) -> None:
    assert max(processes.together(2, _masked, op)) < 1e-6


@pytest.mark.parametrize("op", ["linear_attention_sharded", "softmax_attention_sharded"])
def test_without_processes_it_says_what_to_do(op: str) -> None:
    x = torch.ones(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="start the processes with torchrun and call"):
        getattr(kernels, op)(x, x, x)
