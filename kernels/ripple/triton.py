"""Ripple pooling and expansion in Triton: depthwise 3×3 windows on a channels-last grid.

A program owns BLOCK_P grid positions × BLOCK_C channels; channels are the contiguous axis, so every
access is a row of channels, and the nine taps of neighbouring positions meet in cache.

====================  ==================================================  ======================
kernel                reads                                               writes
====================  ==================================================  ======================
_depthwise            x (z and the pair's weights too, for expansion)     out
_input_gradient       dout                                                dx
_weight_gradient      dout, x                                             9 partial sums a split
_pair_gradient        dout, z                                             dz, 2 partials a split
====================  ==================================================  ======================

Sums are float32. Weight gradients are summed over a split of the positions by each program and over
the splits in a fixed order, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operators import empty_like, readable
from kernels.ripple.operators import attach
from kernels.ripple.stages import compose, pooled_shape
from kernels.triton_support import narrow, operator, split_tokens


@triton.jit
def _grid_row(position, rows, cols):
    """(b, row, col) of a position in the flattened (B, rows, cols) grid."""
    return position // (rows * cols), (position // cols) % rows, position % cols


@triton.jit
def _load(pointer, b, row, col, channels, mask, stride_b, stride_r, stride_c):
    """x[b, row, col, channels] as float32, zero where ``mask`` is off; (positions, channels)."""
    offsets = b * stride_b + row * stride_r + col * stride_c
    return tl.load(pointer + offsets[:, None] + channels[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _depthwise(
    x_pointer,
    weight_pointer,  # (C, 3, 3), contiguous
    z_pointer,  # the coarser grid; unused without PAIRS
    pair_pointer,  # (2, C), contiguous; unused without PAIRS
    out_pointer,
    num_positions,  # of the output grid
    rows,
    cols,
    out_rows,
    out_cols,
    x_stride_b,
    x_stride_r,
    x_stride_c,
    z_stride_b,
    z_stride_r,
    z_stride_c,
    out_stride_b,
    out_stride_r,
    out_stride_c,
    C,
    STEP_R: tl.constexpr,
    STEP_C: tl.constexpr,
    PAIRS: tl.constexpr,  # 0: none; 1: add weight[row % 2] * z[row // 2]; 2: along columns
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = depthwise 3×3 of x (padding 1, steps STEP_R, STEP_C), plus the spread-out z."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    channels = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = (program // channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (positions < num_positions)[:, None] & (channels < C)[None, :]
    b, row, col = _grid_row(positions, out_rows, out_cols)

    accumulator = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tap in tl.static_range(9):
        x_row = row * STEP_R + tap // 3 - 1
        x_col = col * STEP_C + tap % 3 - 1
        valid = (x_row >= 0) & (x_row < rows) & (x_col >= 0) & (x_col < cols)
        mask = inside & valid[:, None]
        x = _load(x_pointer, b, x_row, x_col, channels, mask, x_stride_b, x_stride_r, x_stride_c)
        w = tl.load(weight_pointer + channels * 9 + tap, mask=channels < C, other=0.0)
        accumulator += x * w.to(tl.float32)[None, :]
    if PAIRS:
        token = row if PAIRS == 1 else col
        z_row = row // 2 if PAIRS == 1 else row
        z_col = col if PAIRS == 1 else col // 2
        z = _load(z_pointer, b, z_row, z_col, channels, inside, z_stride_b, z_stride_r, z_stride_c)
        pair = pair_pointer + ((token % 2) * C)[:, None] + channels[None, :]
        accumulator += z * tl.load(pair, mask=inside, other=0.0).to(tl.float32)
    offsets = b * out_stride_b + row * out_stride_r + col * out_stride_c
    out = narrow(accumulator, out_pointer.dtype.element_ty)
    tl.store(out_pointer + offsets[:, None] + channels[None, :], out, mask=inside)


@triton.jit
def _input_gradient(
    dout_pointer,
    weight_pointer,
    dx_pointer,
    num_positions,  # of the input grid
    rows,
    cols,
    out_rows,
    out_cols,
    dout_stride_b,
    dout_stride_r,
    dout_stride_c,
    dx_stride_b,
    dx_stride_r,
    dx_stride_c,
    C,
    STEP_R: tl.constexpr,
    STEP_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx[i] = Σ over taps t of weight[t] · dout[(i + 1 − t) / step], where that divides."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    channels = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = (program // channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (positions < num_positions)[:, None] & (channels < C)[None, :]
    b, row, col = _grid_row(positions, rows, cols)

    accumulator = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tap in tl.static_range(9):
        r, c = row + 1 - tap // 3, col + 1 - tap % 3
        valid = (r >= 0) & (c >= 0) & (r < out_rows * STEP_R) & (c < out_cols * STEP_C)
        valid = valid & (r % STEP_R == 0) & (c % STEP_C == 0)
        mask = inside & valid[:, None]
        dout = _load(
            dout_pointer,
            b,
            r // STEP_R,
            c // STEP_C,
            channels,
            mask,
            dout_stride_b,
            dout_stride_r,
            dout_stride_c,
        )
        w = tl.load(weight_pointer + channels * 9 + tap, mask=channels < C, other=0.0)
        accumulator += dout * w.to(tl.float32)[None, :]
    offsets = b * dx_stride_b + row * dx_stride_r + col * dx_stride_c
    dx = narrow(accumulator, dx_pointer.dtype.element_ty)
    tl.store(dx_pointer + offsets[:, None] + channels[None, :], dx, mask=inside)


@triton.jit
def _weight_gradient(
    dout_pointer,
    x_pointer,
    partial_pointer,  # (num_splits, C, 9) float32
    num_positions,  # of the output grid
    positions_per_split,
    rows,
    cols,
    out_rows,
    out_cols,
    dout_stride_b,
    dout_stride_r,
    dout_stride_c,
    x_stride_b,
    x_stride_r,
    x_stride_c,
    C,
    STEP_R: tl.constexpr,
    STEP_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[split, :, tap] = Σ dout[p] · x[p·step + tap − 1] over a split's positions.

    One tap at a time: the split's rows of dout stay in cache over the nine.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    tap = program % 9
    channels = (program // 9 % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // 9 // channel_blocks
    begin = split * positions_per_split
    end = tl.minimum(begin + positions_per_split, num_positions)

    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        positions = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (positions < end)[:, None] & (channels < C)[None, :]
        b, row, col = _grid_row(positions, out_rows, out_cols)
        dout = _load(
            dout_pointer,
            b,
            row,
            col,
            channels,
            inside,
            dout_stride_b,
            dout_stride_r,
            dout_stride_c,
        )
        x_row = row * STEP_R + tap // 3 - 1
        x_col = col * STEP_C + tap % 3 - 1
        valid = (x_row >= 0) & (x_row < rows) & (x_col >= 0) & (x_col < cols)
        mask = inside & valid[:, None]
        x = _load(x_pointer, b, x_row, x_col, channels, mask, x_stride_b, x_stride_r, x_stride_c)
        total += tl.sum(dout * x, axis=0)
    tl.store(partial_pointer + (split * C + channels) * 9 + tap, total, mask=channels < C)


@triton.jit
def _pair_gradient(
    dout_pointer,
    z_pointer,
    pair_pointer,  # (2, C), contiguous
    dz_pointer,
    partial_pointer,  # (num_splits, 2, C) float32
    num_positions,  # of the coarser grid
    positions_per_split,
    rows,  # of the finer grid
    cols,
    z_rows,
    z_cols,
    dout_stride_b,
    dout_stride_r,
    dout_stride_c,
    z_stride_b,
    z_stride_r,
    z_stride_c,
    dz_stride_b,
    dz_stride_r,
    dz_stride_c,
    C,
    AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz[i] = Σ weight[p] · dout[2i + p] over p = 0, 1; dweight[p] = Σ dout[2i + p] · z[i]."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    channels = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // channel_blocks
    begin = split * positions_per_split
    end = tl.minimum(begin + positions_per_split, num_positions)
    even_weight = tl.load(pair_pointer + channels, mask=channels < C, other=0.0).to(tl.float32)
    odd_weight = tl.load(pair_pointer + C + channels, mask=channels < C, other=0.0).to(tl.float32)

    even_total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    odd_total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_P):
        positions = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (positions < end)[:, None] & (channels < C)[None, :]
        b, z_row, z_col = _grid_row(positions, z_rows, z_cols)
        z = _load(z_pointer, b, z_row, z_col, channels, inside, z_stride_b, z_stride_r, z_stride_c)
        row = z_row * 2 if AXIS == 0 else z_row
        col = z_col if AXIS == 0 else z_col * 2
        even = _load(
            dout_pointer,
            b,
            row,
            col,
            channels,
            inside,
            dout_stride_b,
            dout_stride_r,
            dout_stride_c,
        )
        row = row + 1 if AXIS == 0 else row
        col = col if AXIS == 0 else col + 1
        # The finer size may be odd: its last pair is cut.
        whole = (row < rows) & (col < cols)
        odd = _load(
            dout_pointer,
            b,
            row,
            col,
            channels,
            inside & whole[:, None],
            dout_stride_b,
            dout_stride_r,
            dout_stride_c,
        )
        even_total += tl.sum(even * z, axis=0)
        odd_total += tl.sum(odd * z, axis=0)
        dz = narrow(
            even * even_weight[None, :] + odd * odd_weight[None, :], z_pointer.dtype.element_ty
        )
        offsets = b * dz_stride_b + z_row * dz_stride_r + z_col * dz_stride_c
        tl.store(dz_pointer + offsets[:, None] + channels[None, :], dz, mask=inside)
    partial = partial_pointer + split * 2 * C + channels
    tl.store(partial, even_total, mask=channels < C)
    tl.store(partial + C, odd_total, mask=channels < C)


def tile_options(channels: int) -> dict[str, int]:
    """Positions × channels of a program: 16-byte rows of channels, 4 warps."""
    block_c = min(64, triton.next_power_of_2(channels))
    return {"BLOCK_P": 32, "BLOCK_C": block_c, "num_warps": 4}


def _steps(axis: int) -> dict[str, int]:
    return {"STEP_R": 2 if axis == 0 else 1, "STEP_C": 1 if axis == 0 else 2}


_SAME = {"STEP_R": 1, "STEP_C": 1}


def _programs(x: Tensor, options: dict[str, int]) -> int:
    positions = x.shape[0] * x.shape[1] * x.shape[2]
    return triton.cdiv(positions, options["BLOCK_P"]) * triton.cdiv(x.shape[3], options["BLOCK_C"])


def _run_depthwise(
    x: Tensor, weight: Tensor, out: Tensor, steps: dict[str, int], spread: tuple[Any, ...] = ()
) -> None:
    options = tile_options(x.shape[3])
    z, pair, axis = spread or (x, weight, -1)
    if out.numel():
        _depthwise[(_programs(out, options),)](
            x,
            weight.contiguous(),
            z,
            pair.contiguous(),
            out,
            out.shape[0] * out.shape[1] * out.shape[2],
            *x.shape[1:3],
            *out.shape[1:3],
            *x.stride()[:3],
            *z.stride()[:3],
            *out.stride()[:3],
            x.shape[3],
            PAIRS=axis + 1,
            **steps,
            **options,
        )


def _run_gradients(
    dout: Tensor, x: Tensor, weight: Tensor, steps: dict[str, int]
) -> tuple[Tensor, Tensor]:
    options = tile_options(x.shape[3])
    dx = empty_like(x)
    if dx.numel():
        _input_gradient[(_programs(x, options),)](
            dout,
            weight.contiguous(),
            dx,
            x.shape[0] * x.shape[1] * x.shape[2],
            *x.shape[1:3],
            *dout.shape[1:3],
            *dout.stride()[:3],
            *dx.stride()[:3],
            x.shape[3],
            **steps,
            **options,
        )
    positions = dout.shape[0] * dout.shape[1] * dout.shape[2]
    channel_blocks = triton.cdiv(x.shape[3], options["BLOCK_C"])
    splits, per_split = split_tokens(positions, 9 * channel_blocks, options["BLOCK_P"], x.device)
    partial = x.new_empty((splits, *weight.shape), dtype=torch.float32)
    _weight_gradient[(9 * channel_blocks * splits,)](
        dout,
        x,
        partial,
        positions,
        per_split,
        *x.shape[1:3],
        *dout.shape[1:3],
        *dout.stride()[:3],
        *x.stride()[:3],
        x.shape[3],
        **steps,
        **options,
    )
    return dx, partial.sum(0).to(weight.dtype)


@operator("ripple_pool")
def _launch_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    out = empty_like(x, pooled_shape(x.shape, axis))
    _run_depthwise(x, weight, out, _steps(axis))
    return out


@operator("ripple_pool_backward")
def _launch_pool_backward(
    dout: Tensor, x: Tensor, weight: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    return _run_gradients(readable(dout), x, weight, _steps(axis))


@operator("ripple_expand")
def _launch_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    out = empty_like(x)
    _run_depthwise(x, lateral_weight, out, _SAME, (z, weight, axis))
    return out


@operator("ripple_expand_backward")
def _launch_expand_backward(
    dout: Tensor, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = readable(dout)
    dx, dlateral_weight = _run_gradients(dout, x, lateral_weight, _SAME)
    dz = empty_like(z)
    options = tile_options(z.shape[3])
    positions = z.shape[0] * z.shape[1] * z.shape[2]
    channel_blocks = triton.cdiv(z.shape[3], options["BLOCK_C"])
    splits, per_split = split_tokens(positions, channel_blocks, options["BLOCK_P"], z.device)
    partial = z.new_empty((splits, *weight.shape), dtype=torch.float32)
    _pair_gradient[(channel_blocks * splits,)](
        dout,
        z,
        weight.contiguous(),
        dz,
        partial,
        positions,
        per_split,
        *x.shape[1:3],
        *z.shape[1:3],
        *dout.stride()[:3],
        *z.stride()[:3],
        *dz.stride()[:3],
        z.shape[3],
        AXIS=axis,
        **options,
    )
    return dz, dx, partial.sum(0).to(weight.dtype), dlateral_weight


ripple_pool, ripple_expand = attach("triton")
ripple_pool_stages, ripple_expand_stages = compose(ripple_pool, ripple_expand)
