"""What PyTorch needs to know of a kernel backend's operators, beyond the kernels.

A backend written outside PyTorch (Triton, CUDA C++) defines operators ``<backend>_<op>`` and
``<backend>_<op>_backward`` in the namespace ``linear_vit``. Each folder's ``operators.py`` gives
them, once for all backends, shapes (fake kernels) and gradients (autograd formulas): with these
``torch.compile``, ``opcheck``, autocast and FakeTensor treat them like PyTorch's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "linear_vit"


def register(
    backend: str,
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Attach shapes and gradients to an operator pair that the backend has defined.

    Args:
        backend, op: name the operators ``linear_vit::{backend}_{op}`` and ``…_backward``.
        fake, fake_backward: outputs' metadata from inputs' metadata.
        setup_context: ``torch.library.register_autograd``'s, saving what backward reads.
        backward: ``backward(kernel, ctx, *gradients)``, where ``kernel`` is the backward operator.

    Returns:
        The forward operator.
    """
    name = f"{backend}_{op}"
    forward_op = getattr(getattr(torch.ops, NAMESPACE), name)
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")

    def call_backward(ctx: Any, *gradients: Tensor) -> Any:
        return backward(backward_op, ctx, *gradients)

    def no_double_backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"double backward through the {backend} kernels of {op} is not available: use "
            "backend='reference' or backend='torch' for second derivatives"
        )

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    torch.library.register_fake(f"{NAMESPACE}::{name}_backward", fake_backward)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", call_backward, setup_context=setup_context
    )
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_double_backward)
    return forward_op


def readable(x: Tensor) -> Tensor:
    """``x`` with a contiguous last axis: an incoming gradient may be expanded or transposed."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
