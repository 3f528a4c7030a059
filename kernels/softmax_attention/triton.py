"""Softmax attention in Triton, after FlashAttention-2 (Dao, 2023): no N × M matrix in memory.

==================  =========================================  ================================
kernel              a program owns                             loops over
==================  =========================================  ================================
_forward            BLOCK_N query rows of one head             keys and values, BLOCK_M a time
_query_gradient     BLOCK_N query rows of one head             keys and values
_key_value_gradient BLOCK_N key rows of one key/value head     its query heads and their rows
==================  =========================================  ================================

The forward keeps a running maximum and sum per row (online softmax) in float32 and writes their
logarithm, lse = log Σ exp(s). Backward recomputes the weights from it, P = exp(s − lse):

    dV = Pᵀ dO              dS = P ∘ (dO Vᵀ − δ) with δ = rowsum(dO ∘ O)
    dQ = scale · dS K       dK = scale · dSᵀ Q

Each gradient has one owner that adds in a fixed order, so results repeat bit for bit. Products of
half-precision operands run on tensor cores; P and dS are rounded to the inputs' dtype for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operators import empty_like, readable
from kernels.softmax_attention.operators import attach
from kernels.triton_support import dot, load_tile, narrow, operator, store_tile

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward(
    q_pointer,
    k_pointer,
    v_pointer,
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
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    hk = h // GROUP
    columns = tl.arange(0, BLOCK_D)
    rows = part * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    operand: tl.constexpr = q_pointer.dtype.element_ty

    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    q = narrow(load_tile(q_head, rows, num_queries, q_stride_n, columns, D), operand)
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    accumulator = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M).to(tl.int64)
        k = narrow(load_tile(k_head, keys, num_keys, k_stride_n, columns, D), operand)
        v = narrow(load_tile(v_head, keys, num_keys, v_stride_n, columns, D), operand)
        scores = dot(q, tl.trans(k), zeros) * (scale * _LOG2_E)
        scores = tl.where((keys < num_keys)[None, :], scores, float("-inf"))
        # The maximum drops NaN, but exp2(NaN − maximum) brings it back into the sum. The clamp
        # keeps a row of nothing but NaN from making −inf − (−inf) of its finite neighbours.
        new_maximum = tl.maximum(tl.maximum(maximum, tl.max(scores, axis=1)), -1.0e30)
        correction = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        total = total * correction + tl.sum(weights, axis=1)
        accumulator = dot(narrow(weights, operand), v, accumulator * correction[:, None])
        maximum = new_maximum

    empty = total == 0
    out = accumulator / tl.where(empty, 1.0, total)[:, None]
    lse = (maximum + tl.log2(tl.where(empty, 1.0, total))) / _LOG2_E
    out_head = out_pointer + b * out_stride_b + h * out_stride_h
    store_tile(out_head, rows, num_queries, out_stride_n, columns, D, out)
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_pointer + head * num_queries + rows, lse, mask=rows < num_queries)


@triton.jit
def _query_gradient(
    dout_pointer,
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    lse_pointer,  # (B, H, N) float32
    delta_pointer,  # (B, H, N) float32, written here: rowsum(dO ∘ O)
    dq_pointer,
    num_queries,
    num_keys,
    num_programs,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, h = head // heads, head % heads
    hk = h // GROUP
    columns = tl.arange(0, BLOCK_D)
    rows = part * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    operand: tl.constexpr = q_pointer.dtype.element_ty

    q_head = q_pointer + b * q_stride_b + h * q_stride_h
    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    out_head = out_pointer + b * out_stride_b + h * out_stride_h
    dout_head = dout_pointer + b * dout_stride_b + h * dout_stride_h
    q = narrow(load_tile(q_head, rows, num_queries, q_stride_n, columns, D), operand)
    out = load_tile(out_head, rows, num_queries, out_stride_n, columns, D)
    dout = load_tile(dout_head, rows, num_queries, dout_stride_n, columns, D)
    lse = tl.load(lse_pointer + head * num_queries + rows, mask=rows < num_queries, other=0.0)
    delta = tl.sum(out * dout, axis=1)
    tl.store(delta_pointer + head * num_queries + rows, delta, mask=rows < num_queries)
    dout = narrow(dout, operand)

    dq = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M).to(tl.int64)
        k = narrow(load_tile(k_head, keys, num_keys, k_stride_n, columns, D), operand)
        v = narrow(load_tile(v_head, keys, num_keys, v_stride_n, columns, D), operand)
        scores = dot(q, tl.trans(k), zeros) * scale
        weights = tl.exp2((scores - lse[:, None]) * _LOG2_E)
        weights = tl.where((keys < num_keys)[None, :], weights, 0.0)
        dweights = dot(dout, tl.trans(v), zeros)
        dscores = weights * (dweights - delta[:, None])
        dq = dot(narrow(dscores, operand), k, dq)
    dq_head = dq_pointer + b * dq_stride_b + h * dq_stride_h
    store_tile(dq_head, rows, num_queries, dq_stride_n, columns, D, dq * scale)


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
    num_programs,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part, head = program % num_programs, program // num_programs
    b, hk = head // kv_heads, head % kv_heads
    columns = tl.arange(0, BLOCK_D)
    keys = part * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    operand: tl.constexpr = k_pointer.dtype.element_ty

    k_head = k_pointer + b * k_stride_b + hk * k_stride_h
    v_head = v_pointer + b * v_stride_b + hk * v_stride_h
    k = narrow(load_tile(k_head, keys, num_keys, k_stride_n, columns, D), operand)
    v = narrow(load_tile(v_head, keys, num_keys, v_stride_n, columns, D), operand)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        q_head = q_pointer + b * q_stride_b + h * q_stride_h
        dout_head = dout_pointer + b * dout_stride_b + h * dout_stride_h
        row_head = (b * kv_heads * GROUP + h) * num_queries
        for start in range(0, num_queries, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = rows < num_queries
            q = narrow(load_tile(q_head, rows, num_queries, q_stride_n, columns, D), operand)
            dout = load_tile(dout_head, rows, num_queries, dout_stride_n, columns, D)
            dout = narrow(dout, operand)
            lse = tl.load(lse_pointer + row_head + rows, mask=inside, other=0.0)
            delta = tl.load(delta_pointer + row_head + rows, mask=inside, other=0.0)
            scores = dot(k, tl.trans(q), zeros) * scale  # (keys, rows)
            weights = tl.exp2((scores - lse[None, :]) * _LOG2_E)
            weights = tl.where(inside[None, :], weights, 0.0)
            dv = dot(narrow(weights, operand), dout, dv)
            dweights = dot(v, tl.trans(dout), zeros)
            dscores = weights * (dweights - delta[None, :])
            dk = dot(narrow(dscores, operand), q, dk)
    dk_head = dk_pointer + b * dk_stride_b + hk * dk_stride_h
    dv_head = dv_pointer + b * dv_stride_b + hk * dv_stride_h
    store_tile(dk_head, keys, num_keys, dk_stride_n, columns, D, dk * scale)
    store_tile(dv_head, keys, num_keys, dv_stride_n, columns, D, dv)


def tile_options(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps for a head dim and dtype."""
    block_d = triton.next_power_of_2(head_dim)
    half = dtype != torch.float32
    return {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_N": 64 if half else 32,
        "BLOCK_M": 64 if half and block_d <= 64 else 32,
        "num_warps": 8 if block_d > 64 else 4,
        "num_stages": 2,
    }


