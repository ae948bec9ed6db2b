"""Attention backward in two kernels: dq with delta, then dk and dv. No atomics, so two runs give the same bits.

With p = exp2(s - lse), s in log2 units, dropout's choice z_ij, 0 or 1, and keep_scale = 1 / (1 - p_drop), where both
are 1 without dropout:

    delta_i = sum_d o_id do_id / keep_scale           one number per query
    dp_ij   = z_ij sum_d do_id v_jd
    ds_ij   = p_ij (dp_ij - delta_i)
    dq_i    = keep_scale scale sum_j ds_ij k_j
    dk_j    = keep_scale scale sum_i ds_ij q_i
    dv_j    = keep_scale sum_i z_ij p_ij do_i

(FlashAttention-2, Dao, 2023, algorithm 2.) The first kernel walks over keys for a tile of queries, computes delta from
its own rows of o and do and stores it; the second walks over queries for a tile of keys, with transposed scores, so
that p^T and ds^T are left operands. Scores are computed in both: seven matrix products where one kernel would need
five, and in exchange no fp32 workspace, no atomics and no third pass. p is zeroed after the exponential, not before,
so that a query that sees no key (lse = -inf) gives no NaN.

FLOPs: 14 B H T_q T_k D, half of it when causal (counted as 10, what one kernel would need, wherever TFLOP/s are given).
Bytes, least: q, k, v, o, do once, dq, dk, dv once, lse and delta 8 B H T_q and again 8.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.dropout import dropout_key, dropped_weight, keep_mask
from kernels.attention.plans import COUNTS, contiguous_heads, packed_heads, tile_constants
from kernels.attention.tiles import (
    _head,
    _key_tiles,
    _load_rows,
    _locate,
    _row_bounds,
    _store_rows,
    _store_sums,
    _visible,
)
from kernels.configs import attention_config, heads_in_l2
from kernels.dropout import dropout_numbers
from kernels.launch import Launcher
from kernels.library import LOG2E


@triton.jit(do_not_specialize=COUNTS)
def _attention_dq_kernel(
    q_ptr,  # [B, H, T_q, HEAD_DIM]
    k_ptr,  # [B, H, T_k, HEAD_DIM]
    v_ptr,  # [B, H, T_k, HEAD_DIM]
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    do_ptr,  # [B, H, T_q, HEAD_DIM]
    dq_ptr,  # [B, H, T_q, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    delta_ptr,  # [B, H, T_q] fp32
    kv_start_ptr,  # [B] int32 or None
    kv_end_ptr,  # [B] int32 or None
    q_start_ptr,  # [B] int32 or None
    seed_ptr,  # [1] int64 or None
    partial_ptr,  # [B tiles, H HEAD_DIM] fp32 or None: the sums of dq over the rows of each tile
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt: tl.constexpr,
    stride_vb,
    stride_vh,
    stride_vt: tl.constexpr,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    H,
    T_q,
    T_k,
    heads_per_group,
    scale,
    scale_log2,
    keep_scale,
    drop_below,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    tile, b, h = _locate(tl.cdiv(T_q, BLOCK_M), H, heads_per_group, IS_CAUSAL)
    head = b * H + h
    kv_start, num_keys, diagonal = _row_bounds(b, kv_start_ptr, kv_end_ptr, q_start_ptr, T_q, T_k)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < T_q
    q_ptr += _head(b, h, stride_qb, stride_qh, VECTOR)
    q = _load_rows(q_ptr, offs_m, stride_qt, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    o_ptr += _head(b, h, stride_ob, stride_oh, VECTOR)
    o = _load_rows(o_ptr, offs_m, stride_ot, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do_ptr += _head(b, h, stride_dob, stride_doh, VECTOR)
    do = _load_rows(do_ptr, offs_m, stride_dot, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) / keep_scale  # [BLOCK_M]
    tl.store(delta_ptr + head * T_q + offs_m, delta, mask=inside)
    lse = tl.load(lse_ptr + head * T_q + offs_m, mask=inside, other=0.0)  # [BLOCK_M]
    k_ptr += _head(b, h, stride_kb, stride_kh, VECTOR) + tl.cast(kv_start, tl.int64) * stride_kt
    v_ptr += _head(b, h, stride_vb, stride_vh, VECTOR) + tl.cast(kv_start, tl.int64) * stride_vt
    dropout = 0
    if HAS_DROPOUT:
        dropout = dropout_key(tl.load(seed_ptr), head)

    full, seen = _key_tiles(tile * BLOCK_M, num_keys, diagonal, BLOCK_M, BLOCK_N, IS_CAUSAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for n in tl.range(full if MASKED else 0, seen if MASKED else full, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, offs_n, stride_kt, 0, num_keys, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
            v = _load_rows(v_ptr, offs_n, stride_vt, 0, num_keys, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision=DOT_PRECISION)  # [BLOCK_M, BLOCK_N]
            p = tl.math.exp2(s * scale_log2 - lse[:, None])  # [BLOCK_M, BLOCK_N]
            if MASKED:
                p = tl.where(_visible(offs_m[:, None], offs_n[None, :], num_keys, diagonal, IS_CAUSAL), p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=DOT_PRECISION)  # [BLOCK_M, BLOCK_N]
            if HAS_DROPOUT:
                keep = keep_mask(dropout, tile * BLOCK_M, n, drop_below, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
                dp = tl.where(keep, dp, 0.0)
            ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT_PRECISION)  # scales come at the end
    dq *= scale * keep_scale
    dq_ptr += _head(b, h, stride_dqb, stride_dqh, VECTOR)
    _store_rows(dq_ptr, dq, offs_m, stride_dqt, inside, HEAD_DIM, BLOCK_D)
    if partial_ptr is not None:  # rows beyond T_q are zero
        program = b * tl.cdiv(T_q, BLOCK_M) + tile
        _store_sums(partial_ptr, dq, dq_ptr.dtype.element_ty, program, h * HEAD_DIM, H * HEAD_DIM, HEAD_DIM)


@triton.jit(do_not_specialize=COUNTS)
def _attention_dkdv_kernel(
    q_ptr,  # [B, H, T_q, HEAD_DIM]
    k_ptr,  # [B, H, T_k, HEAD_DIM]
    v_ptr,  # [B, H, T_k, HEAD_DIM]
    do_ptr,  # [B, H, T_q, HEAD_DIM]
    dk_ptr,  # [B, H, T_k, HEAD_DIM]
    dv_ptr,  # [B, H, T_k, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    delta_ptr,  # [B, H, T_q] fp32
    kv_start_ptr,  # [B] int32 or None
    kv_end_ptr,  # [B] int32 or None
    q_start_ptr,  # [B] int32 or None
    seed_ptr,  # [1] int64 or None
    partial_ptr,  # [B tiles, 2 H HEAD_DIM] fp32 or None: those of dk, and behind them those of dv
    stride_qb,
    stride_qh,
    stride_qt: tl.constexpr,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_dob,
    stride_doh,
    stride_dot: tl.constexpr,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    H,
    T_q,
    T_k,
    heads_per_group,
    scale,
    scale_log2,
    keep_scale,
    drop_below,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    # The first tile of keys is seen by the most queries: tiles already come longest first.
    tile, b, h = _locate(tl.cdiv(T_k, BLOCK_N), H, heads_per_group, False)
    head = b * H + h
    kv_start, num_keys, diagonal = _row_bounds(b, kv_start_ptr, kv_end_ptr, q_start_ptr, T_q, T_k)
    n = tile * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    first_key = tl.cast(kv_start, tl.int64)
    k_ptr += _head(b, h, stride_kb, stride_kh, VECTOR) + first_key * stride_kt
    v_ptr += _head(b, h, stride_vb, stride_vh, VECTOR) + first_key * stride_vt
    k = _load_rows(k_ptr, offs_n, stride_kt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = _load_rows(v_ptr, offs_n, stride_vt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    dropout = 0
    dropped = 0.0
    if HAS_DROPOUT:
        dropout = dropout_key(tl.load(seed_ptr), head)
        dropped = dropped_weight(drop_below)

    # Queries before `seen` see no key of the tile, queries from `full` on see all of them that are valid. Tiles of
    # queries end at T_q, so that the ragged one comes first, where a mask is needed anyway; with dropout, which is
    # drawn for 16 queries at a time, at the next multiple of 16.
    end_q = tl.cdiv(T_q, 16) * 16 if HAS_DROPOUT else T_q
    seen = 0
    full = 0
    if IS_CAUSAL:
        seen = tl.maximum(n - diagonal, 0)
        full = tl.maximum(n + BLOCK_N - 1 - diagonal, 0)
    if n >= num_keys:
        seen = end_q
        full = end_q
    start = end_q - tl.cdiv(tl.maximum(end_q - seen, 0), BLOCK_M) * BLOCK_M
    full = end_q - tl.maximum(end_q - full, 0) // BLOCK_M * BLOCK_M

    q_ptr += _head(b, h, stride_qb, stride_qh, VECTOR)
    do_ptr += _head(b, h, stride_dob, stride_doh, VECTOR)
    lse_ptr += head * T_q
    delta_ptr += head * T_q
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # MASKED is 1, then 0. With a mask, the first queries of a tile may be negative; with dropout, its last may be T_q
    # and beyond. Such queries are rows of zeros, which add nothing to dk and dv.
    for MASKED in tl.static_range(1, -1, -1):
        end = full if MASKED else end_q
        for m in tl.range(start if MASKED else full, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            limit = T_q if HAS_DROPOUT else end
            q = _load_rows(q_ptr, offs_m, stride_qt, 0, limit, HEAD_DIM, BLOCK_D, MASKED or HAS_DROPOUT)
            do = _load_rows(do_ptr, offs_m, stride_dot, 0, limit, HEAD_DIM, BLOCK_D, MASKED or HAS_DROPOUT)
            if MASKED or HAS_DROPOUT:
                inside = (offs_m >= 0) & (offs_m < limit)
                lse = tl.load(lse_ptr + offs_m, mask=inside, other=0.0)  # [BLOCK_M]
                delta = tl.load(delta_ptr + offs_m, mask=inside, other=0.0)  # [BLOCK_M]
            else:
                lse = tl.load(lse_ptr + offs_m)  # [BLOCK_M]
                delta = tl.load(delta_ptr + offs_m)  # [BLOCK_M]
            s_t = tl.dot(k, tl.trans(q), input_precision=DOT_PRECISION)  # [BLOCK_N, BLOCK_M]
            p_t = tl.math.exp2(s_t * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
            if MASKED:
                p_t = tl.where(_visible(offs_m[None, :], offs_n[:, None], num_keys, diagonal, IS_CAUSAL), p_t, 0.0)
            dp_t = tl.dot(v, tl.trans(do), input_precision=DOT_PRECISION)  # [BLOCK_N, BLOCK_M]
            kept_t = p_t
            if HAS_DROPOUT:
                keep_t = keep_mask(dropout, m, n, drop_below, BLOCK_M, BLOCK_N, TRANSPOSED=True)
                kept_t = tl.where(keep_t, p_t, dropped)
                dp_t = tl.where(keep_t, dp_t, 0.0)
            dv = tl.dot(kept_t.to(do.dtype), do, dv, input_precision=DOT_PRECISION)
            ds_t = p_t * (dp_t - delta[None, :])  # [BLOCK_N, BLOCK_M]
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=DOT_PRECISION)  # scales come at the end

    # Keys beyond the valid ones wrap around to the rows before kv_start: every row of dk and dv is written once.
    valid = (offs_n < num_keys)[:, None]
    position = first_key + offs_n
    position = tl.where(position < T_k, position, position - T_k)
    inside = offs_n < T_k
    dk = tl.where(valid, dk * (scale * keep_scale), 0.0)
    dv = tl.where(valid, dv * keep_scale, 0.0)
    dk_ptr += _head(b, h, stride_dkb, stride_dkh, VECTOR)
    dv_ptr += _head(b, h, stride_dvb, stride_dvh, VECTOR)
    _store_rows(dk_ptr, dk, position, stride_dkt, inside, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr, dv, position, stride_dvt, inside, HEAD_DIM, BLOCK_D)
    if partial_ptr is not None:  # rows of keys that are none are zero
        program = b * tl.cdiv(T_k, BLOCK_N) + tile
        width = 2 * H * HEAD_DIM
        _store_sums(partial_ptr, dk, dk_ptr.dtype.element_ty, program, h * HEAD_DIM, width, HEAD_DIM)
        _store_sums(partial_ptr, dv, dv_ptr.dtype.element_ty, program, (H + h) * HEAD_DIM, width, HEAD_DIM)


def _plan(direction, strides, T, bytes_per_head, shape, T_k, dtype, dropout, scale, causal, dropout_p, offsets=None):
    """strides: those of the six tensors [B, H, T, D] that come first; T: the length that is cut into tiles."""
    B, H, T_q, D = shape
    config = attention_config(direction, dtype, D, T_q, dropout)
    strides = [stride for each in strides for stride in each[:3]]
    numbers = (
        *strides,
        H,
        T_q,
        T_k,
        heads_in_l2(bytes_per_head * dtype.itemsize, B * H),
        scale,
        scale * LOG2E,
        *dropout_numbers(dropout_p),
    )
    grid = (B * H * triton.cdiv(T, config.BLOCK_M if direction == "dq" else config.BLOCK_N),)
    return grid, numbers, tile_constants(config, dtype, strides, D, causal, dropout), offsets or {}


def _dq_plan(shape, T_k, q, k, v, o, do, dq, dk, dv, *rest):
    return _plan("dq", (q, k, v, o, do, dq), shape[2], 2 * T_k * shape[3], shape, T_k, *rest)


def _dkdv_plan(shape, T_k, q, k, v, o, do, dq, dk, dv, *rest):
    return _plan("dkdv", (q, k, v, do, dk, dv), T_k, 2 * shape[2] * shape[3], shape, T_k, *rest)


def partial_rows(dtype, head_dim, T, dropout):
    """How many rows the partial sums of dq, and those of dk and dv, have for each row of the batch."""
    dq, dkdv = (attention_config(direction, dtype, head_dim, T, dropout) for direction in ("dq", "dkdv"))
    return triton.cdiv(T, dq.BLOCK_M), triton.cdiv(T, dkdv.BLOCK_N)


def _packed(plan, parts, partial):
    """plan for qkv [B, T, 3C] and its gradient; parts: {index of a pointer: which of q, k, v it means}; partial: that
    of the partial sums, which begin at an element that comes last in the key."""

    def packed_plan(shape, qkv_strides, o_strides, do_strides, num_heads, *rest):
        B, T, three_C = shape
        C = three_C // 3
        D = C // num_heads
        qkv, o, do = (packed_heads(strides, D) for strides in (qkv_strides, o_strides, do_strides))
        dqkv = contiguous_heads(T, num_heads, D, 3)
        strides = qkv, qkv, qkv, o, do, dqkv, dqkv, dqkv
        *rest, partial_at = rest
        offsets = {i: part * C for i, part in parts.items()} | ({partial: partial_at} if partial_at else {})
        return plan((B, num_heads, T, D), T, *strides, *rest, offsets)

    return packed_plan


_launch_dq = Launcher(_attention_dq_kernel, _dq_plan)
_launch_dkdv = Launcher(_attention_dkdv_kernel, _dkdv_plan)
_launch_packed_dq = Launcher(_attention_dq_kernel, _packed(_dq_plan, {1: 1, 2: 2}, 12))
_launch_packed_dkdv = Launcher(_attention_dkdv_kernel, _packed(_dkdv_plan, {1: 1, 2: 2, 4: 1, 5: 2}, 12))


def _launch_attention_backward(do, q, k, v, o, lse, dq, dk, dv, options):
    """Writes dq, dk and dv, which have the shapes of q, k and v and strides of their own."""
    if q.numel():
        kv_start, kv_end, q_start, seed, *numbers = options
        tail = (lse, torch.empty_like(lse), kv_start, kv_end, q_start, seed, None)  # the second is delta
        strides = [x.stride() for x in (q, k, v, o, do, dq, dk, dv)]
        key = (q.shape, k.shape[2], *strides, q.dtype, seed is not None, *numbers)
        _launch_dq((q, k, v, o, do, dq, *tail), *key)
        _launch_dkdv((q, k, v, do, dk, dv, *tail), *key)
    else:
        dk.zero_()  # no query at all, but there may be keys
        dv.zero_()


def _launch_packed_backward(do, qkv, o, lse, num_heads, options):
    """dqkv [B, T, 3C], contiguous."""
    shape = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if shape[0] and shape[1]:
        kv_start, kv_end, q_start, seed, *numbers = options
        tail = (lse, torch.empty_like(lse), kv_start, kv_end, q_start, seed, None)  # the second is delta
        key = (shape, qkv.stride(), o.stride(), do.stride(), num_heads, qkv.dtype, seed is not None, *numbers, 0)
        _launch_packed_dq((qkv, qkv, qkv, o, do, dqkv, *tail), *key)
        _launch_packed_dkdv((qkv, qkv, qkv, do, dqkv, dqkv, *tail), *key)
    return dqkv
