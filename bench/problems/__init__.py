"""What is timed and checked: one file an operation, found here by being here.

A file of this folder that has ``OPERATIONS`` adds them; :func:`register` adds one from outside.
"""

import functools
import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench import peers
from linear_vit.bench.problems.attention import AttentionShape
from linear_vit.bench.problems.case import (
    BACKWARD,
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    Case,
    ChangedInput,
    Expected,
    NotOffered,
    Operation,
    Problem,
    Shape,
    TimedOnly,
    Wanted,
    Work,
    WrongResult,
    check,
    check_call,
    judge,
    least_work,
    no_inputs,
    own_kernels,
    worst,
)
from linear_vit.bench.problems.ripple import RippleShape

__all__ = [
    "BACKWARD", "DTYPES", "FORWARD", "FORWARD_BACKWARD", "PASSES", "AttentionShape", "Case",
    "ChangedInput", "Expected", "NotOffered", "Operation", "Problem", "RippleShape", "Shape",
    "TimedOnly", "Wanted", "Work", "WrongResult", "case_name", "check", "check_call",
    "expected_of_peer", "judge", "least_work", "make_problem", "no_inputs", "operation",
    "operations", "own_kernels", "parse_case", "register", "worst",
]  # fmt: skip

_registered: dict[str, Operation] = {}


def operations() -> dict[str, Operation]:
    """Every operation by name: those of this folder, in the order of ``kernels``, then others."""
    return {**_found(), **_registered}


def operation(name: str) -> Operation:
    """The operation of this name; ValueError, listing those there are, where there is none."""
    known = operations()
    if name not in known:
        raise ValueError(f"unknown operation {name!r}; there are {', '.join(known)}")
    return known[name]


def register(added: Operation) -> Operation:
    """Add an operation from outside: it is checked, timed and reported like the others.

    Raises:
        ValueError: there is another of the name.
    """
    known = operations().get(added.name)
    if known is not None and type(known) is not type(added):
        raise ValueError(f"there is an operation {added.name!r} already: {type(known).__name__}")
    _registered[added.name] = added
    return added


def make_problem(
    name: str, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """An operation's problem of this shape, which other libraries' implementations run, too.

    Args:
        name: of the operation.
        shape: one of the operation's.
        dtype: of every input, except a float32 state.
        device: where they live. Values are drawn there, so the seed gives other ones elsewhere.
    """
    problem = operation(name).problem(shape, dtype, device, seed)

    def run(tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        peer = peers.PEERS.get(backend)
        if peer is None:
            return problem.run(tensors, backend)
        if peer.operation != name:
            raise ValueError(f"{backend} has no {name}, but {peer.operation}")
        return (peer.run(tensors["q"], tensors["k"], tensors["v"]),)

    return replace(problem, run=run)


def expected_of_peer(problem: Problem, name: str) -> Expected:
    """Float64 results of the function that a peer computes instead of the operation's."""
    function = peers.PEERS[name].expected
    if function is None:
        raise ValueError(f"{name} computes the operation's own function")
    leaves = [x.detach().double().requires_grad_() for x in problem.inputs.values()]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, [g.double() for g in problem.cotangents])
    values = dict(zip(problem.names(FORWARD_BACKWARD), (out.detach(), *gradients), strict=True))
    return Expected(values, dict.fromkeys(values), problem.cotangents)


def case_name(case: Case) -> str:
    """A case's name in a test's id and a saved run."""
    return operation(case.operation).case_name(case)


def parse_case(name: str) -> Case:
    """The case of this name, as :func:`case_name` writes it; ValueError where it is none."""
    text = name.removesuffix("-graph")
    parts = text.split("-")
    if len(parts) >= 5 and parts[0] in operations():
        shape = operation(parts[0]).parse_size("-".join(parts[3:-1]))
        if shape is not None:
            return Case(parts[0], parts[1], parts[2], shape, parts[-1], text != name)
    raise ValueError(f"{name!r} is no case's name")


@functools.cache
def _found() -> dict[str, Operation]:
    by_name: dict[str, Operation] = {}
    for module in pkgutil.iter_modules(__path__):
        content = importlib.import_module(f"{__name__}.{module.name}")
        for found in getattr(content, "OPERATIONS", ()):
            by_name[found.name] = found
    order = {name: number for number, name in enumerate(kernels.OPERATIONS)}
    return dict(sorted(by_name.items(), key=lambda item: order.get(item[0], len(order))))