@operator("softmax_attention")
def _launch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = q.shape
    out = empty_like(q)
    lse = q.new_empty((batch, heads, num_queries), dtype=torch.float32)
    options = tile_options(head_dim, q.dtype)
    parts = triton.cdiv(num_queries, options["BLOCK_N"])
    if out.numel():
        _forward[(parts * batch * heads,)](
            q,
            k,
            v,
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
            scale,
            GROUP=heads // k.shape[1],
            **options,
        )
    return out, lse


@operator("softmax_attention_backward")
def _launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    dout = readable(dout)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    delta = torch.empty_like(lse)
    options = tile_options(head_dim, q.dtype)
    if dq.numel():
        parts = triton.cdiv(num_queries, options["BLOCK_N"])
        _query_gradient[(parts * batch * heads,)](
            dout,
            q,
            k,
            v,
            out,
            lse,
            delta,
            dq,
            num_queries,
            num_keys,
            parts,
            heads,
            *dout.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *dq.stride()[:3],
            scale,
            GROUP=heads // kv_heads,
            **options,
        )
    if dk.numel():
        parts = triton.cdiv(num_keys, options["BLOCK_N"])
        _key_value_gradient[(parts * batch * kv_heads,)](
            dout,
            q,
            k,
            v,
            lse,
            delta,
            dk,
            dv,
            num_queries,
            num_keys,
            parts,
            kv_heads,
            *dout.stride()[:3],
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dk.stride()[:3],
            *dv.stride()[:3],
            scale,
            GROUP=heads // kv_heads,
            **options,
        )
    return dq, dk, dv


softmax_attention = attach("triton")
