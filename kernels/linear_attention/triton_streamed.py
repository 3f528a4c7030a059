"""Linear attention in Triton where S does not fit beside a program's tiles: read in blocks.

What ``kernels.linear_attention.triton`` falls back on, by the rules of ``triton/tuning.py`` with
RESIDENT=0. The features are taken BLOCK_F of each sign at a time, so that neither S nor its
gradient sits in registers or shared memory whole, at any head dim.

====================  =============================================  ==============================
kernel                reads, a token and head                        writes
====================  =============================================  ==============================
_feature_outer        k, v; v once more for every further BLOCK_F    S, z partials, one a split
_apply                q (S, z once a tile, from cache)               out
_query_gradient       q twice, the second time from cache; dout      dq, two float32 a row
_feature_outer        q, dout, two float32 a row; dout as v above    dS, dz partials, one a split
_key_value_gradient   k, v                                           dk, dv
====================  =============================================  ==============================

float32 operands are carried as two half-precision terms (``triton_support.exact_dot``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_vit.kernels.triton.support import (
    balanced_splits,
    dot,
    exact_dot,
    inverse_normaliser,
    load_tile,
    narrow,
    negative_part,
    positive_part,
    store_tile,
)


@triton.jit
def _feature_outer(
    x_pointer,
    w_pointer,
    inverse_pointer,  # (B, H, N) float32: 1/E, scales the matrix sum; unused without ROW_TERMS
    weight_pointer,  # (B, H, N) float32: -(φ(q)·a)/E², scales the vector sum; likewise
    matrix_pointer,  # (num_splits, B·Hk, 2D, D) float32
    vector_pointer,  # (num_splits, B·Hk, 2D) float32
    num_tokens,
    tokens_per_split,
    num_splits,
    kv_heads,
    batch_heads,
    x_stride_b,
    x_stride_h,
    x_stride_n,
    w_stride_b,
    w_stride_h,
    w_stride_n,
    GROUP: tl.constexpr,
    ROW_TERMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """matrix = Σ φ(x) wᵀ · inverse and vector = Σ φ(x) · weight, over a split's tokens.

    With x = k, w = v and no row terms it is the state; with x = q, w = dout its gradient, where the
    GROUP query heads that share the key/value head add up. A program holds BLOCK_F features of each
    sign.
    """
    F_BLOCKS: tl.constexpr = (D + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0).to(tl.int64)
    features = (program % F_BLOCKS) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = (program // F_BLOCKS) % num_splits
    head = program // F_BLOCKS // num_splits  # b·Hk + hk
    b, hk = head // kv_heads, head % kv_heads
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = x_pointer.dtype.element_ty

    # Transposed: (column of w, feature of x). Sums are two-level: a plain float32 sum of n terms is
    # off by about 3e-8·√(n/2), past the float32 tolerance from 4,000 tokens on.
    matrix_positive = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
    matrix_negative = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
    vector_positive = tl.zeros((BLOCK_F,), dtype=tl.float32)
    vector_negative = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        x_head = x_pointer + b * x_stride_b + h * x_stride_h
        w_head = w_pointer + b * w_stride_b + h * w_stride_h
        row_head = (b * kv_heads * GROUP + h) * num_tokens
        for chunk in range(begin, end, CHUNK):
            part_positive = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
            part_negative = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
            for start in range(chunk, tl.minimum(chunk + CHUNK, end), BLOCK_N):
                tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
                x = load_tile(x_head, tokens, end, x_stride_n, features, D)
                w = load_tile(w_head, tokens, end, w_stride_n, columns, D)
                positive, negative = positive_part(x), negative_part(x)
                w_transposed = tl.trans(narrow(w, operand))
                if ROW_TERMS:
                    inside = tokens < end
                    inverse = tl.load(inverse_pointer + row_head + tokens, mask=inside, other=0.0)
                    weight = tl.load(weight_pointer + row_head + tokens, mask=inside, other=0.0)
                    # φ(q)/E and not dout/E: its size does not depend on q's, so that all rows of a
                    # tile fit the one scale that exact_dot gives them.
                    scaled_positive = positive * inverse[:, None]
                    scaled_negative = negative * inverse[:, None]
                    part_positive = exact_dot(w_transposed, scaled_positive, part_positive)
                    part_negative = exact_dot(w_transposed, scaled_negative, part_negative)
                    vector_positive += tl.sum(positive * weight[:, None], axis=0)
                    vector_negative += tl.sum(negative * weight[:, None], axis=0)
                else:
                    # φ(k) is exact in k's dtype: one product.
                    part_positive = dot(w_transposed, narrow(positive, operand), part_positive)
                    part_negative = dot(w_transposed, narrow(negative, operand), part_negative)
                    vector_positive += tl.sum(positive, axis=0)
                    vector_negative += tl.sum(negative, axis=0)
            matrix_positive += part_positive
            matrix_negative += part_negative

    out = split * batch_heads + head
    matrix = matrix_pointer + out * 2 * D * D
    store_tile(matrix, features, D, D, columns, D, tl.trans(matrix_positive))
    store_tile(matrix + D * D, features, D, D, columns, D, tl.trans(matrix_negative))
    vector = vector_pointer + out * 2 * D + features
    tl.store(vector, vector_positive, mask=features < D)
    tl.store(vector + D, vector_negative, mask=features < D)


@triton.jit
def _read_state(
    q_head,
    tokens,
    end,
    q_stride_n,
    state,
    normaliser,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """φ(q)ᵀ S, (BLOCK_N, BLOCK_D), and φ(q)·z, (BLOCK_N,), for one tile of queries."""
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = q_head.dtype.element_ty
    numerator = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    denominator = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, D, BLOCK_F):
        features = first + tl.arange(0, BLOCK_F)
        q = load_tile(q_head, tokens, end, q_stride_n, features, D)
        positive, negative = positive_part(q), negative_part(q)
        z_positive = tl.load(normaliser + features, mask=features < D, other=0.0)
        z_negative = tl.load(normaliser + D + features, mask=features < D, other=0.0)
        denominator += tl.sum(positive * z_positive[None, :] + negative * z_negative[None, :], 1)
        state_rows = load_tile(state, features, D, D, columns, D)
        numerator = exact_dot(narrow(positive, operand), state_rows, numerator)
        state_rows = load_tile(state + D * D, features, D, D, columns, D)
        numerator = exact_dot(narrow(negative, operand), state_rows, numerator)
    return numerator, denominator


@triton.jit
def _apply(
    q_pointer,
    state_pointer,
    normaliser_pointer,
    out_pointer,
    num_tokens,
    tokens_per_program,
    num_programs,  # along the tokens of one head
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
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = φ(q)ᵀ S / (φ(q)·z + eps) for some tiles of one query head."""
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    kv_head = b * (heads // GROUP) + h // GROUP
    begin = part * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)

    state = state_pointer + kv_head * 2 * D * D
    normaliser = normaliser_pointer + kv_head * 2 * D
    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    out_head = out_pointer + b * out_stride_b + h * out_stride_h
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        numerator, denominator = _read_state(
            q_head, tokens, end, q_stride_n, state, normaliser, D, BLOCK_D, BLOCK_F, BLOCK_N
        )
        out = numerator * inverse_normaliser(denominator, eps)[:, None]
        store_tile(out_head, tokens, end, out_stride_n, tl.arange(0, BLOCK_D), D, out)


