"""Linear attention in Triton: every token's q, k, v, dout read once, out, dq, dk, dv written once.

Few key tokens (``_takes_one_launch``): one program a key/value head, one launch a pass.

=======================  ==========================================================================
_short_forward           S and z of the head in registers, then out of its query heads
_short_backward          S (kept, or worked out again), dq and dS of its queries, then dk and dv
=======================  ==========================================================================

A backward that works S out again, up to RECOMPUTE_TOKENS, reads k and v twice, the second time from
cache: as many bytes as S would be. Not even one tile of them can outlive the loop over queries in
registers: at D = 64 that spilled on sm_90a, whatever the number of stages.

Many: the tokens of a head are split over programs, so that one head of one sequence fills the GPU.

=======================  ==================================  ======================================
kernel                   reads once                          writes once
=======================  ==================================  ======================================
_state                   k, v                                S, z partials, one a split
_reduce                  partials                            their sums, in a fixed order
_apply                   q                                   out
_query_gradient          q, dout                             dq; dS, dz partials; ``_reduce`` again
_key_value_gradient      k, v                                dk, dv
=======================  ==================================  ======================================

Tiles: BLOCK_N tokens x BLOCK_D features (D padded to a power of two), φ in registers, S or dS as a
tensor-core operand in shared memory for the whole of a program's tokens. Grouped queries are looped
over by the program that owns their key/value head, in one loop so that loads stay in flight from
one head to the next. Where registers do not reach for that (wide heads, float32, mma.sync with its
operands in registers: the rules of ``triton/tuning.py`` that say RESIDENT=0), the kernels of
``triton_streamed`` read S a few features at a time instead, and tokens more than once: backward at
D = 96 and 128, and on sm_80 and sm_86 from D = 48; float32 from D = 48. How often, ``python -m
bench traffic`` counts; CUDA C++ (``cuda.cu``) reads them once in half precision at every D.

Numerics. Sums are float32, of tiles first and then over tiles and splits: a plain float32 sum of n
terms is off by about 3e-8·√(n/2), past 1e-6 from 4,000 tokens on. φ, q, k, v and dout are exact
tensor-core operands. S is rounded once for them, but only after centring: with
m = Σ_f S_f / Σ_f z_f, S' = S − z mᵀ is small where S cancels (v with a mean), and

    out = φ(q)ᵀS'/E + m·φ(q)·z/E        a = S'g + z (m·g)
    dφ(q) = S'g/E + w·z                 w = (eps·(m·g) − φ(q)·S'g)/E²
    dz = Σ φ(q)/E (w E) − dS m          (exactly, with the φ(q)/E and dS that were summed)

φ(q)/E is rounded once for dS at D = 64 and above, so that g stays where it was loaded; dz is the
sum over the same rounded numbers, for in dφ(k) = dS v + dz they cancel. float16 has too few powers
of two for it, and takes each feature's share of E instead, φ_f(q) z_f/E ≤ 1, which 1/z_f makes up
for at the end (``_least_weight``). A row that meets none has no part in any sum, whatever eps is.
φ(q)·z and m·g are products of tensor cores, too, z and m as sums of three numbers each, as exact as
in float32. dS is carried as two halves where it meets v: dφ(k) = dS v + dz cancels. One rounding
suffices for dv = dSᵀ φ(k): φ(k) has one sign, so that it averages out over the features. Not so
over few of them, where φ(q)/E's and dv's own are seen, too: below D = 64 φ(q)/E is two halves. That
is about 8·D² FLOP a query token (12·D² below D = 64) against 6·D bytes, and 12·D² a key token
against 8·D: at no D more a byte than 96, the second's at D = 64.

What binds are instructions, not bytes (``python -m bench static`` counts them). So products stay
in the layout that they come in, two numbers are an instruction where Triton has none for that
(``halves``), and nothing is hoisted out of the loop over queries: no register is left for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_vit.kernels.layout import empty_like, unpack_qkv
from linear_vit.kernels.linear_attention import triton_streamed as streamed
from linear_vit.kernels.linear_attention.operators import attach, empty_state
from linear_vit.kernels.operators import empty_gradients, is_wanted
from linear_vit.kernels.triton import tuning
from linear_vit.kernels.triton.support import (
    INTERPRETING,
    balanced_splits,
    choose,
    dot,
    halves,
    inverse_normaliser,
    launch_options,
    load_rows,
    multiprocessors,
    narrow,
    narrow_finite,
    negative_part,
    operator,
    positive_part,
    power_of_two,
    store_tile,
    where_nonzero,
)

# Up to this many key tokens the backward works S out again rather than reading it: 33 KB a head at
# D = 64, as much as the k and v of 128 half-precision tokens, which the second time come from L2.
RECOMPUTE_TOKENS = 256

# Float32 vectors as operands of tensor cores: a sum of three half-precision numbers is as exact. In
# float16, whose range is small, they are in one of five windows of WINDOW powers of two.
TERMS = tl.constexpr(16)
WINDOW = tl.constexpr(13)

# ---- pieces, inlined into the kernels ------------------------------------------------------------


@triton.jit
def _sum_state(
    k_head,
    v_head,
    k_stride_n,
    v_stride_n,
    begin,
    end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ φ(k) vᵀ, transposed: (column of v, feature), of either sign; and Σ φ(k).

    Transposed, v goes to the tensor core as it lies in memory, and only φ(k) through registers.
    """
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = k_head.dtype.element_ty
    nothing = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    S_positive = nothing
    S_negative = nothing
    # One sum a row of the tile, added up at the end: an addition a tile and no shuffles.
    z_positive = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    z_negative = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_rows(k_head, tokens, end, k_stride_n, columns, D).to(tl.float32)
        v = tl.trans(load_rows(v_head, tokens, end, v_stride_n, columns, D))
        positive, negative = positive_part(k), negative_part(k)
        S_positive += dot(v, narrow(positive, operand), nothing)
        S_negative += dot(v, narrow(negative, operand), nothing)
        z_positive += positive
        z_negative += negative
    return S_positive, S_negative, tl.sum(z_positive, 0), tl.sum(z_negative, 0)


