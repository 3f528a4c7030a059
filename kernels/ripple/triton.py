"""Ripple pooling and expansion in Triton: depthwise 3×3 windows on a channels-last grid.

A program owns BLOCK_C channels (the contiguous axis: 16-byte accesses) of a range of tokens and
walks them in tiles of BLOCK_P; the taps of neighbouring tokens meet in cache, a filter stays in
registers over the walk. Each kernel takes a pyramid of STAGES stages, one as well as four:

====================  ==================================================  ======================
kernel                reads, e C times n_s = B·rows·cols of level s       writes
====================  ==================================================  ======================
_pool                 n_0 (and n_1 to n_(S-1), which it wrote)            n_1 + … + n_S
_pool_backward        levels n_0 + … + n_(S-1), gradients n_1 + … + n_S   n_0
_expand               n_0 + … + n_S                                       n_0
_expand_backward      dout n_0, n_0 + … + n_S                             n_0 + … + n_S
_sum_partials         partial sums, float32                               weights' gradients
====================  ==================================================  ======================

Backward, dx and a weight's gradient are made of the same nine taps of dout, so one pass over the
tokens makes both; each program leaves 9 or 11 float32 sums a channel, added in a fixed order:
results repeat bit for bit. What is not asked for is left out, stage by stage (``pool_needs`` and
``expand_needs``): without a weight's gradient its level is not read, without dx none is written.

For one stage a program's range is any part of the grid. For a pyramid it is whole images, since a
level's windows read what the level before wrote: between stages the program meets at a barrier,
which also orders its own global memory. What passes between stages and is no result lies in a
float32 scratch (backward) or in ``out`` itself (a coarse token at the place of its first fine one),
which the same program wrote shortly before: it comes from cache while its images fit there. So
pyramids are walked in one launch only where ``stages.fits`` says so, and by single stages else.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_vit.kernels.layout import empty_like
from linear_vit.kernels.operators import wanted as bits
from linear_vit.kernels.ripple.operators import attach, attach_stages, empty_gradients_of
from linear_vit.kernels.ripple.stages import (
    compose,
    expand_needs,
    fused_where_it_fits,
    level_shapes,
    pool_needs,
)
from linear_vit.kernels.triton import tuning
from linear_vit.kernels.triton.support import launch_options, multiprocessors, narrow, operator

# Tiles that one float32 sum takes at most: of more, it would lose too much.
_MOST_TILES = 512


# ---- what the kernels share ----------------------------------------------------------------------
# Sizes are (rows, cols), strides those of batch, rows and columns; spans are the tokens of a level
# that a program owns. All are tuples with an entry a level.


@triton.jit
def _channels(C, BLOCK_C: tl.constexpr):
    """The program's channels, and which part of the tokens it has."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    return (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C), program // blocks


@triton.jit
def _token(start, end, rows, cols, LONG: tl.constexpr, BLOCK_P: tl.constexpr):
    """(batch, row, column) of the tile's tokens, and which of them there are."""
    tokens = start + tl.arange(0, BLOCK_P)
    inside = tokens < end
    if not LONG:  # a 64-bit division is a hundred instructions
        tokens = tokens.to(tl.int32)
    line = tokens // cols
    return line // rows, line % rows, tokens % cols, inside


@triton.jit
def _offsets(b, row, col, strides, channels):
    tokens = (
        b.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + col.to(tl.int64) * strides[2]
    )
    return tokens[:, None] + channels[None, :]


