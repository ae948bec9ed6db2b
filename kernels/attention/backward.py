"""Attention backward in two kernels: dq with delta, then dk and dv. No atomics, so two runs give the same bits.

With p = exp2(s - lse), s in log2 units, and dropout's choice z (0 or 1 / (1 - p_drop), 1 without dropout):

    delta_i = sum_d o_id do_id                        one number per query
    dp_ij   = z_ij sum_d do_id v_jd
    ds_ij   = p_ij (dp_ij - delta_i)
    dq_i    = scale sum_j ds_ij k_j
    dk_j    = scale sum_i ds_ij q_i
    dv_j    = sum_i z_ij p_ij do_i

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

from kernels.attention.tiles import _key_tiles, _load_rows, _locate, _row_bounds, _store_rows, _visible
from kernels.configs import attention_config, heads_in_l2
from kernels.dropout import dropout_mask, dropout_numbers
from kernels.library import LOG2E, device_of, dot_precision


@triton.jit
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
    q_ptr += b * stride_qb + h * stride_qh
    q = _load_rows(q_ptr, offs_m, stride_qt, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    o_ptr += b * stride_ob + h * stride_oh
    o = _load_rows(o_ptr, offs_m, stride_ot, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do_ptr += b * stride_dob + h * stride_doh
    do = _load_rows(do_ptr, offs_m, stride_dot, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta_ptr + head * T_q + offs_m, delta, mask=inside)
    lse = tl.load(lse_ptr + head * T_q + offs_m, mask=inside, other=0.0)  # [BLOCK_M]
    k_ptr += b * stride_kb + h * stride_kh + tl.cast(kv_start, tl.int64) * stride_kt
    v_ptr += b * stride_vb + h * stride_vh + tl.cast(kv_start, tl.int64) * stride_vt
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

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
                keep = dropout_mask(seed, head, offs_m, n, drop_below, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT_PRECISION)  # scale comes at the end
    _store_rows(dq_ptr + b * stride_dqb + h * stride_dqh, dq * scale, offs_m, stride_dqt, inside, HEAD_DIM, BLOCK_D)


@triton.jit
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
    k_ptr += b * stride_kb + h * stride_kh + first_key * stride_kt
    v_ptr += b * stride_vb + h * stride_vh + first_key * stride_vt
    k = _load_rows(k_ptr, offs_n, stride_kt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = _load_rows(v_ptr, offs_n, stride_vt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    # Queries before `seen` see no key of the tile, queries from `full` on see all of them that are valid. Tiles of
    # queries end at T_q, so that the ragged one comes first, where a mask is needed anyway.
    seen = 0
    full = 0
    if IS_CAUSAL:
        seen = tl.maximum(n - diagonal, 0)
        full = tl.maximum(n + BLOCK_N - 1 - diagonal, 0)
    if n >= num_keys:
        seen = T_q
        full = T_q
    start = T_q - tl.cdiv(tl.maximum(T_q - seen, 0), BLOCK_M) * BLOCK_M
    full = T_q - tl.maximum(T_q - full, 0) // BLOCK_M * BLOCK_M

    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    lse_ptr += head * T_q
    delta_ptr += head * T_q
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # MASKED is 1, then 0. With a mask, the first queries of a tile may be negative.
    for MASKED in tl.static_range(1, -1, -1):
        end = full if MASKED else T_q
        for m in tl.range(start if MASKED else full, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            q = _load_rows(q_ptr, offs_m, stride_qt, 0, end, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
            do = _load_rows(do_ptr, offs_m, stride_dot, 0, end, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
            if MASKED:
                lse = tl.load(lse_ptr + offs_m, mask=offs_m >= 0, other=0.0)  # [BLOCK_M]
                delta = tl.load(delta_ptr + offs_m, mask=offs_m >= 0, other=0.0)  # [BLOCK_M]
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
                keep_t = tl.trans(dropout_mask(seed, head, offs_m, n, drop_below, BLOCK_M, BLOCK_N))
                kept_t = tl.where(keep_t, p_t * keep_scale, 0.0)
                dp_t = tl.where(keep_t, dp_t * keep_scale, 0.0)
            dv = tl.dot(kept_t.to(do.dtype), do, dv, input_precision=DOT_PRECISION)
            ds_t = p_t * (dp_t - delta[None, :])  # [BLOCK_N, BLOCK_M]
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=DOT_PRECISION)  # scale comes at the end

    # Keys beyond the valid ones wrap around to the rows before kv_start: every row of dk and dv is written once.
    valid = (offs_n < num_keys)[:, None]
    position = first_key + offs_n
    position = tl.where(position < T_k, position, position - T_k)
    inside = offs_n < T_k
    dk = tl.where(valid, dk * scale, 0.0)
    dv = tl.where(valid, dv, 0.0)
    _store_rows(dk_ptr + b * stride_dkb + h * stride_dkh, dk, position, stride_dkt, inside, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + b * stride_dvb + h * stride_dvh, dv, position, stride_dvt, inside, HEAD_DIM, BLOCK_D)


def _launch_attention_backward(do, q, k, v, o, lse, dq, dk, dv, options):
    """Writes dq, dk and dv, which have the shapes of q, k and v and strides of their own."""
    B, H, T_q, D = q.shape
    T_k = k.shape[2]
    if q.numel() == 0:
        return
    delta = torch.empty_like(lse)
    for direction, kernel, T, tensors, bytes_per_head in (
        ("dq", _attention_dq_kernel, T_q, (q, k, v, o, do, dq), 2 * T_k * D),
        ("dkdv", _attention_dkdv_kernel, T_k, (q, k, v, do, dk, dv), 2 * T_q * D),
    ):
        config = attention_config(direction, q.dtype, D, dropout=options.seed is not None)
        tiles = triton.cdiv(T, config.BLOCK_M if direction == "dq" else config.BLOCK_N)
        with device_of(q):
            kernel[(B * H * tiles,)](
                *tensors,
                lse,
                delta,
                options.kv_start,
                options.kv_end,
                options.q_start,
                options.seed,
                *(stride for tensor in tensors for stride in tensor.stride()[:3]),
                H,
                T_q,
                T_k,
                heads_in_l2(bytes_per_head * q.element_size(), B * H),
                options.scale,
                options.scale * LOG2E,
                *dropout_numbers(options.dropout_p),
                HEAD_DIM=D,
                BLOCK_D=max(16, triton.next_power_of_2(D)),
                BLOCK_M=config.BLOCK_M,
                BLOCK_N=config.BLOCK_N,
                IS_CAUSAL=options.causal,
                HAS_DROPOUT=options.seed is not None,
                DOT_PRECISION=dot_precision(q.dtype),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=True,
            )
