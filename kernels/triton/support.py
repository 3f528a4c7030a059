"""What the Triton kernels share: defining operators, choosing splits, exact half-precision dots."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from linear_vit.kernels.operators import NAMESPACE
from linear_vit.kernels.triton import tuning


def operator(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: define ``linear_vit::triton_<op>`` from a typed launcher that mutates nothing.

    Triton launches on the current device, whatever the tensors are on: the launcher runs with
    theirs current.
    """

    def define(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launcher)
        def guarded(*args: Any) -> Any:
            with _device_of(args):
                return launcher(*map(_rows, args))

        return torch.library.custom_op(f"{NAMESPACE}::triton_{op}", guarded, mutates_args=())

    return define


def _rows(x: Any) -> Any:
    """With a contiguous last axis: an incoming gradient may be expanded or transposed, and nobody
    has validated the inputs of an exported program."""
    if isinstance(x, list | tuple):
        return [_rows(one) for one in x]
    if not isinstance(x, torch.Tensor) or x.dim() < 4:
        return x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of the first tensor, in lists too, the current one, if it is CUDA's."""
    flat = (x for one in args for x in (one if isinstance(one, list | tuple) else (one,)))
    device = next(x.device for x in flat if isinstance(x, torch.Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch_options(
    kernel: str, dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """What the tuning table has for a kernel, and what holds for every one.

    a * b + c is one instruction, rounded once, whichever way Triton's default goes: off from 3.10
    on, which would double the float32 kernels' work.
    """
    return {**tuning.options(kernel, dim, dtype, device), "enable_fp_fusion": True}


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors to fill; 1 in the interpreter, which runs programs one after the other."""
    return tuning.device(device).multiprocessors


def balanced_splits(tokens: int, heads: int, block: int, device: torch.device) -> tuple[int, int]:
    """Cut the tokens of ``heads`` heads into splits, a program each, by ``tuning.SPLITS``.

    Few heads: as many programs as one to two a multiprocessor, all at once; the more the longer
    the sequences are, since every split writes and reads a partial state. More heads than that:
    only as many splits as keep the last wave of programs from running nearly alone.

    Returns:
        (num_splits, tokens_per_split); a split is a whole number of ``block`` tokens.
    """
    rules, heads = tuning.SPLITS, max(1, heads)
    once = multiprocessors(device)
    wave = rules.waves_resident * once
    if heads < wave:
        programs = min(max(tokens * heads // rules.tokens_per_program, once), wave)
        splits = max(1, programs // heads)
    else:
        candidates = [s for s in range(1, 9) if s == 1 or tokens >= s * rules.least_tokens]
        splits = max(candidates, key=lambda s: (min(_filled(s * heads, wave), 0.9), -s))
    splits = max(splits, triton.cdiv(tokens, rules.most_tokens))
    blocks = max(1, triton.cdiv(tokens, block))
    per_split = triton.cdiv(blocks, min(blocks, splits)) * block
    return max(1, triton.cdiv(tokens, per_split)), per_split


def _filled(programs: int, wave: int) -> float:
    """How full the waves are that this many programs run in."""
    return programs / (triton.cdiv(programs, wave) * wave)


# Read once, as Triton does: its decorators choose between compiling and interpreting at import.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to dtype, to nearest even; what is of dtype already as it is.

    Triton's interpreter keeps bfloat16 as raw 16 bits: it truncates when it converts, and its
    arithmetic on them is meaningless. So kernels compute in float32 and come here, and the
    interpreter's rounding is done on the bits.
    """
    if INTERPRETING and dtype == tl.bfloat16 and x.dtype == tl.float32:
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
    scale, inverse = power_of_two(tl.max(tl.max(tl.abs(b), axis=1), axis=0))
    scaled = b * scale
    high = narrow(scaled, a.dtype)
    low = narrow(scaled - high.to(tl.float32), a.dtype)
    return acc + dot(a, low, dot(a, high, tl.zeros_like(acc))) * inverse


@triton.jit
def power_of_two(largest):
    """The power of two that brings a float32 scalar to 2¹⁴, and the one that brings it back."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    field = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    scale = (field << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def positive_part(x):
    """relu(x) of a float32 x; a NaN stays one, which ``tl.maximum`` would drop unless told."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def negative_part(x):
    """relu(-x) of a float32 x; a NaN stays one."""
    return tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# Assembly, which the interpreter does not run: two half-precision numbers an instruction, where
# Triton has no such, and what the compiler would tear apart.


@triton.jit
def halves(x):
    """max(x, 0) and min(x, 0) of a tile in its own dtype: φ(x), the second half negated.

    Nothing is rounded, and NaN stays NaN.
    """
    if INTERPRETING or x.dtype == tl.float32:
        wide = x.to(tl.float32)
        positive = narrow(positive_part(wide), x.dtype)
        negative = narrow(-negative_part(wide), x.dtype)
    else:
        kind: tl.constexpr = "bf16x2" if x.dtype == tl.bfloat16 else "f16x2"
        positive, negative = tl.inline_asm_elementwise(
            f"max.NaN.{kind} $0, $2, $3; min.NaN.{kind} $1, $2, $3;",
            "=&r,=r,r,r",
            [x, tl.zeros_like(x)],
            dtype=(x.dtype, x.dtype),
            is_pure=True,
            pack=2,
        )
    return positive, negative


@triton.jit
def choose(x, a, b, c, d):
    """a and c where x > 0, else b and d: float32.

    In one piece: the compiler would keep every element's comparison, for later, as a bit.
    """
    if INTERPRETING:
        first, second = tl.where(x > 0, a, b), tl.where(x > 0, c, d)
    else:
        first, second = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.f32 p, $2, 0f00000000; selp.f32 $0, $3, $4, p; "
            "selp.f32 $1, $5, $6, p; }",
            "=&f,=f,f,f,f,f,f",
            [x, a, b, c, d],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return first, second


@triton.jit
def narrow_finite(x):
    """float32 x rounded to float16, its largest number in the place of more; a NaN stays one."""
    if INTERPRETING:
        narrowed = tl.where(x != x, x, tl.clamp(x, -65504.0, 65504.0))
        narrowed = narrow(narrowed, tl.float16)
    else:
        narrowed = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return narrowed


@triton.jit
def where_nonzero(x, y):
    """y where x is not zero, NaN for one, else 0; both of one dtype."""
    if INTERPRETING or x.dtype == tl.float32:
        chosen = tl.where(x.to(tl.float32) == 0, tl.zeros_like(y), y)
    else:
        chosen = tl.inline_asm_elementwise(  # bfloat16's zeros are float16's
            "{ .reg .b32 mask; set.neu.u32.f16x2 mask, $1, $3; and.b32 $0, $2, mask; }",
            "=r,r,r,r",
            [x, y, tl.zeros_like(x)],
            dtype=y.dtype,
            is_pure=True,
            pack=2,
        )
    return chosen


@triton.jit
def inverse_normaliser(met, eps):
    """1/E of rows with E = met + eps; 0 where a row meets no key, or E has no float32 inverse.

    So a row of zeros has no part in any sum, whatever eps is; a NaN stays one.
    """
    E = met + eps
    nothing = (met == 0) | (tl.abs(E) < 2.0**-126)
    return tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, E))


@triton.jit
def load_rows(pointer, rows, row_end, row_stride, columns, column_end):
    """x[rows, columns] in its own dtype, zero past either end. Columns are contiguous.

    Unconverted, so that a tile may go to shared memory, and from there to the tensor core, as is.
    """
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def load_tile(pointer, rows, row_end, row_stride, columns, column_end):
    """x[rows, columns] as float32, zero past either end. Columns are contiguous."""
    return load_rows(pointer, rows, row_end, row_stride, columns, column_end).to(tl.float32)


@triton.jit
def store_tile(pointer, rows, row_end, row_stride, columns, column_end, x):
    """x[rows, columns] = float32 x, rounded to the pointer's dtype; nothing past either end."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :]
    tl.store(pointer + offsets, narrow(x, pointer.dtype.element_ty), mask=mask)
