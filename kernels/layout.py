"""Memory order and autocast: what every backend does alike around its arithmetic."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linear_vit.kernels.functions import transformable


def empty_like(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised tensor in the memory order of ``x``: its axes nest as ``x``'s do, densely.

    A (B, H, N, D) view of a (B, N, H, D) projection gets a result that is such a view too, so that
    reshaping it back copies nothing. The last axis is contiguous whatever ``x`` is.

    Args:
        x: the tensor whose dtype, device and memory order are taken.
        shape: another shape of the same rank; ``x``'s own by default.
    """
    if shape is None:
        out = torch.empty_like(x)
        return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=_CONTIGUOUS)
    order = [*_outermost_first(x.stride()[:-1]), x.dim() - 1]
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.new_empty([shape[axis] for axis in order]).permute(inverse)


def _outermost_first(strides: Sequence[int]) -> list[int]:
    """The axes by falling stride. Not by ``sorted``: Dynamo doesn't sort symbolic sizes."""
    order: list[int] = []
    for axis, stride in enumerate(strides):
        place = len(order)
        while place > 0 and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, axis)
    return order


def in_order_of(x: Tensor, result: Tensor) -> Tensor:
    """``result``, copied to the memory order of ``x`` (same rank) unless it has it already."""
    shape = None if result.shape == x.shape else tuple(result.shape)
    return _restride(result, empty_like(x, shape).stride())


def unpack_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views (B, H, N, D) of a packed projection (B, N, 3, H, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def without_masked(key_mask: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Hk, M, D) with zeros where ``key_mask`` (B, M) is False.

    A key of zeros has a φ of zeros. What was there is not seen, NaN neither, and its gradient is
    exactly 0, whatever comes back for the zeros.
    """
    if key_mask is None:
        return k, v
    there = key_mask[:, None, :, None]
    return k.where(there, 0), v.where(there, 0)


def without_masked_packed(key_mask: Tensor | None, qkv: Tensor) -> Tensor:
    """The same of a packed projection (B, N, 3, H, D), whose queries stay."""
    if key_mask is None:
        return qkv
    is_query = torch.arange(3, device=qkv.device) == 0
    there = key_mask[:, :, None] | is_query
    return qkv.where(there[..., None, None], 0)


def attended(key_mask: Tensor | None) -> Tensor | None:
    """Which keys a softmax over the zeros of :func:`without_masked` is of: (B, 1, 1, M).

    Where no key is there all are: the mean of zeros is what is right, and is no 0/0.
    """
    if key_mask is None:
        return None
    return (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None, :]


class _GradientInOrder(torch.autograd.Function):
    """Identity whose backward puts the gradient into the memory order of the input.

    The gradients PyTorch's own formulas produce come in whatever order the products left them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.strides = empty_like(inputs[0]).stride()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _restride(gradient, ctx.strides)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


_gradient_in_order = transformable(_GradientInOrder)


def gradients_in_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves; their gradients will come in each tensor's own memory order."""
    if not torch.is_grad_enabled():
        return tensors
    # A list and not a generator: Dynamo traces this, and trips over generators it has to resume.
    # One call per tensor: it refuses one call that is given the same tensor twice, as attention is.
    return tuple([_gradient_in_order(x) if x.requires_grad else x for x in tensors])


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether any of them requires a gradient."""
    for x in tensors:  # noqa: SIM110  (Dynamo and generators: see above)
        if x.requires_grad:
            return True
    return False


def _restride(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x``, copied to the strides given unless it has them already."""
    if x.stride() == strides:
        return x
    # Of x, and not torch.empty_strided, which vmap and DTensor don't write to.
    return x.new_empty_strided(x.shape, strides).copy_(x)


def autocast_inputs(*inputs: Any) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on, as SDPA does; float64 is left alone.

    What is not a floating-point tensor is returned as it is, for the validation to name.
    """
    # Whether any is on, before the one that counts: a device's type takes a while to read.
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return inputs
    device_type = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
    if not autocast_enabled(device_type):
        return inputs
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in inputs
    )


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for the device type; False for types that have none."""
    # torch.amp.is_autocast_available would know, but Dynamo of PyTorch 2.11 can't trace it.
    return device_type in _AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which float32 products stay float32, though the caller runs under autocast."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


_CONTIGUOUS = torch.contiguous_format
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
