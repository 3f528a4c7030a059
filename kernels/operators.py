"""What PyTorch needs to know of a kernel backend's operators, beyond the kernels.

A backend written outside PyTorch (Triton, CUDA C++) defines operators ``<backend>_<op>`` and
``<backend>_<op>_backward`` in the namespace ``linear_vit``. Each folder's ``operators.py`` gives
them, once for all backends, shapes (fake kernels) and gradients (an ``autograd.Function``): with
these ``torch.compile``, ``opcheck``, autocast, FakeTensor and the transforms of ``torch.func``
treat them like PyTorch's own. What they lack, a tangent and a second derivative, raises.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from linear_vit.kernels import sharding
from linear_vit.kernels.functions import transformable
from linear_vit.kernels.layout import empty_like

NAMESPACE = "linear_vit"


def register(
    backend: str,
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
    flops_backward: Callable[..., int],
    cut: str | None = None,
    cut_backward: str | None = None,
    batch_first: bool = True,
    pack: Callable[..., tuple[Any, ...]] | None = None,
    pack_backward: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Attach shapes and gradients to an operator pair that the backend has defined.

    Args:
        backend, op: name the operators ``linear_vit::{backend}_{op}`` and ``…_backward``.
        fake, fake_backward: outputs' metadata from inputs' metadata.
        setup_context: as that of an ``autograd.Function``, saving what backward reads.
        backward: ``backward(kernel, ctx, *gradients)``, where ``kernel`` is the backward operator.
            What it returns for an input that needs no gradient is dropped.
        flops, flops_backward: the least work, from each operator's arguments, for FlopCounterMode.
        cut, cut_backward: how each operator may be cut over devices, as a rule of
            ``kernels.sharding``; None: not at all.
        batch_first: whether every tensor's first axis counts sequences, none of which reads
            another: ``vmap`` is then a larger batch, and else a loop.
        pack, pack_backward: from what the returned function, and ``kernel``, are called with (no
            tensor within a list: autograd sees none there) to the operator's arguments.

    Returns:
        The forward operator as a differentiable function.
    """
    name = f"{backend}_{op}"
    operators = getattr(torch.ops, NAMESPACE)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    torch.library.register_fake(f"{NAMESPACE}::{name}_backward", fake_backward)

    _uncounted[getattr(operators, name)] = flops
    _uncounted[getattr(operators, f"{name}_backward")] = flops_backward
    for operator, text in ((name, cut), (f"{name}_backward", cut_backward)):
        if text is not None:
            sharding.remember(getattr(operators, operator).default, text)

    what = f"the {backend} kernels of {op}"
    calls = (
        _calling(what, getattr(operators, name).default, pack),
        _calling(what, getattr(operators, f"{name}_backward").default, pack_backward),
    )
    return _differentiable(what, *calls, setup_context, backward, batch_first)


def _differentiable(
    what: str,
    call: Callable[..., Any],
    call_backward: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    batch_first: bool,
) -> Callable[..., Any]:
    """An operator, and the one that is its gradient, as a function of :func:`register`."""

    class Backward(Function):
        forward = staticmethod(call_backward)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise _missing("double backward", what)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Any:
            raise _missing("forward-mode differentiation", what)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _vmap(kernel, batch_first, info.batch_size, in_dims, inputs)

    differentiable_kernel = transformable(Backward)

    def kernel(*inputs: Any) -> Any:
        # Dynamo takes no Function in the backward of another.
        compiling = torch.compiler.is_compiling()
        return (call_backward if compiling else differentiable_kernel)(*inputs)

    class Forward(Function):
        forward = staticmethod(call)
        jvp = Backward.jvp

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if all(gradient is None for gradient in gradients):  # a later backward gave none
                return (None,) * len(ctx.needs_input_grad)
            found = differentiate(kernel, ctx, *gradients)
            pairs = zip(found, ctx.needs_input_grad, strict=True)
            return tuple([x if needed else None for x, needed in pairs])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
            return _vmap(function, batch_first, info.batch_size, in_dims, inputs)

    function = transformable(Forward)
    return function


def _missing(kind: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{kind} through {what} is not available: use backend='reference' or backend='torch'"
    )


# Work of operators, from their arguments, that PyTorch's counter has not been told yet.
_uncounted: dict[Any, Callable[..., int]] = {}


def _tell_flop_counter() -> None:
    """Not before somebody counts: the counter's module imports Triton."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None or not _uncounted:
        return
    new = {}
    while _uncounted:
        with contextlib.suppress(KeyError):  # another thread took the last one
            operator, work = _uncounted.popitem()
            new[operator] = _ignoring_result(work)
    for operator, work in new.items():
        module.register_flop_formula(operator, get_raw=True)(work)
    for mode in _get_current_dispatch_mode_stack():  # who counts already has a table of his own
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            registry.update(new)


def _ignoring_result(work: Callable[..., int]) -> Callable[..., int]:
    return lambda *inputs, out_val=None, **_: work(*inputs)


def _calling(
    what: str, operator: Callable[..., Any], pack: Callable[..., tuple[Any, ...]] | None
) -> Callable[..., Any]:
    def forward(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _tell_flop_counter()
            sharding.tell_dtensor()
        elif forward_ad._current_level >= 0:  # in a graph the operator would drop a tangent
            raise _missing("forward-mode differentiation", what)
        output = operator(*(inputs if pack is None else pack(*inputs)))
        return tuple(output) if isinstance(output, list) else output

    return forward


def _vmap(
    function: Callable[..., Any],
    batch_first: bool,
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> tuple[Any, Any]:
    """A Function's vmap rule: ``size`` calls as one of ``size`` times the batch, or one by one."""
    stacked = [
        x if not isinstance(x, Tensor)
        else x.unsqueeze(0).expand(size, *x.shape) if axis is None
        else x.movedim(axis, 0)
        for x, axis in zip(inputs, in_dims, strict=True)
    ]  # fmt: skip
    if not size:
        one = function(*(x.new_zeros(x.shape[1:]) if isinstance(x, Tensor) else x for x in stacked))
        outputs = [x.new_empty((0, *x.shape)) for x in _as_tuple(one)]
    elif batch_first:
        one = function(*(x.flatten(0, 1) if isinstance(x, Tensor) else x for x in stacked))
        outputs = [x.unflatten(0, (size, x.shape[0] // size)) for x in _as_tuple(one)]
    else:
        calls = [
            function(*(x[i] if isinstance(x, Tensor) else x for x in stacked)) for i in range(size)
        ]
        one = calls[0]
        outputs = [torch.stack(column) for column in zip(*map(_as_tuple, calls), strict=True)]
    return (tuple(outputs), (0,) * len(outputs)) if isinstance(one, tuple) else (outputs[0], 0)


def _as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def wanted(needs: Sequence[bool]) -> int:
    """What a backward operator takes for which gradients are asked for: bit i is the i-th input's.

    Args:
        needs: of ``ctx.needs_input_grad`` those of the operator's tensors, in order.
    """
    mask = 0
    for index, needed in enumerate(needs):
        if needed:
            mask |= 1 << index
    return mask


def is_wanted(mask: int, index: int) -> bool:
    """Whether :func:`wanted` has the index-th tensor's gradient."""
    return mask >> index & 1 == 1


def empty_gradients(mask: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Memory for a backward operator's results, in the inputs' order and their memory orders.

    A gradient that is not asked for comes out empty, of shape (0,): an operator can't return None.
    """
    return tuple(
        [empty_like(x) if is_wanted(mask, i) else x.new_empty((0,)) for i, x in enumerate(inputs)]
    )
