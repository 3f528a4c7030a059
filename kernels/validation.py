"""Argument checks shared by every operation and every backend.

The public functions call these once, before anything is chosen or launched, so a bad argument
raises the same error whatever the backend: TypeError for what a thing is (not a tensor, a dtype
that is not floating point, dtypes that differ), ValueError for what it holds (rank, sizes, strides,
device).
"""

from numbers import Integral, Real

import torch
from torch import Tensor

from linear_vit.screen import counted

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPE_NAMES = "float32, float16, bfloat16, or float64 with backend='reference'"


def check_tensor(name: str, x: object, axes: str) -> None:
    """A strided floating-point tensor of the named axes whose last axis is contiguous.

    Args:
        name: the argument's name, for the message.
        x: the argument.
        axes: the axes allowed, as written in the docstrings, for example ``"(B, H, N, D)"``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {axes}, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor of shape {axes}, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {x.dtype}")
    shape, rank = x.shape, axes.count(",") + 1
    if len(shape) != rank:
        raise ValueError(
            f"{name} must have {rank} axes {axes}, got {len(shape)}: shape {tuple(shape)}"
        )
    if shape[-1] == 0:
        raise ValueError(f"{name} must have a last axis of at least 1, got shape {tuple(shape)}")
    if x.stride(-1) != 1 and shape[-1] != 1:
        raise ValueError(
            f"{name} must have a contiguous last axis (stride 1; every other stride is free), got "
            f"strides {x.stride()}: call .contiguous() on it"
        )


def check_same(**tensors: Tensor) -> None:
    """All tensors share the first one's dtype and device."""
    (first_name, first), *others = tensors.items()
    dtype, device = first.dtype, first.device
    for name, x in others:
        if x.dtype != dtype:
            raise TypeError(
                f"{name} must have {first_name}'s dtype {dtype}, got {x.dtype}: cast one of "
                "them, or run under torch.autocast"
            )
        if x.device != device:
            raise ValueError(f"{name} must be on {first_name}'s device {device}, got {x.device}")


def check_size(name: str, x: Tensor, axis: int, expected: int, meaning: str) -> None:
    """``x.shape[axis]`` equals ``expected``, which is what ``meaning`` says."""
    if x.shape[axis] != expected:
        raise ValueError(
            f"{name} must have size {expected} along axis {axis} ({meaning}), "
            f"got shape {tuple(x.shape)}"
        )


def check_key_value(k: Tensor, v: Tensor) -> None:
    """k and v are (B, Hk, M, D) alike, with at least one head."""
    check_tensor("k", k, "(B, Hk, M, D)")
    check_tensor("v", v, "(B, Hk, M, D)")
    shape = k.shape
    if v.shape != shape:
        for axis, meaning in enumerate(("k's batch", "k's heads", "k's tokens", "k's head dim")):
            check_size("v", v, axis, shape[axis], meaning)
    if shape[1] == 0:
        raise ValueError(f"k must have at least one head, got shape {tuple(shape)}")


def check_grouping(q: Tensor, heads: int, name: str) -> None:
    """q's heads are a positive multiple of ``heads``, the key/value heads of argument ``name``."""
    of_q = q.shape[1]
    if of_q == 0 or of_q % heads != 0:
        raise ValueError(
            f"q's heads must be a positive multiple of {name}'s {counted(heads, 'head')}, "
            f"got {of_q}: query head h reads key/value head h // (H // Hk)"
        )


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, H, N, D) with k, v (B, Hk, M, D), H a multiple of Hk."""
    check_tensor("q", q, "(B, H, N, D)")
    check_key_value(k, v)
    if q.shape == k.shape:  # most calls
        return
    check_size("k", k, 0, q.shape[0], "q's batch")
    check_size("k", k, 3, q.shape[3], "q's head dim")
    check_grouping(q, k.shape[1], "k")


def check_packed(qkv: Tensor) -> None:
    """qkv is (B, N, 3, H, D), with at least one head."""
    check_tensor("qkv", qkv, "(B, N, 3, H, D)")
    check_size("qkv", qkv, 2, 3, "queries, keys and values")
    if qkv.shape[3] == 0:
        raise ValueError(f"qkv must have at least one head, got shape {tuple(qkv.shape)}")


def check_key_mask(key_mask: object, x: Tensor, tokens: int) -> None:
    """None, or bool (B, M) for ``tokens`` keys of x's batch, on x's device."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(
            f"key_mask must be a torch.Tensor of shape (B, M) or None, got "
            f"{type(key_mask).__name__}"
        )
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool, True where a key is there, got {key_mask.dtype}")
    if key_mask.shape != (x.shape[0], tokens):
        raise ValueError(
            f"key_mask must have the shape (B, M) = {(x.shape[0], tokens)}, got "
            f"{tuple(key_mask.shape)}"
        )
    if key_mask.device != x.device:
        raise ValueError(f"key_mask must be on the keys' device {x.device}, got {key_mask.device}")


def check_state_dtype(q: Tensor, S: Tensor, z: Tensor) -> None:
    """S and z are float32, float64 for float64 queries, and on q's device."""
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x in (("S", S), ("z", z)):
        if x.dtype != expected:
            raise TypeError(f"{name} must be {expected} for {q.dtype} queries, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_real(name: str, value: object, *, minimum: float | None = None) -> float:
    """A finite real number, not below ``minimum``; returned as a float."""
    if not isinstance(value, float) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}: {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an int, or a fraction of two
        raise ValueError(f"{name} must be finite, got {value}") from None
    # Not math.isfinite, which torch.compile can't take of a number that varies from call to call.
    if number - number != 0:
        raise ValueError(f"{name} must be finite, got {value}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return number


def check_axis(axis: object) -> int:
    """0 (rows) or 1 (columns), of any integer type; returned as an int."""
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise TypeError(f"axis must be the int 0 (rows) or 1 (columns), got {axis!r}")
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (rows) or 1 (columns), got {axis}")
    return int(axis)
