"""float32 is IEEE float32, and gradients are as exact as results, whatever is set around a call.

Two settings make PyTorch's products less exact than their inputs: autocast, and the precision of
float32 products (``torch.set_float32_matmul_precision``, ``torch.backends``). Both are read again
where the backward pass runs. What is compiled into a user's own graph follows the user's settings.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from linear_vit.kernels.functions import transformable
from linear_vit.kernels.layout import needs_gradient, without_autocast

_lock = threading.Lock()
_inside = 0  # calls under way that rely on what _make_exact has set; the last one puts it back
_before: list[Callable[[], None]] = []


def full_precision(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context without autocast, in which float32 products are IEEE-grade."""
    if not torch.compiler.is_compiling() and (_inside or _is_relaxed(device_type)):
        return _full_precision(device_type)
    return without_autocast(device_type)


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    global _inside
    with without_autocast(device_type):
        try:
            with _lock:
                _inside += 1
                if _inside == 1:
                    _make_exact()
            yield
        finally:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    _put_back()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, whose derivatives of every order and mode are in full precision, too."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and needs_gradient(a, b)):
        return a @ b
    return _product(a, b)


def guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, whose backward pass is in full precision, too.

    For what is no :func:`product`. Where the settings are relaxed, the call has a graph of its own,
    which can be differentiated once.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if (
        torch.compiler.is_compiling()
        or not (_inside or _is_relaxed(tensors[0].device.type))
        or not (torch.is_grad_enabled() and needs_gradient(*tensors))
        or torch._C._are_functorch_transforms_active()
    ):
        return function(*arguments)
    return _Guarded.apply(function, *arguments)


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        da = db = None
        with full_precision(a.device.type):
            if ctx.needs_input_grad[0]:
                da = product(gradient, b.transpose(-2, -1)).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]:
                db = product(a.transpose(-2, -1), gradient).sum_to_size(b.shape)
        return da, db

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return product(da, b) + product(a, db)


_product = transformable(_Product)


class _Guarded(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        ctx.inputs = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        with torch.enable_grad():
            ctx.outputs = function(*ctx.inputs)
        if isinstance(ctx.outputs, Tensor):
            return ctx.outputs.detach()
        return tuple(x.detach() for x in ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        wanted = [x for x in ctx.inputs if isinstance(x, Tensor) and x.requires_grad]
        outputs = ctx.outputs if isinstance(ctx.outputs, tuple) else (ctx.outputs,)
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        with full_precision(gradients[0].device.type):
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return None, *(
            next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in ctx.inputs
        )


# ---- the settings --------------------------------------------------------------------------------

_backends: Any = torch.backends
_MATMUL = {"cuda": _backends.cuda.matmul, "cpu": _backends.mkldnn.matmul}
_CONVOLUTION = {"cuda": _backends.cudnn.conv, "cpu": _backends.mkldnn.conv}
_KINDS = (*_MATMUL.values(), *_CONVOLUTION.values(), _backends.cudnn.rnn)
# A kind that is "none" inherits from its backend, and that from the process: from the outermost in.
# (Setting mkldnn's own would set the process's, in PyTorch 2.14.)
_LEVELS = (_backends, _backends.cudnn, *_KINDS)


def _is_relaxed(device_type: str) -> bool:
    """Whether a float32 product or convolution on the device may be less than float32 now."""
    kinds = (_MATMUL.get(device_type), _CONVOLUTION.get(device_type))
    return any(kind and kind.fp32_precision not in ("ieee", "none") for kind in kinds)


def _make_exact() -> None:
    """Set every kind of product to IEEE float32; ``_before`` gets what undoes it, in that order.

    By the functions that set the older settings too: PyTorch refuses the two in contradiction.
    """
    with contextlib.suppress(RuntimeError):  # they contradict one another already
        tf32 = torch.backends.cudnn.allow_tf32
        _before.append(lambda: setattr(torch.backends.cudnn, "allow_tf32", tf32))
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
        _before.append(lambda: torch.set_float32_matmul_precision(matmul))
    for level in _LEVELS:
        # With "none" above it, what it says is its own: "none" will be inherited again.
        own = level.fp32_precision
        _before.append(functools.partial(setattr, level, "fp32_precision", own))
        level.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    _CONVOLUTION["cpu"].fp32_precision = "ieee"


def _put_back() -> None:
    undone = _before[:]
    _before.clear()
    for undo in undone:
        with contextlib.suppress(RuntimeError):  # one that fails keeps no other from being put back
            undo()
