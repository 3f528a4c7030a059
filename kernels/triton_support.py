"""What the Triton kernels share: defining operators, choosing splits, exact half-precision dots."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.operators import NAMESPACE


def operator(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: define ``linear_vit::triton_<op>`` from a typed launcher that mutates nothing."""
    return torch.library.custom_op(f"{NAMESPACE}::triton_{op}", mutates_args=())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors to fill; 1 in the interpreter, which runs programs one after the other."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_tokens(tokens: int, heads: int, block: int, device: torch.device) -> tuple[int, int]:
    """Cut a token axis so that ``heads`` × splits programs fill the GPU about twice.

    Returns:
        (num_splits, tokens_per_split); a split is a whole number of ``block`` tokens.
    """
    blocks = max(1, triton.cdiv(tokens, block))
    wanted = max(1, triton.cdiv(2 * multiprocessors(device), max(1, heads)))
    per_split = triton.cdiv(blocks, min(blocks, wanted)) * block
    return max(1, triton.cdiv(tokens, per_split)), per_split


# Read once, as Triton does: its decorators choose between compiling and interpreting at import.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to dtype, to nearest even.

    Triton's interpreter keeps bfloat16 as raw 16 bits: it truncates when it converts, and its
    arithmetic on them is meaningless. So kernels compute in float32 and come here, and the
    interpreter's rounding is done on the bits.
    """
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(dtype)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; operands of one dtype, IEEE for float32."""
    if INTERPRETING:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exact_dot(a, b, acc):
    """acc + a @ b, where a is exact in its dtype and b is float32.

    A tensor core takes both operands in a's dtype. Rounding b once would cost a half-precision
    error wherever the products cancel, so b is carried as two terms, high + low, after a power of
    two brings its largest element to 2¹⁴ (float16 would overflow or go subnormal). For float32 a
    there is nothing to split.
    """
    if a.dtype == tl.float32:
        return dot(a, b, acc)
    largest = tl.max(tl.max(tl.abs(b), axis=1), axis=0)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    field = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    scale = (field << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    scaled = b * scale
    high = narrow(scaled, a.dtype)
    low = narrow(scaled - high.to(tl.float32), a.dtype)
    return acc + dot(a, low, dot(a, high, tl.zeros_like(acc))) * inverse


@triton.jit
def positive_part(x):
    """relu(x) of a float32 x; a NaN stays one, which ``tl.maximum`` would drop."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def negative_part(x):
    """relu(-x) of a float32 x; a NaN stays one."""
    return tl.where(x > 0, 0.0, -x)


@triton.jit
def load_tile(pointer, rows, row_end, row_stride, columns, column_end):
    """x[rows, columns] as float32, zero past either end. Columns are contiguous."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, rows, row_end, row_stride, columns, column_end, x):
    """x[rows, columns] = float32 x, rounded to the pointer's dtype; nothing past either end."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :]
    tl.store(pointer + offsets, narrow(x, pointer.dtype.element_ty), mask=mask)