@triton.jit
def _load_pair(matrix, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The halves of a (2D, D) float32 matrix."""
    columns = tl.arange(0, BLOCK_D)
    positive = load_rows(matrix, columns, D, D, columns, D)
    return positive, load_rows(matrix + D * D, columns, D, D, columns, D)


@triton.jit
def _load_vectors(vector, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The halves of 2D float32 numbers."""
    columns = tl.arange(0, BLOCK_D)
    positive = tl.load(vector + columns, mask=columns < D, other=0.0)
    return positive, tl.load(vector + D + columns, mask=columns < D, other=0.0)


@triton.jit
def _store_state(
    matrix, vector, S_positive, S_negative, z_positive, z_negative, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The transposed halves of S to (2D, D), and z."""
    columns = tl.arange(0, BLOCK_D)
    store_tile(matrix, columns, D, D, columns, D, tl.trans(S_positive))
    store_tile(matrix + D * D, columns, D, D, columns, D, tl.trans(S_negative))
    tl.store(vector + columns, z_positive, mask=columns < D)
    tl.store(vector + D + columns, z_negative, mask=columns < D)


@triton.jit
def _centre(S_positive, S_negative, z_positive, z_negative, operand: tl.constexpr):
    """S' = S − z mᵀ as operands, (feature, column), the second negated; m; and the unscale."""
    total = tl.sum(z_positive + z_negative, 0)
    m = (tl.sum(S_positive, 0) + tl.sum(S_negative, 0)) / tl.where(total == 0, 1.0, total)
    S_positive -= z_positive[:, None] * m[None, :]
    S_negative -= z_negative[:, None] * m[None, :]
    scale, unscale = 1.0, 1.0
    if operand == tl.float16:
        size = tl.maximum(tl.abs(S_positive), tl.abs(S_negative))
        scale, unscale = power_of_two(tl.max(tl.max(size, 1), 0))
    return narrow(S_positive * scale, operand), narrow(S_negative * -scale, operand), m, unscale


@triton.jit
def _term(x, scale, column, WINDOWS: tl.constexpr, operand: tl.constexpr):
    """Columns of x: the ``column % 3``th term of what is in the window ``column // 3``, else 0."""
    scaled = x[:, None] * scale
    if WINDOWS > 1:
        size = tl.abs(scaled)
        inside = (size >= 32768 / 2**WINDOW) | (column // 3 == WINDOWS - 1)[None, :]
        scaled = tl.where(inside & ((size < 32768) | (column < 3)[None, :]), scaled, 0.0)
    high = narrow(scaled, operand)
    rest = scaled - high.to(tl.float32)
    middle = narrow(rest, operand)
    low = narrow(rest - middle.to(tl.float32), operand)
    place = (column % 3)[None, :]
    term = tl.where(place == 0, high, tl.where(place == 1, middle, low))
    return tl.where((column < 3 * WINDOWS)[None, :], term, tl.zeros_like(term))


@triton.jit
def _terms(x, operand: tl.constexpr):
    """A vector as an operand (BLOCK_D, TERMS): the sum of a product's columns, and a factor."""
    up, down = 1.0, 1.0
    if operand == tl.float16:
        up, down = power_of_two(tl.max(tl.abs(x), 0))
    return _term(x, up, tl.arange(0, TERMS), 1, operand), down


@triton.jit
def _normaliser_terms(x, y, operand: tl.constexpr):
    """Two vectors as operands (BLOCK_D, TERMS), and weights: see ``_times_normaliser``."""
    column = tl.arange(0, TERMS)
    weights = 1.0
    if operand == tl.bfloat16:
        x, y = _term(x, 1.0, column, 1, operand), _term(y, 1.0, column, 1, operand)
    if operand == tl.float16:
        windows: tl.constexpr = TERMS // 3
        largest = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 0)
        up, down = power_of_two(tl.maximum(largest, 2.0**-40))  # or a window's would overflow
        exponent = WINDOW * (column // 3)
        scale = up * ((127 + exponent) << 23).to(tl.float32, bitcast=True)[None, :]
        weights = down * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]
        x, y = _term(x, scale, column, windows, operand), _term(y, scale, column, windows, operand)
    return x, y, weights


@triton.jit
def _times_normaliser(a, x, b, y, weights, BLOCK_N: tl.constexpr):
    """a·x + b·y of every row, as exact as in float32; x, y, weights of ``_normaliser_terms``."""
    if a.dtype == tl.float32:
        met = tl.sum(a * x[None, :] + b * y[None, :], 1)
    else:
        terms = dot(a, x, tl.zeros((BLOCK_N, TERMS), dtype=tl.float32))
        met = tl.sum(dot(b, y, terms) * weights, 1)
    return met


@triton.jit
def _apply_tokens(
    q_head,
    out_head,
    q_stride_n,
    out_stride_n,
    tokens,
    end,
    S_positive,  # of _centre
    S_negative,
    z_positive,  # of _normaliser_terms
    z_negative,  # negated
    z_weights,
    m,
    unscale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out of one tile of queries."""
    columns = tl.arange(0, BLOCK_D)
    q = load_rows(q_head, tokens, end, q_stride_n, columns, D)
    positive, negative = halves(q)
    denominator = _times_normaliser(
        positive, z_positive, negative, z_negative, z_weights, BLOCK_N
    )  # fmt: skip
    numerator = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    numerator = dot(positive, S_positive, numerator)
    numerator = dot(negative, S_negative, numerator)
    inverse = inverse_normaliser(denominator, eps)
    out = numerator * (inverse * unscale)[:, None] + (denominator * inverse)[:, None] * m[None, :]
    store_tile(out_head, tokens, end, out_stride_n, columns, D, out)


@triton.jit
def _least_weight(z_positive, z_negative, eps, D: tl.constexpr):
    """The least z that float16's φ(q)/E is multiplied by, and 2¹⁴ (see ``_differentiate_queries``).

    With z itself φ_f(q) z_f/E ≤ 1 fits, for E has no negative term, and with eps/2¹⁵, for E ≥ eps.
    But what few keys have would be flushed beside what all have: a query that meets next to nothing
    else is limited at 2¹⁸ times its usual gradient instead.
    """
    usual = tl.sum(z_positive + z_negative, 0) / (2 * D)
    least = tl.maximum(tl.maximum(usual * 2.0**-16, eps * 2.0**-15), 2.0**-100)
    return least.to(tl.float32)  # in the interpreter eps may be more


@triton.jit
def _place(index, rows, count, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of ``count`` tokens of each head: its head, and a token, rows from there, their end.

    Of one head the token moves on and of several the rows do: the fewer registers, each time.
    """
    index += count * 0  # a tensor, in the interpreter too
    head, start = (index % GROUP).to(tl.int64), index // GROUP * BLOCK_N
    if GROUP == 1:
        token, end = start.to(tl.int64), count - start
    else:
        token, rows, end = head * 0, rows + start, count
    return head, token, rows, end


@triton.jit
def _add_pairs(a, b, c, d):
    """Of ``tl.reduce``."""
    return a + c, b + d


@triton.jit
def _row_sums(x, y):
    """Of both at once, in one layout: that of products, if one of them is made of one."""
    if INTERPRETING:  # where such a reduction takes ten times as long
        first, second = tl.sum(x, 1), tl.sum(y, 1)
    else:
        first, second = tl.reduce((x, y), 1, _add_pairs)
    return first, second


@triton.jit
def _eight_apart(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows in two parts, of those eight apart: both are one thread's, of a product."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS // 16, 2, 8, COLUMNS)), (0, 2, 3, 1)))


@triton.jit
def _differentiate_queries(
    dout_kv_head,  # of the first query head of the group
    q_kv_head,
    dq_kv_head,
    dout_stride_h,
    dout_stride_n,
    q_stride_h,
    q_stride_n,
    dq_stride_h,
    dq_stride_n,
    begin,
    end,
    S_positive,  # of _centre
    S_negative,
    z_positive,
    z_negative,
    m,
    unscale,
    eps,
    least,  # of _least_weight
    DQ: tl.constexpr,
    DS: tl.constexpr,
    DZ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of the tokens given, of every query head of a group; for ``_finish``, dS and dz.

    dS is transposed. Where DS (and DZ) is false, zeros; DZ is only where DS is.
    """
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = q_kv_head.dtype.element_ty
    no_rows = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dS_positive = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    dS_negative = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    dz_positive = tl.zeros((BLOCK_N // 16, 8, BLOCK_D), dtype=tl.float32)
    dz_negative = tl.zeros((BLOCK_N // 16, 8, BLOCK_D), dtype=tl.float32)
    M, m_unscale = _terms(m, operand)
    # Out here, or the operands would be written to shared memory again for every tile.
    S_positive, S_negative = tl.trans(S_positive), tl.trans(S_negative)
    z_minus = -z_negative
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    count = tl.maximum(end - begin, 0).to(tl.int32)  # of a split: 65,536 at most
    q_split = q_kv_head + begin * q_stride_n
    dout_split = dout_kv_head + begin * dout_stride_n
    dq_split = dq_kv_head + begin * dq_stride_n
    # Hoisted addresses and masks would take registers that the sums need.
    for index in tl.range(0, GROUP * tl.cdiv(count, BLOCK_N), disable_licm=True):
        head, token, tokens, left = _place(index, rows, count, GROUP, BLOCK_N)
        q_tile = q_split + head * q_stride_h + token * q_stride_n
        dout_tile = dout_split + head * dout_stride_h + token * dout_stride_n
        q_half = load_rows(q_tile, tokens, left, q_stride_n, columns, D)
        g = load_rows(dout_tile, tokens, left, dout_stride_n, columns, D)
        q = q_half.to(tl.float32)
        if DQ or DZ:
            if operand == tl.float32:
                gm = tl.sum(g * m[None, :], 1)
            else:
                terms = dot(g, M, tl.zeros((BLOCK_N, TERMS), dtype=tl.float32))
                gm = tl.sum(terms, 1) * m_unscale
            a_positive = dot(g, S_positive, no_rows)
            a_negative = dot(g, S_negative, no_rows)
            # q's sign picks the half of φ that is not zero: φ(q)·a = Σ q a and φ(q)·z = Σ q z,
            # with the other half's signs turned.
            z, a = choose(q, z_positive[None, :], z_minus[None, :], a_positive, a_negative)
            E, w = _row_sums(q * z, q * a)
            inverse = inverse_normaliser(E, eps)
            u = (eps * gm - w * unscale) * inverse
            w = u * inverse
        else:
            z = tl.where(q > 0, z_positive[None, :], z_minus[None, :])
            E, _ = _row_sums(q * z, q * z)  # the same sum
            inverse = inverse_normaliser(E, eps)
        # Chosen once more: kept, it would take the registers of its own tile.
        z = tl.where(q > 0, z_positive[None, :], z_minus[None, :])
        if DQ:
            dq = narrow(a * (inverse * unscale)[:, None] + w[:, None] * z, operand)
            dq = where_nonzero(q_half, dq)
            dq_tile = dq_split + head * dq_stride_h + token * dq_stride_n
            store_tile(dq_tile, tokens, left, dq_stride_n, columns, D, dq)
        if DS:
            if operand == tl.float16:
                row = tl.minimum(inverse * 2.0**14, 3e38, propagate_nan=tl.PropagateNan.ALL)
                x = q * tl.maximum(tl.abs(z), least) * row[:, None]
                high = narrow_finite(x)
            else:
                x = q * inverse[:, None]
                high = narrow(x, operand)
            g_t = tl.trans(g)
            positive, negative = halves(high)
            dS_positive = dot(g_t, positive, dS_positive)
            dS_negative = dot(g_t, negative, dS_negative)
            # Of what dS is of, roundings included: in dk they cancel.
            of_positive, of_negative = positive.to(tl.float32), negative.to(tl.float32)
            if D < 64 and operand != tl.float32:
                low = x - high.to(tl.float32)
                low_positive, low_negative = tl.where(q > 0, low, 0.0), tl.where(q < 0, low, 0.0)
                dS_positive = dot(g_t, narrow(low_positive, operand), dS_positive)
                dS_negative = dot(g_t, narrow(low_negative, operand), dS_negative)
                of_positive += low_positive
                of_negative += low_negative
            if DZ:
                u_tile = tl.broadcast_to(u[:, None], (BLOCK_N, BLOCK_D))
                u_first, u_second = _eight_apart(u_tile, BLOCK_N, BLOCK_D)
                first, second = _eight_apart(of_positive, BLOCK_N, BLOCK_D)
                dz_positive += first * u_first
                dz_positive += second * u_second
                first, second = _eight_apart(of_negative, BLOCK_N, BLOCK_D)
                dz_negative += first * u_first
                dz_negative += second * u_second
    dz_positive, dz_negative = tl.sum(tl.sum(dz_positive, 0), 0), tl.sum(tl.sum(dz_negative, 0), 0)
    return dS_positive, dS_negative, dz_positive, dz_negative


@triton.jit
def _finish(
    dS_positive,  # these four of _differentiate_queries
    dS_negative,
    dz_positive,
    dz_negative,
    z_positive,
    z_negative,
    m,
    least,
    operand: tl.constexpr,
):
    """dS and dz themselves."""
    dS_negative, dz_negative = -dS_negative, -dz_negative
    if operand == tl.float16:
        of_positive = 2.0**-14 / tl.maximum(tl.abs(z_positive), least)
        of_negative = 2.0**-14 / tl.maximum(tl.abs(z_negative), least)
        dS_positive *= of_positive[None, :]
        dS_negative *= of_negative[None, :]
        dz_positive *= of_positive
        dz_negative *= of_negative
    dz_positive -= tl.sum(dS_positive * m[:, None], 0)
    dz_negative -= tl.sum(dS_negative * m[:, None], 0)
    return dS_positive, dS_negative, dz_positive, dz_negative


@triton.jit
def _split(dS_positive, dS_negative, operand: tl.constexpr):
    """Each half of dS as high + low operands of one scale, and what undoes it."""
    size = tl.maximum(tl.abs(dS_positive), tl.abs(dS_negative))
    scale, unscale = power_of_two(tl.max(tl.max(size, 1), 0))
    dS_positive *= scale
    dS_negative *= scale
    high_positive, high_negative = narrow(dS_positive, operand), narrow(dS_negative, operand)
    low_positive = narrow(dS_positive - high_positive.to(tl.float32), operand)
    low_negative = narrow(dS_negative - high_negative.to(tl.float32), operand)
    return high_positive, low_positive, high_negative, low_negative, unscale


@triton.jit
def _differentiate_keys(
    k,  # a tile, as loaded
    v,
    dk_head,
    dv_head,
    dk_stride_n,
    dv_stride_n,
    tokens,
    end,
    high_positive,  # of _split
    high_negative,
    high_positive_t,  # the same, transposed
    low_positive_t,
    high_negative_t,
    low_negative_t,
    unscale,
    dz_positive,
    dz_negative,
    DK: tl.constexpr,
    DV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile, or one of them."""
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = k.dtype
    no_rows = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    k = k.to(tl.float32)
    if DK:
        d_positive = dot(v, high_positive_t, no_rows)
        d_negative = dot(v, high_negative_t, no_rows)
        if operand != tl.float32:  # float32 has no low half
            d_positive = dot(v, low_positive_t, d_positive)
            d_negative = dot(v, low_negative_t, d_negative)
        d_positive = d_positive * unscale + dz_positive[None, :]
        d_negative = d_negative * unscale + dz_negative[None, :]
        dk = tl.where(k == 0, 0.0, tl.where(k > 0, d_positive, -d_negative))
        store_tile(dk_head, tokens, end, dk_stride_n, columns, D, tl.where(k == k, dk, k))
    if DV:
        dv = dot(narrow(positive_part(k), operand), high_positive, no_rows)
        dv = dot(narrow(negative_part(k), operand), high_negative, dv) * unscale
        store_tile(dv_head, tokens, end, dv_stride_n, columns, D, dv)


# ---- many tokens, forward ------------------------------------------------------------------------


@triton.jit
def _state(
    k_pointer,
    v_pointer,
    matrix_pointer,  # (num_splits, B·Hk, 2D, D) float32
    vector_pointer,  # (num_splits, B·Hk, 2D) float32
    num_tokens,
    tokens_per_split,
    num_splits,
    kv_heads,
    batch_heads,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """S and z of one split of one key/value head."""
    program = tl.program_id(0).to(tl.int64)
    split, head = program % num_splits, program // num_splits
    b, hk = head // kv_heads, head % kv_heads
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    S_positive, S_negative, z_positive, z_negative = _sum_state(
        k_head, v_head, k_stride_n, v_stride_n, begin, end, D, BLOCK_D, BLOCK_N
    )
    slot = split * batch_heads + head
    matrix = matrix_pointer + slot * 2 * D * D
    vector = vector_pointer + slot * 2 * D
    _store_state(
        matrix, vector, S_positive, S_negative, z_positive, z_negative, D, BLOCK_D
    )  # fmt: skip


@triton.jit
def _reduce(
    matrix_pointer,  # (num_splits, matrix_size) float32
    vector_pointer,  # (num_splits, vector_size) float32
    S_pointer,  # (matrix_size,) float32
    z_pointer,  # (vector_size,) float32
    matrix_size,
    vector_size,
    num_splits,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sum over splits of both partials, BLOCK_E numbers a program, in a fixed order."""
    block = tl.program_id(0).to(tl.int64)
    matrix_blocks = tl.cdiv(matrix_size, BLOCK_E)
    source, target, size = matrix_pointer, S_pointer, matrix_size.to(tl.int64)
    if block >= matrix_blocks:
        source, target, size = vector_pointer, z_pointer, vector_size.to(tl.int64)
        block -= matrix_blocks
    elements = block * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_S, BLOCK_E), dtype=tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S).to(tl.int64)
        total += load_rows(source, splits, num_splits, size, elements, size)
    tl.store(target + elements, tl.sum(total, 0), mask=elements < size)


@triton.jit
def _apply(
    q_pointer,
    state_pointer,  # (B, Hk, 2D, D) float32, contiguous
    normaliser_pointer,  # (B, Hk, 2D) float32, contiguous
    out_pointer,
    num_tokens,
    tokens_per_split,
    num_splits,
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    eps,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out of one split of one query head."""
    program = tl.program_id(0).to(tl.int64)
    split, head = program % num_splits, program // num_splits
    b, h = head // heads, head % heads
    kv_head = b * (heads // GROUP) + h // GROUP
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    operand: tl.constexpr = q_pointer.dtype.element_ty
    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    out_head = out_pointer + b * out_stride_b + h * out_stride_h

    S_positive, S_negative = _load_pair(state_pointer + kv_head * 2 * D * D, D, BLOCK_D)
    z_positive, z_negative = _load_vectors(normaliser_pointer + kv_head * 2 * D, D, BLOCK_D)
    S_positive, S_negative, m, unscale = _centre(
        S_positive, S_negative, z_positive, z_negative, operand
    )
    z_positive, z_negative, z_weights = _normaliser_terms(z_positive, -z_negative, operand)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        _apply_tokens(
            q_head, out_head, q_stride_n, out_stride_n, tokens, end, S_positive, S_negative,
            z_positive, z_negative, z_weights, m, unscale, eps, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip


# ---- many tokens, backward -----------------------------------------------------------------------


@triton.jit
def _query_gradient(
    dout_pointer,
    q_pointer,
    state_pointer,  # (B, Hk, 2D, D) float32, contiguous
    normaliser_pointer,  # (B, Hk, 2D) float32, contiguous
    dq_pointer,
    matrix_pointer,  # (num_splits, B·Hk, 2D, D) float32
    vector_pointer,  # (num_splits, B·Hk, 2D) float32
    num_tokens,
    tokens_per_split,
    num_splits,
    kv_heads,
    batch_heads,
    dout_stride_b,
    dout_stride_h,
    dout_stride_n,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
    eps,
    DQ: tl.constexpr,
    DS: tl.constexpr,
    DZ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one split of the query heads of one key/value head, and their part of dS and dz."""
    program = tl.program_id(0)
    split, head = program % num_splits, (program // num_splits).to(tl.int64)
    b, hk = head // kv_heads, head % kv_heads
    begin = split.to(tl.int64) * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    operand: tl.constexpr = q_pointer.dtype.element_ty

    S_positive, S_negative = _load_pair(state_pointer + head * 2 * D * D, D, BLOCK_D)
    z_positive, z_negative = _load_vectors(normaliser_pointer + head * 2 * D, D, BLOCK_D)
    S_positive, S_negative, m, unscale = _centre(
        S_positive, S_negative, z_positive, z_negative, operand
    )
    least = _least_weight(z_positive, z_negative, eps, D)
    h = hk * GROUP
    dS_positive, dS_negative, dz_positive, dz_negative = _differentiate_queries(
        dout_pointer + b * dout_stride_b + h * dout_stride_h,
        q_pointer + b * q_stride_b + h * q_stride_h,
        dq_pointer + b * dq_stride_b + h * dq_stride_h,
        dout_stride_h, dout_stride_n, q_stride_h, q_stride_n, dq_stride_h, dq_stride_n,
        begin, end, S_positive, S_negative, z_positive, z_negative, m, unscale, eps, least,
        DQ, DS, DZ, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if DS:
        # Worked out and read again: kept, they would take registers while every one is taken. That
        # there is no second axis of programs the compiler does not know.
        program = tl.program_id(0) + tl.program_id(1)
        split, head = program % num_splits, (program // num_splits).to(tl.int64)
        z_positive, z_negative = _load_vectors(normaliser_pointer + head * 2 * D, D, BLOCK_D)
        dS_positive, dS_negative, dz_positive, dz_negative = _finish(
            dS_positive, dS_negative, dz_positive, dz_negative, z_positive, z_negative, m,
            least, operand,
        )  # fmt: skip
        slot = split.to(tl.int64) * batch_heads + head
        matrix = matrix_pointer + slot * 2 * D * D
        vector = vector_pointer + slot * 2 * D
        _store_state(
            matrix, vector, dS_positive, dS_negative, dz_positive, dz_negative, D, BLOCK_D
        )  # fmt: skip


@triton.jit
def _key_value_gradient(
    dstate_pointer,  # (B, Hk, 2D, D) float32, contiguous
    dnormaliser_pointer,  # (B, Hk, 2D) float32, contiguous
    k_pointer,
    v_pointer,
    dk_pointer,
    dv_pointer,
    num_tokens,
    tokens_per_split,
    num_splits,
    kv_heads,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dφ(k) = dS v + dz and dv = dSᵀ φ(k) of one split of one key/value head."""
    program = tl.program_id(0).to(tl.int64)
    split, head = program % num_splits, program // num_splits
    b, hk = head // kv_heads, head % kv_heads
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = k_pointer.dtype.element_ty
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    dk_head = dk_pointer + b * dk_stride_b + hk * dk_stride_h
    dv_head = dv_pointer + b * dv_stride_b + hk * dv_stride_h

    dS_positive, dS_negative = _load_pair(dstate_pointer + head * 2 * D * D, D, BLOCK_D)
    dz_positive, dz_negative = _load_vectors(dnormaliser_pointer + head * 2 * D, D, BLOCK_D)
    high_positive, low_positive, high_negative, low_negative, unscale = _split(
        dS_positive, dS_negative, operand
    )
    high_positive_t, low_positive_t = tl.trans(high_positive), tl.trans(low_positive)
    high_negative_t, low_negative_t = tl.trans(high_negative), tl.trans(low_negative)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k = load_rows(k_head, tokens, end, k_stride_n, columns, D)
        v = load_rows(v_head, tokens, end, v_stride_n, columns, D)
        _differentiate_keys(
            k, v, dk_head, dv_head, dk_stride_n, dv_stride_n, tokens, end,
            high_positive, high_negative, high_positive_t, low_positive_t,
            high_negative_t, low_negative_t, unscale, dz_positive, dz_negative,
            DK, DV, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip


# ---- few tokens ----------------------------------------------------------------------------------


@triton.jit
def _short_forward(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    state_pointer,  # (B, Hk, 2D, D) float32, written with SAVE
    normaliser_pointer,  # (B, Hk, 2D) float32, likewise
    num_queries,
    num_keys,
    kv_heads,
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
    eps,
    SAVE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The whole forward of one key/value head."""
    head = tl.program_id(0).to(tl.int64)
    b, hk = head // kv_heads, head % kv_heads
    operand: tl.constexpr = q_pointer.dtype.element_ty
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    S_positive, S_negative, z_positive, z_negative = _sum_state(
        k_head, v_head, k_stride_n, v_stride_n, 0, num_keys, D, BLOCK_D, BLOCK_N
    )
    if SAVE:
        state = state_pointer + head * 2 * D * D
        normaliser = normaliser_pointer + head * 2 * D
        _store_state(
            state, normaliser, S_positive, S_negative, z_positive, z_negative, D, BLOCK_D
        )  # fmt: skip
    S_positive, S_negative, m, unscale = _centre(
        tl.trans(S_positive), tl.trans(S_negative), z_positive, z_negative, operand
    )
    z_positive, z_negative, z_weights = _normaliser_terms(z_positive, -z_negative, operand)
    q_kv_head = q_pointer + b * q_stride_b + hk * GROUP * q_stride_h
    out_kv_head = out_pointer + b * out_stride_b + hk * GROUP * out_stride_h
    tiles = tl.cdiv(num_queries, BLOCK_N)
    for index in range(0, GROUP * tiles):
        h = (index // tiles).to(tl.int64)
        tokens = (index % tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        _apply_tokens(
            q_kv_head + h * q_stride_h, out_kv_head + h * out_stride_h, q_stride_n, out_stride_n,
            tokens, num_queries, S_positive, S_negative, z_positive, z_negative, z_weights, m,
            unscale, eps, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _short_backward(
    dout_pointer,
    q_pointer,
    k_pointer,
    v_pointer,
    state_pointer,  # (B, Hk, 2D, D) float32; unused without SAVED
    normaliser_pointer,  # (B, Hk, 2D) float32; likewise
    dq_pointer,
    dk_pointer,
    dv_pointer,
    num_queries,
    num_keys,
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
    dq_stride_b,
    dq_stride_h,
    dq_stride_n,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    eps,
    DQ: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SAVED: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The whole backward of one key/value head. Without SAVED, k and v are read again for S."""
    head = tl.program_id(0).to(tl.int64)
    b, hk = head // kv_heads, head % kv_heads
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = q_pointer.dtype.element_ty
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    dk_head = dk_pointer + b * dk_stride_b + hk * dk_stride_h
    dv_head = dv_pointer + b * dv_stride_b + hk * dv_stride_h
    if SAVED:
        S_positive, S_negative = _load_pair(state_pointer + head * 2 * D * D, D, BLOCK_D)
        z_positive, z_negative = _load_vectors(normaliser_pointer + head * 2 * D, D, BLOCK_D)
    else:
        S_positive, S_negative, z_positive, z_negative = _sum_state(
            k_head, v_head, k_stride_n, v_stride_n, 0, num_keys, D, BLOCK_D, BLOCK_N
        )
        S_positive, S_negative = tl.trans(S_positive), tl.trans(S_negative)
    S_positive, S_negative, m, unscale = _centre(
        S_positive, S_negative, z_positive, z_negative, operand
    )
    least = _least_weight(z_positive, z_negative, eps, D)
    h = hk * GROUP
    dS_positive, dS_negative, dz_positive, dz_negative = _differentiate_queries(
        dout_pointer + b * dout_stride_b + h * dout_stride_h,
        q_pointer + b * q_stride_b + h * q_stride_h,
        dq_pointer + b * dq_stride_b + h * dq_stride_h,
        dout_stride_h, dout_stride_n, q_stride_h, q_stride_n, dq_stride_h, dq_stride_n,
        0, num_queries, S_positive, S_negative, z_positive, z_negative, m, unscale, eps, least,
        DQ, DK or DV, DK, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if DK or DV:
        dS_positive, dS_negative, dz_positive, dz_negative = _finish(
            dS_positive, dS_negative, dz_positive, dz_negative, z_positive, z_negative, m, least,
            operand,
        )  # fmt: skip
        # (column, feature), as summed: these are the transposed operands.
        high_positive_t, low_positive_t, high_negative_t, low_negative_t, unscale = _split(
            dS_positive, dS_negative, operand
        )
        high_positive, high_negative = tl.trans(high_positive_t), tl.trans(high_negative_t)
        for start in range(0, num_keys, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
            k = load_rows(k_head, tokens, num_keys, k_stride_n, columns, D)
            v = load_rows(v_head, tokens, num_keys, v_stride_n, columns, D)
            _differentiate_keys(
                k, v, dk_head, dv_head, dk_stride_n, dv_stride_n, tokens, num_keys,
                high_positive, high_negative, high_positive_t, low_positive_t,
                high_negative_t, low_negative_t, unscale, dz_positive, dz_negative,
                DK, DV, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip


# ---- launchers -----------------------------------------------------------------------------------


def _options(kernel: str, x: Tensor) -> dict[str, int]:
    """Launch options of a kernel; RESIDENT says which file's kernel it is."""
    head_dim = x.shape[-1]
    options = launch_options(f"linear_attention.{kernel}", head_dim, x.dtype, x.device)
    padded = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    return {"RESIDENT": 1, **padded, **options}


def _takes_one_launch(kernel: str, q: Tensor, k: Tensor) -> bool:
    """Whether one program a key/value head is enough: by shape and device alone.

    A program reads some 50 GB/s, so that a short head is done before a second launch would have
    started, and a longer one is worth it only where there are as many heads as multiprocessors.
    """
    if not _options(kernel, q)["RESIDENT"]:
        return False
    batch, kv_heads, num_keys, _ = k.shape
    tokens = num_keys + q.shape[2] * (q.shape[1] // kv_heads)
    filled = batch * kv_heads >= multiprocessors(k.device)
    limits = tuning.SPLITS
    return tokens <= limits.short_alone or (filled and num_keys <= limits.short_keys)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of the first three axes; zeros for a gradient that is not wanted."""
    return x.stride()[:3] if x.dim() > 1 else (0, 0, 0)


def _partial_sums(
    splits: int, batch: int, kv_heads: int, head_dim: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    matrix = like.new_empty((splits, batch, kv_heads, 2 * head_dim, head_dim), dtype=torch.float32)
    return matrix, like.new_empty(matrix.shape[:4], dtype=torch.float32)


def _sum_partials(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Partials (num_splits, …) added up over the splits."""
    if matrix.shape[0] == 1:
        return matrix[0], vector[0]
    S, z = torch.empty_like(matrix[0]), torch.empty_like(vector[0])
    if S.numel():
        options = launch_options(
            "linear_attention.reduce", matrix.shape[-1], torch.float32, matrix.device
        )
        blocks = sum(triton.cdiv(x.numel(), options["BLOCK_E"]) for x in (S, z))
        _reduce[(blocks,)](
            matrix, vector, S, z, S.numel(), z.numel(), matrix.shape[0], **options
        )  # fmt: skip
    return S, z


def _launch_state_sums(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, kv_heads, tokens, head_dim = k.shape
    options = _options("state", k)
    if not options.pop("RESIDENT"):
        return _sum_partials(*streamed.outer(k, v, kv_heads, None, options))
    heads = batch * kv_heads
    splits, per_split = balanced_splits(tokens, heads, options["BLOCK_N"], k.device)
    matrix, vector = _partial_sums(splits, batch, kv_heads, head_dim, k)
    if heads:
        _state[(splits * heads,)](
            k, v, matrix, vector, tokens, per_split, splits, kv_heads, heads,
            *k.stride()[:3], *v.stride()[:3], **options,
        )  # fmt: skip
    return _sum_partials(matrix, vector)


def _launch_apply_into(out: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float) -> None:
    batch, heads, tokens, _ = q.shape
    if not out.numel():
        return
    options = _options("apply", q)
    if not options.pop("RESIDENT"):
        streamed.apply(q, S, z, out, eps, options)
        return
    splits, per_split = balanced_splits(tokens, batch * heads, options["BLOCK_N"], q.device)
    _apply[(splits * batch * heads,)](
        q, S, z, out, tokens, per_split, splits, heads, *q.stride()[:3], *out.stride()[:3], eps,
        GROUP=heads // S.shape[1], **options,
    )  # fmt: skip


def _launch_query_gradient_into(
    dq: Tensor, dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float, wanted: int
) -> tuple[Tensor, Tensor]:
    """Fills dq; returns dS and dz: those of the three that are wanted, dz never alone."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads = S.shape[1]
    needs_dq, needs_dS, needs_dz = (is_wanted(wanted, i) for i in range(3))
    options = _options("query_gradient", q)
    if not options.pop("RESIDENT"):
        rows = streamed.query_gradient(dout, q, S, z, dq if needs_dq else None, eps, options)
        if not needs_dS:
            return empty_state(q, False)
        sums = _options("query_sums", q)
        sums.pop("RESIDENT")
        return _sum_partials(*streamed.outer(q, dout, kv_heads, rows, sums))
    splits, per_split = balanced_splits(tokens, batch * kv_heads, options["BLOCK_N"], q.device)
    if needs_dS:
        matrix, vector = _partial_sums(splits, batch, kv_heads, head_dim, q)
    else:
        matrix, vector = empty_state(q, False)
    if batch:
        _query_gradient[(splits * batch * kv_heads,)](
            dout, q, S, z, dq, matrix, vector, tokens, per_split, splits, kv_heads,
            batch * kv_heads, *dout.stride()[:3], *q.stride()[:3], *_strides(dq), eps,
            # With dq, dz costs next to nothing: a variant less.
            DQ=needs_dq, DS=needs_dS, DZ=needs_dS and (needs_dz or needs_dq),
            GROUP=heads // kv_heads, **options,
        )  # fmt: skip
    return _sum_partials(matrix, vector) if needs_dS else (matrix, vector)


def _launch_key_value_gradient_into(
    dk: Tensor, dv: Tensor, dS: Tensor, dz: Tensor, k: Tensor, v: Tensor, wanted: int
) -> None:
    """Fills dk and dv, those that are wanted."""
    batch, kv_heads, tokens, _ = k.shape
    if not wanted or not k.numel():
        return
    needs_dk, needs_dv = is_wanted(wanted, 0), is_wanted(wanted, 1)
    options = _options("key_value_gradient", k)
    if not options.pop("RESIDENT"):
        given = dk if needs_dk else None, dv if needs_dv else None
        streamed.key_value_gradient(dS, dz, k, v, *given, options)
        return
    splits, per_split = balanced_splits(tokens, batch * kv_heads, options["BLOCK_N"], k.device)
    _key_value_gradient[(splits * batch * kv_heads,)](
        dS, dz, k, v, dk, dv, tokens, per_split, splits, kv_heads, *k.stride()[:3],
        *v.stride()[:3], *_strides(dk), *_strides(dv), DK=needs_dk, DV=needs_dv,
        **options,
    )  # fmt: skip


def _forward_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float, save_state: bool
) -> tuple[Tensor, Tensor]:
    """Fills out; returns S and z, empty ones unless they are to be saved."""
    if not _takes_one_launch("short_forward", q, k):
        S, z = _launch_state_sums(k, v)
        _launch_apply_into(out, q, S, z, eps)
        return (S, z) if save_state else empty_state(k, False)
    S, z = empty_state(k, save_state)
    batch, kv_heads, num_keys, _ = k.shape
    if batch:
        options = _options("short_forward", q)
        options.pop("RESIDENT")
        _short_forward[(batch * kv_heads,)](
            q, k, v, out, S, z, q.shape[2], num_keys, kv_heads, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *out.stride()[:3], eps, SAVE=save_state,
            GROUP=q.shape[1] // kv_heads, **options,
        )  # fmt: skip
    return S, z


def _backward_into(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor,
    z: Tensor, eps: float, wanted: int,
) -> None:  # fmt: skip
    """Fills those of dq, dk and dv that are wanted; S and z of shape (0,) are worked out again."""
    batch, kv_heads, num_keys, _ = k.shape
    saved = S.dim() > 1
    needs_dq, needs_dk, needs_dv = (is_wanted(wanted, i) for i in range(3))
    if not _takes_one_launch("short_backward", q, k):
        if not saved:
            S, z = _launch_state_sums(k, v)
        sums = needs_dq | (needs_dk or needs_dv) << 1 | needs_dk << 2
        dS, dz = _launch_query_gradient_into(dq, dout, q, S, z, eps, sums)
        _launch_key_value_gradient_into(dk, dv, dS, dz, k, v, wanted >> 1)
    elif batch:
        options = _options("short_backward", q)
        options.pop("RESIDENT")
        _short_backward[(batch * kv_heads,)](
            dout, q, k, v, S, z, dq, dk, dv, q.shape[2], num_keys, kv_heads,
            *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *_strides(dq), *_strides(dk), *_strides(dv), eps,
            DQ=needs_dq, DK=needs_dk, DV=needs_dv, SAVED=saved,
            GROUP=q.shape[1] // kv_heads, **options,
        )  # fmt: skip


@operator("linear_attention")
def _launch(
    q: Tensor, k: Tensor, v: Tensor, eps: float, save_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_like(q)
    return out, *_forward_into(out, q, k, v, eps, save_state)


@operator("linear_attention_backward")
def _launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, eps: float, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = empty_gradients(wanted, q, k, v)
    _backward_into(dq, dk, dv, dout, q, k, v, S, z, eps, wanted)
    return dq, dk, dv


@operator("linear_attention_packed")
def _launch_packed(qkv: Tensor, eps: float, save_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_like(qkv.select(2, 0))
    return out, *_forward_into(out.transpose(1, 2), *unpack_qkv(qkv), eps, save_state)


@operator("linear_attention_packed_backward")
def _launch_packed_backward(dout: Tensor, qkv: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
    dqkv = empty_like(qkv)
    dout = dout.transpose(1, 2)
    _backward_into(*unpack_qkv(dqkv), dout, *unpack_qkv(qkv), S, z, eps, 0b111)
    return dqkv


@operator("linear_attention_state")
def _launch_state(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_state_sums(k, v)


@operator("linear_attention_state_backward")
def _launch_state_backward(
    dS: Tensor, dz: Tensor, k: Tensor, v: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    dk, dv = empty_gradients(wanted, k, v)
    _launch_key_value_gradient_into(dk, dv, dS.contiguous(), dz.contiguous(), k, v, wanted)
    return dk, dv


@operator("linear_attention_apply")
def _launch_apply(q: Tensor, S: Tensor, z: Tensor, eps: float) -> Tensor:
    out = empty_like(q)
    _launch_apply_into(out, q, S.contiguous(), z.contiguous(), eps)
    return out


@operator("linear_attention_apply_backward")
def _launch_apply_backward(
    dout: Tensor, q: Tensor, S: Tensor, z: Tensor, eps: float, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    (dq,) = empty_gradients(wanted, q)
    needs_dS, needs_dz = is_wanted(wanted, 1), is_wanted(wanted, 2)
    with_dS = wanted | needs_dz << 1
    dS, dz = _launch_query_gradient_into(dq, dout, q, S.contiguous(), z.contiguous(), eps, with_dS)
    nothing = S.new_empty((0,))
    return dq, dS if needs_dS else nothing, dz if needs_dz else nothing.clone()


def implementation(op: str, *tensors: Tensor) -> str:
    """The kernels that an operation launches for these inputs, with their tiles, in one line."""
    if op == "linear_attention_packed":
        tensors = unpack_qkv(tensors[0])
    x = tensors[0]
    if op == "linear_attention_state":
        names = ["state"]
    elif op == "linear_attention_apply":
        names = ["apply"]
    elif _takes_one_launch("short_forward", tensors[0], tensors[1]):
        names = ["short_forward"]
    else:
        names = ["state", "apply"]
    key = [f"linear_attention.{name}" for name in names]
    tiles = "; ".join(tuning.describe(name, x.shape[-1], x.dtype, x.device) for name in key)
    return f"triton, {tuning.architecture(x.device)}: {tiles}"


linear_attention, linear_attention_packed, linear_attention_state, linear_attention_apply = attach(
    "triton", recompute_tokens=RECOMPUTE_TOKENS
)
