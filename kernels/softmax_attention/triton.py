"""Softmax attention in Triton, after FlashAttention-2 (Dao, 2023): no N × M matrix in memory.

==================  =========================================  ================================
kernel              a program owns                             loops over
==================  =========================================  ================================
_forward            OWNED query rows of one head               keys and values, PASSED a time
_query_gradient     OWNED query rows of one head               keys and values
_key_value_gradient OWNED key rows of one key/value head       its query heads and their rows
==================  =========================================  ================================

Traffic, per head: the owned side is loaded, and results are stored, once; the other side once per
program, ⌈N / OWNED⌉ times forward, mostly out of the L2 cache, because neighbouring programs share
a head. Forward adds 4 bytes a query (lse), backward 20 (lse twice, δ written and read).
Tiles, warps and stages: kernels/triton/tuning.py.

The forward keeps a running maximum and sum per row (online softmax) in float32 and writes their
logarithm, lse = log Σ exp(s); inside, logarithms are to base 2. Backward recomputes the weights
from it, P = exp(s − lse):

    dV = Pᵀ dO              dS = P ∘ (dO Vᵀ − δ) with δ = rowsum(dO ∘ O)
    dQ = scale · dS K       dK = scale · dSᵀ Q

Each gradient has one owner that adds in a fixed order, so results repeat bit for bit. Scores are
masked only where keys end inside a tile: whole tiles have a loop without masks, what is left is one
tile after it. With a key mask (MASKED) all are; a masked key is zeros, has no weight, and its own
gradient, of which dK and dV make something, is dropped by the operators' functions. Past the last
query there is nothing to mask, since rows of zeros add nothing. Head dims 48 and 96 are padded to
64 and 128 columns of zeros.

Products of half-precision operands run on tensor cores; P and dS are rounded to the inputs' dtype
for them. Backward they are about 1/M, which is subnormal in float16 from M = 16,384 on, so for
float16 P, which is at most 1, is carried times 2¹⁵, and dS times a power of two that grows with M.
float32 products are FMA, summed a tile at a time: one long float32 sum would be off by 1e-6 from
4,000 rows on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_vit.kernels.layout import empty_like, unpack_qkv
from linear_vit.kernels.operators import empty_gradients, is_wanted
from linear_vit.kernels.softmax_attention.operators import attach
from linear_vit.kernels.triton import tuning
from linear_vit.kernels.triton.support import dot, launch_options, narrow, operator

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(head, first, row_stride, ROWS: tl.constexpr):
    """Pointers to rows [first, first + ROWS) of a head, in 64 bits: a tensor may pass 2³¹."""
    return head + (first + tl.arange(0, ROWS).to(tl.int64)) * row_stride


@triton.jit
def _load(rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """The rows in their own dtype; zero past column D and, where EDGE, from row ``valid`` on."""
    columns = tl.arange(0, BLOCK_D)
    pointers = rows[:, None] + columns[None, :]
    inside_rows = (tl.arange(0, rows.shape[0]) < valid)[:, None]
    if EDGE and BLOCK_D > D:
        return tl.load(pointers, mask=inside_rows & (columns < D)[None, :], other=0.0)
    elif EDGE:
        return tl.load(pointers, mask=inside_rows, other=0.0)
    elif BLOCK_D > D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(rows, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first ``valid`` rows of float32 x, rounded to the tensor's dtype."""
    columns = tl.arange(0, BLOCK_D)
    inside = (tl.arange(0, rows.shape[0]) < valid)[:, None] & (columns < D)[None, :]
    tl.store(rows[:, None] + columns[None, :], narrow(x, rows.dtype.element_ty), mask=inside)


