"""Operators on DTensors: cut by batch, heads and tokens, with what PyTorch has to exchange."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from linear_vit import kernels
from linear_vit.kernels.ripple import stages
from tests import processes
from tests.kernels.cases import DEVICE, usable_backends

# The others are made of PyTorch's operators, whose rules are PyTorch's.
BACKENDS = [
    name for name in usable_backends("linear_attention") if kernels.backend_rows()[name].own
]
# Placements of q, k, v and of the output's gradient; results may lie as they like.
CUTS: dict[str, tuple[Any, ...]] = {
    "batch": (Shard(0),) * 4,
    "heads": (Shard(1),) * 4,
    "queries": (Shard(2), Replicate(), Replicate(), Shard(2)),
    "whole": (Replicate(),) * 4,
}
SHAPES = ((2, 4, 10, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 4, 10, 16))


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _attend(op: str, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if op == "in two halves":
        S, z = kernels.linear_attention_state(k, v, backend=backend)
        return kernels.linear_attention_apply(q, S, z, backend=backend)
    if op.endswith("packed"):
        packed = torch.stack([q, 2 - q, q.square()]).permute(1, 3, 0, 2, 4)
        return getattr(kernels, op)(packed, backend=backend).transpose(1, 2)
    return getattr(kernels, op)(q, k, v, backend=backend)


def _all(op: str, backend: str, tensors: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = (x.detach() for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = _attend(op, backend, *inputs)
    gradients = torch.autograd.grad(out, inputs, dout, allow_unused=op.endswith("packed"))
    return [out, *(x for x in gradients if x is not None)]


def _cut(rank: int, op: str, backend: str) -> list[str]:
    """What differs from a call on one device, however it is cut."""
    mesh = init_device_mesh("cpu", (2,))
    right = _all(op, backend, _tensors())
    wrong = []
    for cut, places in CUTS.items():
        if op.endswith("packed") and cut == "queries":
            continue  # of one length with the keys
        pairs = zip(_tensors(), places, strict=True)
        found = _all(op, backend, [distribute_tensor(x, mesh, [place]) for x, place in pairs])
        assert len(found) == len(right)
        for name, one, other in zip(("out", "dq", "dk", "dv"), found, right, strict=False):
            if not isinstance(one, DTensor):
                wrong.append(f"{cut}: {name} is a {type(one).__name__}")
            elif not torch.allclose(one.full_tensor(), other, rtol=1e-4, atol=1e-5):
                wrong.append(f"{cut}: {name} differs, placed as {one.placements}")
    return wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op", ["linear_attention", "in two halves", "linear_attention_packed", "softmax_attention"]
)
def test_attention_is_cut(op: str, backend: str) -> None:
    if op.startswith("softmax") and kernels.backends(op, DEVICE)[backend] is not None:
        pytest.skip(f"{backend} has no {op}")
    assert processes.together(2, _cut, op, backend) == [[], []]


def _placed(rank: int, backend: str) -> list[tuple[Any, ...]]:
    """How results lie where the tokens are cut: the state in parts, and nothing gathered."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v, _ = (distribute_tensor(x, mesh, [Shard(2)]) for x in _tensors())
    S, z = kernels.linear_attention_state(k, v, backend=backend)
    whole = [x.redistribute(placements=[Replicate()]) for x in (S, z)]
    out = kernels.linear_attention_apply(q, *whole, backend=backend)
    return [x.placements for x in (S, z, out)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_cut_tokens_are_parts_of_a_sum(backend: str) -> None:
    for S, z, out in processes.together(2, _placed, backend):
        assert S[0].is_partial()
        assert z[0].is_partial()
        assert out == (Shard(2),)


def _heads_apart(rank: int, backend: str) -> bool:
    """One key/value head of all: it can't be cut with the query heads that read it."""
    mesh = init_device_mesh("cpu", (2,))
    q, k, v, _ = _tensors()
    q_cut = distribute_tensor(q, mesh, [Shard(1)])
    k_cut, v_cut = (distribute_tensor(x[:, :1], mesh, [Replicate()]) for x in (k, v))
    out = kernels.linear_attention(q_cut, k_cut, v_cut, backend=backend)
    right = kernels.linear_attention(q, k[:, :1], v[:, :1], backend=backend)
    return torch.allclose(out.full_tensor(), right, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_heads_are_not_cut_apart(backend: str) -> None:
    assert processes.together(2, _heads_apart, backend) == [True, True]


def _cut_grids(rank: int, op: str, backend: str) -> list[str]:
    """As :func:`_cut`, of ripple: by images, and by channels."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 5, 8), (8, 3, 3)] if op == "ripple_pool" else []
    shapes = shapes or [(2, 3, 5, 8), (2, 6, 5, 8), (2, 8), (8, 3, 3)]
    # By how many axes there are.
    cuts = {"images": {4: Shard(0)}, "channels": {4: Shard(3), 3: Shard(0), 2: Shard(1)}}
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]

    def results(given: list[Tensor]) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in given]
        out = getattr(kernels, op)(*inputs, axis=0, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    right, wrong = results(tensors), []
    for cut, by_axes in cuts.items():
        places = [by_axes.get(x.dim(), Replicate()) for x in tensors]
        found = results(
            [distribute_tensor(x, mesh, [at]) for x, at in zip(tensors, places, strict=True)]
        )
        for i, (one, other) in enumerate(zip(found, right, strict=True)):
            assert isinstance(one, DTensor)
            if not torch.allclose(one.full_tensor(), other, rtol=1e-4, atol=1e-5):
                wrong.append(f"{cut}: result {i} differs, placed as {one.placements}")
    return wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op", ["ripple_pool", pytest.param("ripple_expand", marks=pytest.mark.slow)]
)
def test_grids_are_cut(op: str, backend: str) -> None:
    assert processes.together(2, _cut_grids, op, backend) == [[], []]


def _cut_pyramid(rank: int, backend: str) -> bool:
    """A pyramid of two stages, up and down again, cut by images."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(shape, generator=generator)
        for shape in ((4, 6, 5, 8), *[(8, 3, 3)] * 4, *[(2, 8)] * 2)
    )

    def results(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        inputs = [y.detach().requires_grad_() for y in (x, *weights)]
        x, pool, lateral, pairs = inputs[0], inputs[1:3], inputs[3:5], inputs[5:]
        middle, top = kernels.ripple_pool_stages(x, pool, axes=(0, 1), backend=backend)
        out = kernels.ripple_expand_stages(
            top, [x, middle], pairs, lateral, axes=(0, 1), backend=backend
        )
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    whole = [distribute_tensor(y, mesh, [Replicate()]) for y in weights]
    cut = distribute_tensor(x, mesh, [Shard(0)])
    assert stages.fits(x, (0, 1), 1)
    assert not stages.fits(cut, (0, 1), 1)
    pairs = zip(results(cut, whole), results(x, weights), strict=True)
    return all(torch.allclose(a.full_tensor(), b, rtol=1e-4, atol=1e-4) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pyramids_are_cut(backend: str) -> None:
    assert processes.together(2, _cut_pyramid, backend) == [True, True]


def _compiled(rank: int, backend: str) -> bool:
    mesh = init_device_mesh("cpu", (2,))
    q, k, v, dout = (distribute_tensor(x, mesh, [Shard(0)]) for x in _tensors())
    q.requires_grad_()

    def call(q: Tensor) -> Tensor:
        return kernels.linear_attention(q, k, v, backend=backend)

    found, right = torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q)
    dq, right_dq = (torch.autograd.grad(out, q, dout)[0] for out in (found, right))
    pairs = ((found, right), (dq, right_dq))
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_as_one_graph(backend: str) -> None:
    assert processes.together(2, _compiled, backend) == [True, True]