@triton.jit
def _query_gradient(
    dout_pointer,
    q_pointer,
    state_pointer,
    normaliser_pointer,
    dq_pointer,
    inverse_pointer,  # (B, H, N) float32: 1/E
    weight_pointer,  # (B, H, N) float32: -(φ(q)·a)/E²
    num_tokens,
    tokens_per_program,
    num_programs,
    heads,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dφ(q) = a/E − (φ(q)·a)/E² · z with a = S dout, for some tiles of one query head.

    φ(q)·a = (φ(q)ᵀ S)·dout comes first, from the numerator; then a, BLOCK_F features at a time. The
    row terms 1/E and −(φ(q)·a)/E² go to memory, 8 bytes a row, for the sum over tokens that makes
    dS and dz. Without DQ they are all there is.
    """
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    kv_head = b * (heads // GROUP) + h // GROUP
    begin = part * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    columns = tl.arange(0, BLOCK_D)

    state = state_pointer + kv_head * 2 * D * D
    normaliser = normaliser_pointer + kv_head * 2 * D
    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    dout_head = dout_pointer + b * dout_stride_b + h * dout_stride_h
    dq_head = dq_pointer + b * dq_stride_b + h * dq_stride_h
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        numerator, denominator = _read_state(
            q_head, tokens, end, q_stride_n, state, normaliser, D, BLOCK_D, BLOCK_F, BLOCK_N
        )
        dout = load_tile(dout_head, tokens, end, dout_stride_n, columns, D)
        inverse = inverse_normaliser(denominator, eps)
        weight = -tl.sum(numerator * dout, axis=1) * inverse * inverse
        rows = head * num_tokens + tokens
        tl.store(inverse_pointer + rows, inverse, mask=tokens < end)
        tl.store(weight_pointer + rows, weight, mask=tokens < end)

        dout = narrow(dout, dout_pointer.dtype.element_ty)
        zeros = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
        for first in range(0, D if DQ else 0, BLOCK_F):
            features = first + tl.arange(0, BLOCK_F)
            q = load_tile(q_head, tokens, end, q_stride_n, features, D)
            state_rows = load_tile(state, features, D, D, columns, D)
            a = exact_dot(dout, tl.trans(state_rows), zeros)
            z = tl.load(normaliser + features, mask=features < D, other=0.0)
            d_positive = a * inverse[:, None] + weight[:, None] * z[None, :]
            state_rows = load_tile(state + D * D, features, D, D, columns, D)
            a = exact_dot(dout, tl.trans(state_rows), zeros)
            z = tl.load(normaliser + D + features, mask=features < D, other=0.0)
            d_negative = a * inverse[:, None] + weight[:, None] * z[None, :]
            # Written so that a NaN in q passes both branches.
            dq = tl.where(q <= 0, 0.0, d_positive) - tl.where(q >= 0, 0.0, d_negative)
            store_tile(dq_head, tokens, end, dq_stride_n, features, D, dq)


@triton.jit
def _key_value_gradient(
    dstate_pointer,
    dnormaliser_pointer,
    k_pointer,
    v_pointer,
    dk_pointer,
    dv_pointer,
    num_tokens,
    tokens_per_program,
    num_programs,
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
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dφ(k) = dS v + dz and dv = dSᵀ φ(k), or one of them, for some tiles of one key/value head."""
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, hk = head // kv_heads, head % kv_heads
    begin = part * tokens_per_program
    end = tl.minimum(begin + tokens_per_program, num_tokens)
    columns = tl.arange(0, BLOCK_D)
    operand: tl.constexpr = k_pointer.dtype.element_ty

    dstate = dstate_pointer + head * 2 * D * D
    dnormaliser = dnormaliser_pointer + head * 2 * D
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    dk_head = dk_pointer + b * dk_stride_b + hk * dk_stride_h
    dv_head = dv_pointer + b * dv_stride_b + hk * dv_stride_h
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        v = narrow(load_tile(v_head, tokens, end, v_stride_n, columns, D), operand)
        dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        zeros = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
        for first in range(0, D, BLOCK_F):
            features = first + tl.arange(0, BLOCK_F)
            k = load_tile(k_head, tokens, end, k_stride_n, features, D)
            dk = zeros
            # One half of φ after the other, by a loop that stays one: side by side, the operands of
            # both would not fit the registers.
            for half in tl.range(0, 2, loop_unroll_factor=1):
                sign = 1.0 - 2.0 * half
                dS = load_tile(dstate + half * D * D, features, D, D, columns, D)
                dz = tl.load(dnormaliser + half * D + features, mask=features < D, other=0.0)
                if DV:
                    dv = exact_dot(narrow(positive_part(sign * k), operand), dS, dv)
                if DK:
                    dphi = exact_dot(v, tl.trans(dS), zeros + dz[None, :])
                    # Written so that a NaN in k passes both halves.
                    dk += tl.where(sign * k <= 0, 0.0, sign * dphi)
            if DK:
                store_tile(dk_head, tokens, end, dk_stride_n, features, D, dk)
        if DV:
            store_tile(dv_head, tokens, end, dv_stride_n, columns, D, dv)


# Tokens that one level of a sum over tokens adds up; a multiple of every BLOCK_N.
_CHUNK = 256


def outer(
    x: Tensor,
    w: Tensor,
    kv_heads: int,
    rows: tuple[Tensor, Tensor] | None,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Partials of Σ φ(x) wᵀ and Σ φ(x), (num_splits, B, Hk, …); scaled by the row terms given."""
    batch, heads, tokens, head_dim = x.shape
    batch_heads = batch * kv_heads
    feature_blocks = triton.cdiv(head_dim, options["BLOCK_F"])
    splits, per_split = balanced_splits(
        tokens, batch_heads * feature_blocks, options["BLOCK_N"], x.device
    )
    matrix = x.new_empty((splits, batch, kv_heads, 2 * head_dim, head_dim), dtype=torch.float32)
    vector = x.new_empty((splits, batch, kv_heads, 2 * head_dim), dtype=torch.float32)
    inverse, weight = rows if rows is not None else (matrix, vector)
    if batch_heads:
        _feature_outer[(feature_blocks * splits * batch_heads,)](
            x, w, inverse, weight, matrix, vector, tokens, per_split, splits, kv_heads,
            batch_heads, *x.stride()[:3], *w.stride()[:3], GROUP=heads // kv_heads,
            ROW_TERMS=rows is not None, CHUNK=_CHUNK, **options,
        )  # fmt: skip
    return matrix, vector


def apply(
    q: Tensor, S: Tensor, z: Tensor, out: Tensor, eps: float, options: dict[str, int]
) -> None:
    """Fills out, (B, H, N, D), which is not empty."""
    batch, heads, tokens, _ = q.shape
    parts, per_part = balanced_splits(tokens, batch * heads, options["BLOCK_N"], q.device)
    _apply[(parts * batch * heads,)](
        q, S, z, out, tokens, per_part, parts, heads, *q.stride()[:3], *out.stride()[:3], eps,
        GROUP=heads // S.shape[1], **options,
    )  # fmt: skip


def query_gradient(
    dout: Tensor,
    q: Tensor,
    S: Tensor,
    z: Tensor,
    dq: Tensor | None,
    eps: float,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Fills dq, if it is given; returns what :func:`outer` wants, (B, H, N) float32: 1/E and
    −(φ(q)·a)/E²."""
    batch, heads, tokens, _ = q.shape
    inverse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    weight = torch.empty_like(inverse)
    parts, per_part = balanced_splits(tokens, batch * heads, options["BLOCK_N"], q.device)
    if q.numel():
        to = q if dq is None else dq
        _query_gradient[(parts * batch * heads,)](
            dout, q, S, z, to, inverse, weight, tokens, per_part, parts, heads,
            *dout.stride()[:3], *q.stride()[:3], *to.stride()[:3], eps, DQ=dq is not None,
            GROUP=heads // S.shape[1], **options,
        )  # fmt: skip
    return inverse, weight


def key_value_gradient(
    dS: Tensor,
    dz: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    options: dict[str, int],
) -> None:
    """Fills dk and dv, (B, Hk, M, D), which are not empty, or the one that is given."""
    batch, heads, tokens, _ = k.shape
    parts, per_part = balanced_splits(tokens, batch * heads, options["BLOCK_N"], k.device)
    to_dk, to_dv = k if dk is None else dk, v if dv is None else dv
    _key_value_gradient[(parts * batch * heads,)](
        dS, dz, k, v, to_dk, to_dv, tokens, per_part, parts, heads, *k.stride()[:3],
        *v.stride()[:3], *to_dk.stride()[:3], *to_dv.stride()[:3], DK=dk is not None,
        DV=dv is not None, **options,
    )  # fmt: skip