@triton.jit
def _products(a, a_rows, a_valid, b, b_rows, b_valid, D: tl.constexpr, EDGE: tl.constexpr):
    """a bᵀ: owned rows against rows passed over.

    In float32 a thread holds its rows of both operands over the whole depth of a product: at
    D = 128 more than there are registers. So these go a few columns at a time, and the owned rows,
    which the compiler would keep, are read anew, from the cache, through volatile loads.
    """
    products = tl.zeros((a_rows.shape[0], b_rows.shape[0]), dtype=tl.float32)
    if a.dtype != tl.float32:
        return dot(a, tl.trans(b), products)
    DEPTH: tl.constexpr = 16
    a_inside = (tl.arange(0, a_rows.shape[0]) < a_valid)[:, None]
    for start in tl.static_range(0, D, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        part = tl.load(a_rows[:, None] + columns[None, :], mask=a_inside, other=0.0, volatile=True)
        other = _load(b_rows + start, b_valid, DEPTH, DEPTH, EDGE)
        products = dot(part, tl.trans(other), products)
    return products


@triton.jit
def _add_product(total, weights, x):
    """total + weights @ x; float32 weights are rounded to x's dtype for the tensor cores."""
    if x.dtype == tl.float32:
        return total + dot(weights, x, tl.zeros_like(total))
    else:
        return dot(narrow(weights, x.dtype), x, total)


# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def _there(mask_rows, valid, MASKED: tl.constexpr):
    """Which rows of a tile of keys are there: of the first ``valid``, those that are not masked."""
    inside = tl.arange(0, mask_rows.shape[0]) < valid
    if MASKED:
        return inside & (tl.load(mask_rows, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def _attend(
    q,
    q_rows,
    q_valid,
    k_rows,
    v_rows,
    mask_rows,
    valid,
    scale,
    maximum,
    total,
    accumulator,
    D: tl.constexpr,
    EDGE: tl.constexpr,
    MASKED: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """One tile of keys and values. |scale| takes scores to base-2 logarithms."""
    BLOCK_D: tl.constexpr = q.shape[1]
    k = _load(k_rows, valid, D, BLOCK_D, EDGE)
    scores = _products(q, q_rows, q_valid, k, k_rows, valid, D, EDGE)
    if NEGATIVE:  # the largest score is to become the largest logarithm
        scores = -scores
    # The maximum may drop a NaN: its exponential is one again, and reaches the sum and the result.
    if EDGE or MASKED:
        inside = _there(mask_rows, valid, MASKED)[None, :]
        scores = tl.where(inside, scores * scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
    else:
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, axis=1)
    v = _load(v_rows, valid, D, BLOCK_D, EDGE)
    accumulator = _add_product(accumulator * correction[:, None], weights, v)
    return new_maximum, total, accumulator


@triton.jit
def _forward(
    q_pointer,
    k_pointer,
    v_pointer,
    mask_pointer,  # (B, M), contiguous, a byte each; any without MASKED
    out_pointer,
    lse_pointer,  # (B, H, N) float32
    num_queries,
    num_keys,
    num_programs,  # along the query rows of one head
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    scale,  # without its sign
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWNED: tl.constexpr,
    PASSED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    first = part * OWNED
    valid = tl.minimum(num_queries - first, OWNED)

    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    k_head = k_pointer + b * k_stride_b + h // GROUP * k_stride_h
    v_head = v_pointer + b * v_stride_b + h // GROUP * v_stride_h
    q_rows = _rows(q_head, first, q_stride_n, OWNED)
    q = _load(q_rows, valid, D, BLOCK_D, True)
    scale_log2 = scale * _LOG2_E
    k_rows = _rows(k_head, 0, k_stride_n, PASSED)
    v_rows = _rows(v_head, 0, v_stride_n, PASSED)
    mask_rows = _rows(mask_pointer + b * num_keys, 0, 1, PASSED) if MASKED else k_rows
    # A tile without a key has a maximum of -inf, and -inf from -inf is no number.
    least = -1e38 if MASKED else float("-inf")
    maximum = tl.full((OWNED,), least, dtype=tl.float32)
    total = tl.zeros((OWNED,), dtype=tl.float32)
    accumulator = tl.zeros((OWNED, BLOCK_D), dtype=tl.float32)
    for _ in range(num_keys // PASSED):
        maximum, total, accumulator = _attend(
            q, q_rows, valid, k_rows, v_rows, mask_rows, PASSED, scale_log2,
            maximum, total, accumulator, D, False, MASKED, NEGATIVE,
        )  # fmt: skip
        k_rows += tl.cast(PASSED, tl.int64) * k_stride_n
        v_rows += tl.cast(PASSED, tl.int64) * v_stride_n
        if MASKED:
            mask_rows += PASSED
    if num_keys % PASSED != 0:
        maximum, total, accumulator = _attend(
            q, q_rows, valid, k_rows, v_rows, mask_rows, num_keys % PASSED, scale_log2,
            maximum, total, accumulator, D, True, MASKED, NEGATIVE,
        )  # fmt: skip

    divisor = tl.where(total == 0, 1.0, total)  # no key at all: 0
    out_head = out_pointer + b * out_stride_b + h * out_stride_h
    out_rows = _rows(out_head, first, out_stride_n, OWNED)
    _store(out_rows, valid, accumulator / divisor[:, None], D, BLOCK_D)
    lse = (maximum + tl.log2(divisor)) / _LOG2_E
    if MASKED:
        lse = tl.where(total == 0, float("-inf"), lse)
    rows = tl.arange(0, OWNED)
    tl.store(lse_pointer + head * num_queries + first + rows, lse, mask=rows < valid)


# ---- backward ------------------------------------------------------------------------------------


@triton.jit
def _add_query_gradient(
    q,
    dout,
    q_rows,
    dout_rows,
    q_valid,
    lse,
    delta,
    k_rows,
    v_rows,
    mask_rows,
    valid,
    scale_log2,
    dscore_scale,
    dq,
    D: tl.constexpr,
    EDGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq + dS k for one tile of keys and values, dS times ``dscore_scale``."""
    BLOCK_D: tl.constexpr = q.shape[1]
    k = _load(k_rows, valid, D, BLOCK_D, EDGE)
    v = _load(v_rows, valid, D, BLOCK_D, EDGE)
    scores = _products(q, q_rows, q_valid, k, k_rows, valid, D, EDGE)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if EDGE or MASKED:
        weights = tl.where(_there(mask_rows, valid, MASKED)[None, :], weights, 0.0)
    dweights = _products(dout, dout_rows, q_valid, v, v_rows, valid, D, EDGE)
    dscores = weights * (dweights * dscore_scale - delta[:, None])
    return _add_product(dq, dscores, k)


@triton.jit
def _query_gradient(
    dout_pointer,
    q_pointer,
    k_pointer,
    v_pointer,
    mask_pointer,  # as above
    out_pointer,
    lse_pointer,  # (B, H, N) float32
    delta_pointer,  # (B, H, N) float32, written here: rowsum(dO ∘ O)
    dq_pointer,
    num_queries,
    num_keys,
    num_programs,  # along the query rows of one head
    heads,
    dout_stride_b,
    dout_stride_h,
    dout_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
    scale,
    dscore_scale,  # of dS as an operand, a power of two
    DQ: tl.constexpr,  # False: delta alone
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWNED: tl.constexpr,
    PASSED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    first = part * OWNED
    valid = tl.minimum(num_queries - first, OWNED)
    rows = tl.arange(0, OWNED)

    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    k_head = k_pointer + b * k_stride_b + h // GROUP * k_stride_h
    v_head = v_pointer + b * v_stride_b + h // GROUP * v_stride_h
    out_head = out_pointer + b * out_stride_b + h * out_stride_h
    dout_head = dout_pointer + b * dout_stride_b + h * dout_stride_h
    q_rows = _rows(q_head, first, q_stride_n, OWNED)
    dout_rows = _rows(dout_head, first, dout_stride_n, OWNED)
    out_rows = _rows(out_head, first, out_stride_n, OWNED)
    q = _load(q_rows, valid, D, BLOCK_D, True)
    dout = _load(dout_rows, valid, D, BLOCK_D, True)
    out = _load(out_rows, valid, D, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    row0 = head * num_queries + first
    tl.store(delta_pointer + row0 + rows, delta, mask=rows < valid)
    # Rows past the end get weights of 0.
    lse = tl.load(lse_pointer + row0 + rows, mask=rows < valid, other=float("inf")) * _LOG2_E

    k_rows = _rows(k_head, 0, k_stride_n, PASSED)
    v_rows = _rows(v_head, 0, v_stride_n, PASSED)
    mask_rows = _rows(mask_pointer + b * num_keys, 0, 1, PASSED) if MASKED else k_rows
    dq = tl.zeros((OWNED, BLOCK_D), dtype=tl.float32)
    delta *= dscore_scale
    scale_log2 = scale * _LOG2_E
    for _ in range(num_keys // PASSED if DQ else 0):
        dq = _add_query_gradient(
            q, dout, q_rows, dout_rows, valid, lse, delta, k_rows, v_rows, mask_rows, PASSED,
            scale_log2, dscore_scale, dq, D, False, MASKED,
        )  # fmt: skip
        k_rows += tl.cast(PASSED, tl.int64) * k_stride_n
        v_rows += tl.cast(PASSED, tl.int64) * v_stride_n
        if MASKED:
            mask_rows += PASSED
    if DQ and num_keys % PASSED != 0:
        dq = _add_query_gradient(
            q, dout, q_rows, dout_rows, valid, lse, delta, k_rows, v_rows, mask_rows,
            num_keys % PASSED, scale_log2, dscore_scale, dq, D, True, MASKED,
        )  # fmt: skip
    if DQ:
        dq_head = dq_pointer + b * dq_stride_b + h * dq_stride_h
        dq_rows = _rows(dq_head, first, dq_stride_n, OWNED)
        _store(dq_rows, valid, dq * (scale / dscore_scale), D, BLOCK_D)


@triton.jit
def _key_value_gradient(
    dout_pointer,
    q_pointer,
    k_pointer,
    v_pointer,
    lse_pointer,  # (B, H, N) float32
    delta_pointer,  # (B, H, N) float32
    dk_pointer,
    dv_pointer,
    num_queries,
    num_keys,
    num_programs,  # along the key rows of one key/value head
    kv_heads,
    dout_stride_b,
    dout_stride_h,
    dout_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    scale,
    dscore_scale,  # of dS as an operand, a power of two
    DK: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWNED: tl.constexpr,
    PASSED: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, hk = head // kv_heads, head % kv_heads
    first = part * OWNED
    valid = tl.minimum(num_keys - first, OWNED)

    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    k_rows = _rows(k_head, first, k_stride_n, OWNED)
    v_rows = _rows(v_head, first, v_stride_n, OWNED)
    k = _load(k_rows, valid, D, BLOCK_D, True)
    v = _load(v_rows, valid, D, BLOCK_D, True)
    # P ≤ 1, so that 2¹⁵ P fits float16; the other dtypes have the exponents.
    SHIFT: tl.constexpr = 15.0 if k_pointer.dtype.element_ty == tl.float16 else 0.0
    dk = tl.zeros((OWNED, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((OWNED, BLOCK_D), dtype=tl.float32)
    scale_log2 = scale * _LOG2_E
    # P and dS, as operands, times 2^SHIFT and dscore_scale.
    factor = dscore_scale * 2.0**-SHIFT
    rows = tl.arange(0, PASSED)
    tiles = tl.cdiv(num_queries, PASSED)
    # One loop over the tiles of all heads: what it carries stays in registers, and the next head's
    # first tile is on its way while this head's last one is used.
    for tile in range(GROUP * tiles):
        g = tile // tiles
        h = hk * GROUP + g
        row0 = (tile - g * tiles).to(tl.int64) * PASSED
        inside = tl.minimum(num_queries - row0, PASSED)
        q_rows = _rows(q_pointer + b * q_stride_b + h * q_stride_h, row0, q_stride_n, PASSED)
        dout_head = dout_pointer + b * dout_stride_b + h * dout_stride_h
        dout_rows = _rows(dout_head, row0, dout_stride_n, PASSED)
        at = (b * kv_heads * GROUP + h) * num_queries + row0 + rows
        # Past the end q and dout are 0, and add nothing.
        q = _load(q_rows, inside, D, BLOCK_D, True)
        dout = _load(dout_rows, inside, D, BLOCK_D, True)
        lse = tl.load(lse_pointer + at, mask=rows < inside, other=0.0)
        scores = _products(k, k_rows, valid, q, q_rows, inside, D, True)
        weights = tl.exp2(scores * scale_log2 - (lse * _LOG2_E - SHIFT)[None, :])
        if DV:
            dv = _add_product(dv, weights, dout)
        if DK:
            delta = tl.load(delta_pointer + at, mask=rows < inside, other=0.0)
            dweights = _products(v, v_rows, valid, dout, dout_rows, inside, D, True)
            dscores = weights * (dweights * factor - (delta * factor)[None, :])
            dk = _add_product(dk, dscores, q)
    if DK:
        dk_head = dk_pointer + b * dk_stride_b + hk * dk_stride_h
        dk_rows = _rows(dk_head, first, dk_stride_n, OWNED)
        _store(dk_rows, valid, dk * (scale / dscore_scale), D, BLOCK_D)
    if DV:
        dv_head = dv_pointer + b * dv_stride_b + hk * dv_stride_h
        dv_rows = _rows(dv_head, first, dv_stride_n, OWNED)
        _store(dv_rows, valid, dv * 2.0**-SHIFT, D, BLOCK_D)


# ---- launchers -----------------------------------------------------------------------------------


def _options(
    kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """A kernel's constants that the head dim decides, and what the tuning table has for it."""
    chosen = launch_options(f"softmax_attention.{kernel}", head_dim, dtype, device)
    return {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)} | chosen


def _dscore_scale(dtype: torch.dtype, num_keys: int) -> float:
    """The power of two that dS is an operand times: dS, about 1/M, must not underflow float16.

    It grows as slowly as accuracy allows: what the inputs' scale leaves to overflow is not known.
    """
    return 2.0 ** max(0, num_keys.bit_length() - 11) if dtype == torch.float16 else 1.0


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, scale: float
) -> Tensor:
    """Fill ``out``, (B, H, N, D); returns lse."""
    batch, heads, num_queries, head_dim = q.shape
    lse = q.new_empty((batch, heads, num_queries), dtype=torch.float32)
    options = _options("forward", head_dim, q.dtype, q.device)
    parts = triton.cdiv(num_queries, options["OWNED"])
    if out.numel():
        _forward[(parts * batch * heads,)](
            q,
            k,
            v,
            _bytes(key_mask, k),
            out,
            lse,
            num_queries,
            k.shape[2],
            parts,
            heads,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            abs(scale),
            GROUP=heads // k.shape[1],
            MASKED=key_mask is not None,
            NEGATIVE=scale < 0,
            **options,
        )
    return lse


def _bytes(key_mask: Tensor | None, k: Tensor) -> Tensor:
    """The mask as the kernels read it; k, of which they read nothing, where there is none."""
    return k if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    wanted: int,
) -> None:
    """Fill those of ``dq``, ``dk`` and ``dv`` that are wanted."""
    needs_dq, needs_dk, needs_dv = (is_wanted(wanted, i) for i in range(3))
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    scales = scale, _dscore_scale(q.dtype, num_keys)
    if q.numel() and (needs_dq or needs_dk):  # delta is of dk
        to = dq if needs_dq else q
        options = _options("query_gradient", head_dim, q.dtype, q.device)
        parts = triton.cdiv(num_queries, options["OWNED"])
        _query_gradient[(parts * batch * heads,)](
            dout,
            q,
            k,
            v,
            _bytes(key_mask, k),
            out,
            lse,
            delta,
            to,
            num_queries,
            num_keys,
            parts,
            heads,
            *dout.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *to.stride()[:3],
            *scales,
            DQ=needs_dq,
            GROUP=heads // kv_heads,
            MASKED=key_mask is not None,
            **options,
        )
    if k.numel() and (needs_dk or needs_dv):
        to_dk, to_dv = dk if needs_dk else k, dv if needs_dv else v
        options = _options("key_value_gradient", head_dim, q.dtype, q.device)
        parts = triton.cdiv(num_keys, options["OWNED"])
        _key_value_gradient[(parts * batch * kv_heads,)](
            dout,
            q,
            k,
            v,
            lse,
            delta,
            to_dk,
            to_dv,
            num_queries,
            num_keys,
            parts,
            kv_heads,
            *dout.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *to_dk.stride()[:3],
            *to_dv.stride()[:3],
            *scales,
            DK=needs_dk,
            DV=needs_dv,
            GROUP=heads // kv_heads,
            **options,
        )


@operator("softmax_attention")
def _operator(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out = empty_like(q)
    return out, _launch_forward(q, k, v, key_mask, out, scale)


@operator("softmax_attention_backward")
def _backward_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = empty_gradients(wanted, q, k, v)
    _launch_backward(dout, q, k, v, key_mask, out, lse, dq, dk, dv, scale, wanted)
    return dq, dk, dv


@operator("softmax_attention_packed")
def _packed_operator(qkv: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out = empty_like(qkv[:, :, 0])
    return out, _launch_forward(*unpack_qkv(qkv), key_mask, out.transpose(1, 2), scale)


@operator("softmax_attention_packed_backward")
def _packed_backward_operator(
    dout: Tensor, qkv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    dqkv = empty_like(qkv)
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    _launch_backward(dout, *unpack_qkv(qkv), key_mask, out, lse, *unpack_qkv(dqkv), scale, 0b111)
    return dqkv


softmax_attention, softmax_attention_packed = attach("triton")


def implementation(op: str, q: Tensor, *_: object) -> str:
    """The tiles, warps and stages chosen for q's head dim, dtype and device."""
    del op
    kernels = ("forward", "query_gradient", "key_value_gradient")
    key = (q.shape[-1], q.dtype, q.device)
    chosen = (tuning.describe(f"softmax_attention.{kernel}", *key) for kernel in kernels)
    return f"triton: {'; '.join(chosen)}"
