"""One compiled function per (operation, last axis, dtype, pass), with dynamic sizes."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from linear_vit.kernels.layout import needs_gradient
from linear_vit.kernels.precision import guarded

# Variants of one function that differ in what the compiler must know about: head counts, an axis of
# size 1 or 0, strides, broadcast heads. Each costs one compilation, none a fallback.
RECOMPILE_LIMIT = 64


def compiled(
    function: Callable[..., Any],
    *inputs: tuple[Tensor, tuple[int, ...]],
    symbolic: bool = True,
) -> Callable[..., Any]:
    """``torch.compile(function)`` for the kind of call that the inputs make.

    The axes that count sequences and tokens are symbolic, so a sweep over them compiles once; head
    dims and channels are constants of the generated code. With ``fullgraph``, running past the
    recompile limit raises instead of falling back to eager.

    Inside an outer ``torch.compile`` the function itself is returned: the outer graph compiles it.

    Args:
        function: what to compile.
        inputs: each tensor that decides the kind of call, with its axes of dynamic size. The
            first one's dtype and last axis are part of the kind.
        symbolic: False makes every size a constant, with a variant for each.
    """
    if torch.compiler.is_compiling():
        return function
    first = inputs[0][0]
    backward = torch.is_grad_enabled() and needs_gradient(*(x for x, _ in inputs))
    known = _compile.cache_info().misses
    kind = (first.shape[-1], first.dtype, first.device.type, backward, len(inputs))
    run = _compile(function, *kind, None if symbolic else False)
    # The first call is the one that is traced.
    if symbolic and _compile.cache_info().misses != known:
        for x, axes in inputs:
            torch._dynamo.maybe_mark_dynamic(x, axes)
    return run


def masks(key_mask: Tensor | None) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Of a ``key_mask`` (B, M), or of none, what :func:`compiled` is told."""
    return [] if key_mask is None else [(key_mask, (0, 1))]


def forget() -> None:
    """Compile anew what is called next."""
    _compile.cache_clear()


@functools.cache
def _compile(
    function: types.FunctionType,
    last_axis: int,
    dtype: torch.dtype,
    device_type: str,
    backward: bool,
    tensors: int,
    dynamic: bool | None,
) -> Callable[..., Any]:
    # Dynamo keeps its cache on the code object, so each kind of call gets a code object of its own:
    # variants of one can't use up another's limit.
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    run = torch.compile(own, fullgraph=True, dynamic=dynamic)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        # A buffer that the backward pass writes over would be gone with retain_graph=True.
        keep = torch._functorch.config.patch(donated_buffer=False)
        with keep, torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            try:
                return guarded(run, *arguments)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise RuntimeError(
                    f"{function.__module__}.{function.__name__} was compiled for {RECOMPILE_LIMIT} "
                    "kinds of shapes and strides, the recompile limit, and does not fall back to "
                    "eager: use backend='torch', or raise kernels.compilation.RECOMPILE_LIMIT"
                ) from error

    return call
