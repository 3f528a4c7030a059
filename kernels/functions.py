"""``autograd.Function`` for every caller: eager calls, ``torch.compile``, ``torch.func``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def transformable(function: type[Function]) -> Callable[..., Any]:
    """What to call instead of ``function.apply``.

    PyTorch wants one thing written in three ways. Transforms (``torch.func``) take a
    ``setup_context``, with which an eager call takes three times as long as without; forward mode
    takes a ``jvp``, with which Dynamo gives up.

    Args:
        function: with ``forward(*inputs)``, ``setup_context`` and ``backward``; ``jvp``, and either
            ``vmap`` or ``generate_vmap_rule``, where forward mode and ``vmap`` are to take it.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    name = function.__name__
    eager: Any = type(
        name,
        (function,),
        {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)},
    )
    traced: Any = type(name, (function,), {"jvp": staticmethod(Function.jvp)})

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Without a gradient Dynamo would pass forward(*inputs) a context that it does not take.
            # In a transform nothing requires a gradient, and one may be asked for: there it fails.
            needs = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            if torch._C._are_functorch_transforms_active() or (needs and torch.is_grad_enabled()):
                return traced.apply(*inputs)
            return function.forward(*inputs)
        # What Function.apply asks, too; there is no public name for it.
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        if not _is_differentiated(inputs):
            return function.forward(*inputs)
        return eager.apply(*inputs)

    return apply


def _is_differentiated(inputs: tuple[Any, ...]) -> bool:
    """Whether there may be a derivative to take: where there is none, a Function is lost time."""
    if forward_ad._current_level >= 0:  # inside forward_ad.dual_level
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