@triton.jit
def _load(pointer, b, row, col, strides, channels, mask):
    """x[b, row, col, channels] as float32, zero where ``mask`` is off; (tokens, channels)."""
    offsets = _offsets(b, row, col, strides, channels)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, b, row, col, strides, channels, mask, x):
    """The same places = float32 x, rounded to the pointer's dtype."""
    offsets = _offsets(b, row, col, strides, channels)
    tl.store(pointer + offsets, narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _filter(pointer, channels, C):
    """The nine taps of a contiguous (C, 3, 3), each (channels,) in float32."""
    taps = ()  # type: tuple[Any, ...]
    for tap in tl.static_range(9):
        w = tl.load(pointer + channels * 9 + tap, mask=channels < C, other=0.0)
        taps = taps + (w.to(tl.float32),)  # noqa: RUF005
    return taps


@triton.jit
def _window(pointer, b, row, col, rows, cols, strides, channels, mask, taps):
    """Σ taps[i, j] · x[row + i − 1, col + j − 1], zero outside the grid."""
    total = tl.zeros(mask.shape, dtype=tl.float32)
    for tap in tl.static_range(9):
        r, c = row + (tap // 3 - 1), col + (tap % 3 - 1)
        valid = (r >= 0) & (r < rows) & (c >= 0) & (c < cols)
        x = _load(pointer, b, r, c, strides, channels, mask & valid[:, None])
        total += x * taps[tap][None, :]
    return total


@triton.jit
def _store_sums(partial_pointer, sums, first, channels, C):
    """partial[first + i, channels] = Σ over tokens of sums[i]."""
    for i in tl.static_range(len(sums)):
        target = partial_pointer + (first + i) * C + channels
        tl.store(target, tl.sum(sums[i], axis=0), mask=channels < C)


@triton.jit
def _adjoint(
    x_pointer,
    x_strides,
    dout_pointer,
    dout_strides,
    own_pointer,  # a gradient that dx starts from; unused without OWN
    own_strides,
    dx_pointer,
    dx_strides,
    weight_pointer,
    partial_pointer,  # 9 rows of C
    size,  # of x
    out_size,
    begin,
    end,
    channels,
    C,
    STEP_R: tl.constexpr,
    STEP_C: tl.constexpr,
    OWN: tl.constexpr,
    DX: tl.constexpr,
    DWEIGHT: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx[i] = Σ over taps t of weight[t] · dout[(i + 1 − t) / step], where that divides; and, from
    the same dout, dweight[t] = Σ over i of x[i] · dout[(i + 1 − t) / step]. One of them alone, too.
    """
    rows, cols = size[0], size[1]
    out_rows, out_cols = out_size[0], out_size[1]
    if DX:
        taps = _filter(weight_pointer, channels, C)
    if DWEIGHT:
        sums = ()  # type: tuple[Any, ...]
        for _ in tl.static_range(9):
            sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32),)  # noqa: RUF005
    for start in range(begin, end, BLOCK_P):
        b, row, col, inside = _token(start, end, rows, cols, LONG, BLOCK_P)
        mask = inside[:, None] & (channels < C)[None, :]
        if DWEIGHT:
            x = _load(x_pointer, b, row, col, x_strides, channels, mask)
            more = ()  # type: tuple[Any, ...]
        if DX:
            dx = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
            if OWN:
                dx = _load(own_pointer, b, row, col, own_strides, channels, mask)
        for tap in tl.static_range(9):
            r, c = row + (1 - tap // 3), col + (1 - tap % 3)
            valid = (r >= 0) & (c >= 0) & (r < out_rows * STEP_R) & (c < out_cols * STEP_C)
            valid = valid & (r % STEP_R == 0) & (c % STEP_C == 0)
            whole = mask & valid[:, None]
            g = _load(dout_pointer, b, r // STEP_R, c // STEP_C, dout_strides, channels, whole)
            if DX:
                dx += g * taps[tap][None, :]
            if DWEIGHT:
                more = more + (sums[tap] + x * g,)  # noqa: RUF005
        if DWEIGHT:
            sums = more
        if DX:
            _store(dx_pointer, b, row, col, dx_strides, channels, mask, dx)
    if DWEIGHT:
        _store_sums(partial_pointer, sums, 0, channels, C)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _pool(
    level_pointers,  # 0 to S: x is read, the others are written
    weight_pointers,
    level_strides,
    sizes,
    spans,
    batch,
    C,
    AXES: tl.constexpr,
    STAGES: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each level is the depthwise 3×3 of the one before, stride 2 along the stage's axis."""
    channels, part = _channels(C, BLOCK_C)
    for s in tl.static_range(STAGES):
        rows, cols = sizes[s + 1][0], sizes[s + 1][1]
        taps = _filter(weight_pointers[s], channels, C)
        begin = part * spans[s + 1]
        end = tl.minimum(begin + spans[s + 1], batch * rows * cols)
        for start in range(begin, end, BLOCK_P):
            b, row, col, inside = _token(start, end, rows, cols, LONG, BLOCK_P)
            mask = inside[:, None] & (channels < C)[None, :]
            out = _window(
                level_pointers[s],
                b,
                row * 2 if AXES[s] == 0 else row,
                col if AXES[s] == 0 else col * 2,
                sizes[s][0],
                sizes[s][1],
                level_strides[s],
                channels,
                mask,
                taps,
            )
            _store(level_pointers[s + 1], b, row, col, level_strides[s + 1], channels, mask, out)
        if s + 1 < STAGES:
            tl.debug_barrier()


@triton.jit
def _pool_backward(
    level_pointers,  # 0 to S - 1
    gradient_pointers,  # 0 to S: of level 0, written; of the others, read
    scratch_pointers,  # 1 to S - 1: total gradients, float32 and contiguous; any at 0
    weight_pointers,
    partial_pointer,  # (programs, STAGES, 11, C)
    level_strides,
    gradient_strides,
    scratch_strides,
    sizes,
    spans,
    batch,
    C,
    AXES: tl.constexpr,
    STAGES: tl.constexpr,
    LEVELS: tl.constexpr,  # of pool_needs
    WEIGHTS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the coarsest level down: a level's total gradient is its own plus what comes back."""
    channels, part = _channels(C, BLOCK_C)
    for s in tl.static_range(STAGES - 1, -1, -1):
        if LEVELS[s] or WEIGHTS[s]:
            begin = part * spans[s]
            end = tl.minimum(begin + spans[s], batch * sizes[s][0] * sizes[s][1])
            _adjoint(
                level_pointers[s],
                level_strides[s],
                gradient_pointers[s + 1] if s + 1 == STAGES else scratch_pointers[s + 1],
                gradient_strides[s + 1] if s + 1 == STAGES else scratch_strides[s + 1],
                gradient_pointers[s],
                gradient_strides[s],
                gradient_pointers[0] if s == 0 else scratch_pointers[s],
                gradient_strides[0] if s == 0 else scratch_strides[s],
                weight_pointers[s],
                partial_pointer + (part * STAGES + s) * 11 * C,
                sizes[s],
                sizes[s + 1],
                begin,
                end,
                channels,
                C,
                2 if AXES[s] == 0 else 1,
                1 if AXES[s] == 0 else 2,
                s > 0,
                LEVELS[s],
                WEIGHTS[s],
                LONG,
                BLOCK_P,
                BLOCK_C,
            )
            if s > 0:
                tl.debug_barrier()


@triton.jit
def _expand(
    level_pointers,  # 0 to S, S being z
    pair_pointers,
    weight_pointers,
    out_pointer,
    level_strides,
    out_strides,
    sizes,
    spans,
    batch,
    C,
    AXES: tl.constexpr,
    STAGES: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the coarsest level down: a token makes the two fine ones of it, each with its window.

    In between, a level's token lies in ``out`` at the place of its first descendant: its first
    child overwrites it, which the same tile computes from it.
    """
    channels, part = _channels(C, BLOCK_C)
    row_step, col_step = 1, 1  # between tokens of level s + 1, in level 0
    for s in tl.static_range(STAGES):
        if AXES[s] == 0:
            row_step *= 2
        else:
            col_step *= 2
    for s in tl.static_range(STAGES - 1, -1, -1):
        fine_row_step = row_step // 2 if AXES[s] == 0 else row_step
        fine_col_step = col_step if AXES[s] == 0 else col_step // 2
        rows, cols = sizes[s][0], sizes[s][1]
        coarse_rows, coarse_cols = sizes[s + 1][0], sizes[s + 1][1]
        taps = _filter(weight_pointers[s], channels, C)
        begin = part * spans[s + 1]
        end = tl.minimum(begin + spans[s + 1], batch * coarse_rows * coarse_cols)
        for start in range(begin, end, BLOCK_P):
            b, coarse_row, coarse_col, inside = _token(
                start, end, coarse_rows, coarse_cols, LONG, BLOCK_P
            )
            mask = inside[:, None] & (channels < C)[None, :]
            if s + 1 == STAGES:
                z = _load(
                    level_pointers[STAGES],
                    b,
                    coarse_row,
                    coarse_col,
                    level_strides[STAGES],
                    channels,
                    mask,
                )
            else:
                r, c = coarse_row * row_step, coarse_col * col_step
                z = _load(out_pointer, b, r, c, out_strides, channels, mask)
            for parity in range(2):
                row = coarse_row * 2 + parity if AXES[s] == 0 else coarse_row
                col = coarse_col if AXES[s] == 0 else coarse_col * 2 + parity
                # The finer size may be odd: its last pair is cut.
                whole = mask & ((row < rows) & (col < cols))[:, None]
                out = _window(
                    level_pointers[s],
                    b,
                    row,
                    col,
                    rows,
                    cols,
                    level_strides[s],
                    channels,
                    whole,
                    taps,
                )
                pair = tl.load(
                    pair_pointers[s] + parity * C + channels, mask=channels < C, other=0.0
                )
                out += z * pair.to(tl.float32)[None, :]
                r, c = row * fine_row_step, col * fine_col_step
                _store(out_pointer, b, r, c, out_strides, channels, whole, out)
        row_step, col_step = fine_row_step, fine_col_step
        if s > 0:
            tl.debug_barrier()


@triton.jit
def _expand_backward(
    dout_pointer,
    level_pointers,  # 0 to S, S being z
    gradient_pointers,  # 0 to S, all written
    dexpanded_pointers,  # 1 to S - 1: gradients of the expanded levels, float32; any at 0
    expanded_pointers,  # 1 to S - 1: these levels again, float32; any at 0
    pair_pointers,
    weight_pointers,
    partial_pointer,  # (programs, STAGES, 11, C)
    dout_strides,
    level_strides,
    gradient_strides,
    scratch_strides,
    sizes,
    spans,
    batch,
    C,
    AXES: tl.constexpr,
    STAGES: tl.constexpr,
    COARSE: tl.constexpr,  # of expand_needs
    PAIRS: tl.constexpr,
    LEVELS: tl.constexpr,
    LATERALS: tl.constexpr,
    EXPANDED: tl.constexpr,  # whether a pair weight's gradient reads the expanded level s
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Down: the expanded levels again. Up: their gradients, and the pair weights'. Then every
    level's own gradient and its filter's."""
    channels, part = _channels(C, BLOCK_C)

    for s in tl.static_range(STAGES - 1, 0, -1):  # down, to level 1
        if EXPANDED[s]:
            rows, cols = sizes[s][0], sizes[s][1]
            taps = _filter(weight_pointers[s], channels, C)
            begin = part * spans[s]
            end = tl.minimum(begin + spans[s], batch * rows * cols)
            for start in range(begin, end, BLOCK_P):
                b, row, col, inside = _token(start, end, rows, cols, LONG, BLOCK_P)
                mask = inside[:, None] & (channels < C)[None, :]
                z = _load(
                    level_pointers[STAGES] if s + 1 == STAGES else expanded_pointers[s + 1],
                    b,
                    row // 2 if AXES[s] == 0 else row,
                    col if AXES[s] == 0 else col // 2,
                    level_strides[STAGES] if s + 1 == STAGES else scratch_strides[s + 1],
                    channels,
                    mask,
                )
                parity = (row if AXES[s] == 0 else col) % 2
                pair = pair_pointers[s] + (parity * C)[:, None] + channels[None, :]
                expanded = z * tl.load(pair, mask=mask, other=0.0).to(tl.float32)
                expanded += _window(
                    level_pointers[s],
                    b,
                    row,
                    col,
                    rows,
                    cols,
                    level_strides[s],
                    channels,
                    mask,
                    taps,
                )
                _store(
                    expanded_pointers[s], b, row, col, scratch_strides[s], channels, mask, expanded
                )
            tl.debug_barrier()

    for s in tl.static_range(STAGES):  # up
        if COARSE[s] or PAIRS[s]:
            rows, cols = sizes[s][0], sizes[s][1]
            coarse_rows, coarse_cols = sizes[s + 1][0], sizes[s + 1][1]
            if COARSE[s]:
                even_weight = tl.load(pair_pointers[s] + channels, mask=channels < C, other=0.0)
                odd_weight = tl.load(pair_pointers[s] + C + channels, mask=channels < C, other=0.0)
            if PAIRS[s]:
                even_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
                odd_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
            begin = part * spans[s + 1]
            end = tl.minimum(begin + spans[s + 1], batch * coarse_rows * coarse_cols)
            for start in range(begin, end, BLOCK_P):
                b, coarse_row, coarse_col, inside = _token(
                    start, end, coarse_rows, coarse_cols, LONG, BLOCK_P
                )
                mask = inside[:, None] & (channels < C)[None, :]
                if PAIRS[s]:
                    z = _load(
                        level_pointers[STAGES] if s + 1 == STAGES else expanded_pointers[s + 1],
                        b,
                        coarse_row,
                        coarse_col,
                        level_strides[STAGES] if s + 1 == STAGES else scratch_strides[s + 1],
                        channels,
                        mask,
                    )
                dout = dout_pointer if s == 0 else dexpanded_pointers[s]
                strides = dout_strides if s == 0 else scratch_strides[s]
                row = coarse_row * 2 if AXES[s] == 0 else coarse_row
                col = coarse_col if AXES[s] == 0 else coarse_col * 2
                even = _load(dout, b, row, col, strides, channels, mask)
                row = row + 1 if AXES[s] == 0 else row
                col = col if AXES[s] == 0 else col + 1
                # The finer size may be odd: its last pair is cut.
                whole = (row < rows) & (col < cols)
                odd = _load(dout, b, row, col, strides, channels, mask & whole[:, None])
                if PAIRS[s]:
                    even_sum += even * z
                    odd_sum += odd * z
                if COARSE[s]:
                    dz = (
                        even * even_weight.to(tl.float32)[None, :]
                        + odd * odd_weight.to(tl.float32)[None, :]
                    )
                    _store(
                        gradient_pointers[STAGES] if s + 1 == STAGES else dexpanded_pointers[s + 1],
                        b,
                        coarse_row,
                        coarse_col,
                        gradient_strides[STAGES] if s + 1 == STAGES else scratch_strides[s + 1],
                        channels,
                        mask,
                        dz,
                    )
            if PAIRS[s]:
                partial = partial_pointer + (part * STAGES + s) * 11 * C
                _store_sums(partial, (even_sum, odd_sum), 9, channels, C)
            if COARSE[s] and s + 1 < STAGES:
                tl.debug_barrier()

    for s in tl.static_range(STAGES):
        if LEVELS[s] or LATERALS[s]:
            begin = part * spans[s]
            end = tl.minimum(begin + spans[s], batch * sizes[s][0] * sizes[s][1])
            _adjoint(
                level_pointers[s],
                level_strides[s],
                dout_pointer if s == 0 else dexpanded_pointers[s],
                dout_strides if s == 0 else scratch_strides[s],
                dout_pointer,
                dout_strides,
                gradient_pointers[s],
                gradient_strides[s],
                weight_pointers[s],
                partial_pointer + (part * STAGES + s) * 11 * C,
                sizes[s],
                sizes[s],
                begin,
                end,
                channels,
                C,
                1,
                1,
                False,
                LEVELS[s],
                LATERALS[s],
                LONG,
                BLOCK_P,
                BLOCK_C,
            )


@triton.jit
def _sum_partials(
    partial_pointer,  # (programs, STAGES, 11, C)
    weight_pointers,  # gradients (C, 3, 3), contiguous
    pair_pointers,  # gradients (2, C), contiguous, of sums 9 and 10; any where there are but 9
    programs,
    C,
    WEIGHTS: tl.constexpr,  # bit s: the gradient of stage s's is asked for
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each weight's gradient: its partial sums, added in the order of the programs."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap, stage = tl.program_id(1), tl.program_id(2)
    wanted = (tl.where(tap < 9, WEIGHTS, PAIRS) >> stage) & 1
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, programs * wanted, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        rows = (program.to(tl.int64) * STAGES + stage) * 11 + tap
        mask = (program < programs)[:, None] & (channels < C)[None, :]
        total += tl.load(
            partial_pointer + rows[:, None] * C + channels[None, :], mask=mask, other=0.0
        )
    gradient, pair_gradient = weight_pointers[0], pair_pointers[0]
    for s in tl.static_range(1, STAGES):
        if stage == s:
            gradient = weight_pointers[s]
            pair_gradient = pair_pointers[s]
    offsets = channels * 9 + tap
    if tap >= 9:
        gradient = pair_gradient
        offsets = (tap - 9) * C + channels
    rounded = narrow(tl.sum(total, axis=0), gradient.dtype.element_ty)
    tl.store(gradient + offsets, rounded, mask=(channels < C) & (wanted != 0))


# ---- launchers -----------------------------------------------------------------------------------


def _tuning_key(name: str, several: bool, backward: bool) -> str:
    return f"ripple.{name}{'_stages' if several else ''}{'_backward' if backward else ''}"


class _Pyramid:
    """What every launch of a pyramid over level 0, ``x``, is given."""

    def __init__(self, name: str, x: Tensor, axes: Sequence[int], *, backward: bool) -> None:
        batch, _, _, self.C = x.shape
        self.x, self.axes, self.batch = x, tuple(axes), batch
        self.shapes = level_shapes(x.shape, axes)
        key = _tuning_key(name, len(axes) > 1, backward)
        self.tile = launch_options(key, self.C, x.dtype, x.device)
        channel_blocks = triton.cdiv(self.C, self.tile["BLOCK_C"])
        # About 8 programs a multiprocessor, of as many tokens as one float32 sum takes at most.
        wanted = max(1, 8 * multiprocessors(x.device) // channel_blocks)
        block, tokens = self.tile["BLOCK_P"], x.shape[1] * x.shape[2]
        if len(axes) == 1:
            per_program = triton.cdiv(batch * tokens, wanted)
            per_program = max(1, min(triton.cdiv(per_program, block), _MOST_TILES)) * block
            self.parts = triton.cdiv(batch * tokens, per_program)
            # The coarse level in as many parts.
            coarse = triton.cdiv(batch * self.shapes[1][1] * self.shapes[1][2], max(1, self.parts))
            self.spans: tuple[int, ...] = (per_program, triton.cdiv(coarse, block) * block)
        else:
            images = min(triton.cdiv(batch, wanted), max(1, _MOST_TILES * block // tokens))
            self.parts = triton.cdiv(batch, images)
            self.spans = tuple(images * s[1] * s[2] for s in self.shapes)
        self.grid = (channel_blocks * self.parts,)

    def sizes(self) -> dict[str, Any]:
        return {
            "sizes": tuple((s[1], s[2]) for s in self.shapes),
            "spans": self.spans,
            "batch": self.batch,
            "C": self.C,
            "AXES": self.axes,
            "STAGES": len(self.axes),
            "LONG": self.x.numel() // self.C >= 2**31 - 2**16,
            **self.tile,
        }

    def scratch(self, needed: Sequence[bool]) -> tuple[Tensor, ...]:
        """float32 room for those of levels 1 to S - 1 that are needed, at their indices."""
        inner = [
            self.x.new_empty(shape if is_needed else (0,), dtype=torch.float32)
            for shape, is_needed in zip(self.shapes[1:-1], needed, strict=True)
        ]
        return (self.x, *inner)

    def scratch_strides(self) -> tuple[tuple[int, ...], ...]:
        return tuple((s[1] * s[2] * self.C, s[2] * self.C, self.C) for s in self.shapes[:-1])

    def partials(self, needed: bool) -> Tensor:
        shape = (self.parts, len(self.axes), 11, self.C) if needed else (0,)
        return self.x.new_empty(shape, dtype=torch.float32)

    def sum_partials(
        self, partials: Tensor, dweights: Sequence[Tensor], dpairs: Sequence[Tensor] = ()
    ) -> None:
        """Fills those of the weights' gradients that have room."""
        if partials.dim() == 1:
            return
        options = launch_options("ripple.sum_partials", self.C, self.x.dtype, self.x.device)
        sums, stages = 11 if dpairs else 9, len(self.axes)
        _sum_partials[(triton.cdiv(self.C, options["BLOCK_C"]), sums, stages)](
            partials,
            tuple(dweights),
            tuple(dpairs or dweights),
            self.parts,
            self.C,
            WEIGHTS=bits([x.dim() > 1 for x in dweights]),
            PAIRS=bits([x.dim() > 1 for x in dpairs]),
            STAGES=stages,
            **options,
        )


def implementation(op: str, grid: Tensor, *_: object) -> str:
    """The tiles and warps chosen for the grid's channels, dtype and device."""
    name = op.removeprefix("ripple_").removesuffix("_stages")
    keys = (_tuning_key(name, op.endswith("_stages"), backward) for backward in (False, True))
    chosen = (tuning.describe(key, grid.shape[-1], grid.dtype, grid.device) for key in keys)
    return f"triton: {'; '.join(chosen)}"


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Of the first three axes; zeros for a gradient that is not asked for."""
    return tuple(x.stride()[:3] if x.dim() > 1 else (0, 0, 0) for x in tensors)


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _run_pool(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    pyramid = _Pyramid("pool", x, axes, backward=False)
    levels = [x, *(empty_like(x, shape) for shape in pyramid.shapes[1:])]
    if x.numel():
        _pool[pyramid.grid](
            tuple(levels), _contiguous(weights), _strides(levels), **pyramid.sizes()
        )
    return levels[1:]


def _run_pool_backward(
    dlevels: Sequence[Tensor],
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    axes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    x = levels[0]
    pyramid = _Pyramid("pool", x, axes, backward=True)
    of_level, of_weight = pool_needs(wanted, len(axes))
    dx, *dweights = empty_gradients_of(wanted, [x], weights)
    gradients = [dx, *dlevels]
    partials = pyramid.partials(any(of_weight))
    if x.numel():
        _pool_backward[pyramid.grid](
            tuple(levels),
            tuple(gradients),
            pyramid.scratch(of_level[1:]),
            _contiguous(weights),
            partials,
            _strides(levels),
            _strides(gradients),
            pyramid.scratch_strides(),
            LEVELS=of_level,
            WEIGHTS=of_weight,
            **pyramid.sizes(),
        )
    pyramid.sum_partials(partials, dweights)
    return [dx, *dweights]


def _run_expand(
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
) -> Tensor:
    pyramid = _Pyramid("expand", levels[0], axes, backward=False)
    out = empty_like(levels[0])
    if out.numel():
        _expand[pyramid.grid](
            (*levels, z),
            _contiguous(weights),
            _contiguous(lateral_weights),
            out,
            _strides((*levels, z)),
            out.stride()[:3],
            **pyramid.sizes(),
        )
    return out


def _run_expand_backward(
    dout: Tensor,
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    stages = len(axes)
    pyramid = _Pyramid("expand", levels[0], axes, backward=True)
    needs = expand_needs(wanted, stages)
    gradients = empty_gradients_of(wanted, [z, *levels], [*weights, *lateral_weights])
    dz, dlevels = gradients[0], gradients[1 : 1 + stages]
    dweights, dlaterals = gradients[1 + stages : 1 + 2 * stages], gradients[1 + 2 * stages :]
    expanded = [any(needs.pairs[:s]) for s in range(stages)]
    partials = pyramid.partials(any(needs.pairs) or any(needs.laterals))
    if dout.numel():
        _expand_backward[pyramid.grid](
            dout,
            (*levels, z),
            (*dlevels, dz),
            pyramid.scratch(needs.coarse[:-1]),
            pyramid.scratch(expanded[1:]),
            _contiguous(weights),
            _contiguous(lateral_weights),
            partials,
            dout.stride()[:3],
            _strides((*levels, z)),
            _strides((*dlevels, dz)),
            pyramid.scratch_strides(),
            COARSE=needs.coarse,
            PAIRS=needs.pairs,
            LEVELS=needs.levels,
            LATERALS=needs.laterals,
            EXPANDED=tuple(expanded),
            **pyramid.sizes(),
        )
    pyramid.sum_partials(partials, dlaterals, dweights)
    return gradients


# ---- operators -----------------------------------------------------------------------------------


@operator("ripple_pool")
def _launch_pool(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return _run_pool(x, [weight], [axis])[0]


@operator("ripple_pool_backward")
def _launch_pool_backward(
    dout: Tensor, x: Tensor, weight: Tensor, axis: int, wanted: int
) -> tuple[Tensor, Tensor]:
    dx, dweight = _run_pool_backward([dout], [x], [weight], [axis], wanted)
    return dx, dweight


@operator("ripple_expand")
def _launch_expand(
    z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int
) -> Tensor:
    return _run_expand(z, [x], [weight], [lateral_weight], [axis])


@operator("ripple_expand_backward")
def _launch_expand_backward(
    dout: Tensor, z: Tensor, x: Tensor, weight: Tensor, lateral_weight: Tensor, axis: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _run_expand_backward(dout, z, [x], [weight], [lateral_weight], [axis], wanted)
    dz, dx, dweight, dlateral_weight = gradients
    return dz, dx, dweight, dlateral_weight


@operator("ripple_pool_stages")
def _launch_pool_stages(x: Tensor, weights: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    return _run_pool(x, weights, axes)


@operator("ripple_pool_stages_backward")
def _launch_pool_stages_backward(
    dlevels: Sequence[Tensor],
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    axes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    return _run_pool_backward(dlevels, levels, weights, axes, wanted)


@operator("ripple_expand_stages")
def _launch_expand_stages(
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
) -> Tensor:
    return _run_expand(z, levels, weights, lateral_weights, axes)


@operator("ripple_expand_stages_backward")
def _launch_expand_stages_backward(
    dout: Tensor,
    z: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    lateral_weights: Sequence[Tensor],
    axes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    return _run_expand_backward(dout, z, levels, weights, lateral_weights, axes, wanted)


ripple_pool, ripple_expand = attach("triton")
ripple_pool_stages, ripple_expand_stages = fused_where_it_fits(
    attach_stages("triton"), compose(ripple_pool, ripple_expand), multiprocessors
)
