"""Attention forward: o = softmax(scale q k^T + mask) v and its log-sum-exp, without ever storing the scores.

One program computes BLOCK_M queries of one head. It walks over the keys in tiles of BLOCK_N and keeps, per query, the
running maximum m_i, the running sum l_i of exp2(score - m_i) and the unnormalised output acc: the online softmax of
Milakov and Gimelshein (2018), tiled as in FlashAttention-2 (Dao, 2023, algorithm 1). Scores are in units of log2: the
factor scale * log2(e) is folded into the exponent's one multiply-add, and exp2 is what the hardware computes.

Tiles left of the diagonal need no mask; those on the diagonal and at the tail go through the same loop body with one.
FLOPs: 4 B H T_q T_k D, half of it when causal. Bytes, least: q, k, v and o once each and 4 B H T_q for lse; k and v are
read once more per tile of queries, from L2 while a head's keys fit there.

The row strides of k and v are constexpr: they are a model's width, and a known stride takes the addresses of a tile's
rows out of the loop. l_i is kept in PARTS partial sums per query, one for each column of a group of eight: a thread of
the matrix units' layout owns whole columns of it, so that the sum over threads waits until the loop is done. Both show
in the compiled loop (sm_90, bf16, D = 64, 128 x 128 tiles, 8 warps, Triton 3.7.1): 7.31, then 7.02, then 6.89 SASS
instructions per score of a thread.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.dropout import dropout_key, dropped_weight, keep_mask
from kernels.attention.plans import COUNTS, contiguous_heads, packed_heads, tile_constants
from kernels.attention.tiles import _head, _key_tiles, _load_rows, _locate, _row_bounds, _store_rows, _visible
from kernels.configs import attention_config, heads_in_l2
from kernels.dropout import dropout_numbers
from kernels.launch import Launcher
from kernels.library import LOG2E

PARTS = tl.constexpr(8)


@triton.jit(do_not_specialize=COUNTS)
def _attention_forward_kernel(
    q_ptr,  # [B, H, T_q, HEAD_DIM]
    k_ptr,  # [B, H, T_k, HEAD_DIM]
    v_ptr,  # [B, H, T_k, HEAD_DIM]
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
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
    H,
    T_q,
    T_k,
    heads_per_group,
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
    q_ptr += _head(b, h, stride_qb, stride_qh, VECTOR)
    q = _load_rows(q_ptr, offs_m, stride_qt, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    k_ptr += _head(b, h, stride_kb, stride_kh, VECTOR) + tl.cast(kv_start, tl.int64) * stride_kt
    v_ptr += _head(b, h, stride_vb, stride_vh, VECTOR) + tl.cast(kv_start, tl.int64) * stride_vt
    dropout = 0
    dropped = 0.0
    if HAS_DROPOUT:
        dropout = dropout_key(tl.load(seed_ptr), head)
        dropped = dropped_weight(drop_below)

    full, seen = _key_tiles(tile * BLOCK_M, num_keys, diagonal, BLOCK_M, BLOCK_N, IS_CAUSAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M, PARTS], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # First the tiles that every query sees, without a mask; then those on the diagonal and at the end, with one.
    for MASKED in tl.static_range(2):
        for n in tl.range(full if MASKED else 0, seen if MASKED else full, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr, offs_n, stride_kt, 0, num_keys, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision=DOT_PRECISION)  # [BLOCK_M, BLOCK_N]
            if MASKED:
                visible = _visible(offs_m[:, None], offs_n[None, :], num_keys, diagonal, IS_CAUSAL)
                s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)  # [BLOCK_M]
            m_shift = m_new
            if MASKED:
                # While a query has seen no key its maximum is -inf, and -inf - -inf is NaN.
                m_shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(s * scale_log2 - m_shift[:, None])  # [BLOCK_M, BLOCK_N]
            alpha = tl.math.exp2(m_i - m_shift)  # [BLOCK_M]
            l_i = l_i * alpha[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // PARTS, PARTS]), 1)
            m_i = m_new
            acc = acc * alpha[:, None]
            if HAS_DROPOUT:
                p = tl.where(keep_mask(dropout, tile * BLOCK_M, n, drop_below, BLOCK_M, BLOCK_N), p, dropped)
            v = _load_rows(v_ptr, offs_n, stride_vt, 0, num_keys, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=DOT_PRECISION)

    l_i = tl.sum(l_i, 1)  # [BLOCK_M]
    l_i = tl.where(l_i == 0, 1.0, l_i)  # a query that saw no key: acc is 0 and m_i is -inf; NaN stays NaN
    o = acc / l_i[:, None]  # [BLOCK_M, BLOCK_D]
    if HAS_DROPOUT:
        o = o * keep_scale
    inside = offs_m < T_q
    _store_rows(o_ptr + _head(b, h, stride_ob, stride_oh, VECTOR), o, offs_m, stride_ot, inside, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * T_q + offs_m, m_i + tl.log2(l_i), mask=inside)


def _plan(shape, T_k, q_strides, k_strides, v_strides, dtype, dropout, scale, causal, dropout_p, offsets=None):
    """shape: q's [B, H, T_q, D]; o is [B, T_q, H, D] in memory."""
    B, H, T_q, D = shape
    config = attention_config("forward", dtype, D, T_q, dropout)
    strides = *q_strides[:3], *k_strides[:3], *v_strides[:3], *contiguous_heads(T_q, H, D)
    numbers = (
        *strides,
        H,
        T_q,
        T_k,
        heads_in_l2(2 * T_k * D * dtype.itemsize, B * H),
        scale * LOG2E,
        *dropout_numbers(dropout_p),
    )
    grid = (B * H * triton.cdiv(T_q, config.BLOCK_M),)
    return grid, numbers, tile_constants(config, dtype, strides, D, causal, dropout), offsets or {}


def _packed_plan(shape, strides, num_heads, *rest):
    """shape and strides: those of qkv [B, T, 3C]."""
    B, T, three_C = shape
    C = three_C // 3
    heads = packed_heads(strides, C // num_heads)
    return _plan((B, num_heads, T, C // num_heads), T, heads, heads, heads, *rest, {1: C, 2: 2 * C})


_launch = Launcher(_attention_forward_kernel, _plan)
_launch_packed = Launcher(_attention_forward_kernel, _packed_plan)


def _launch_attention_forward(q, k, v, options):
    """o [B, H, T_q, D] in memory order [B, T_q, H, D], and lse [B, H, T_q], fp32, in units of log2."""
    shape = B, H, T_q, D = q.shape
    # Not a transposed view: autograd lets no view that was made inside a custom function be modified in place.
    o = torch.empty_permuted((B, H, T_q, D), (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    lse = q.new_empty((B, H, T_q), dtype=torch.float32)
    if o.numel():
        kv_start, kv_end, q_start, seed, *numbers = options
        strides = q.stride(), k.stride(), v.stride()
        tensors = (q, k, v, o, lse, kv_start, kv_end, q_start, seed)
        _launch(tensors, shape, k.shape[2], *strides, q.dtype, seed is not None, *numbers)
    return o, lse


def _launch_packed_forward(qkv, num_heads, options):
    """o [B, T, C], and lse [B, H, T], fp32, in units of log2, from qkv [B, T, 3C]."""
    shape = B, T, three_C = qkv.shape
    o = qkv.new_empty((B, T, three_C // 3))
    lse = qkv.new_empty((B, num_heads, T), dtype=torch.float32)
    if B and T:
        kv_start, kv_end, q_start, seed, *numbers = options
        tensors = (qkv, qkv, qkv, o, lse, kv_start, kv_end, q_start, seed)
        _launch_packed(tensors, shape, qkv.stride(), num_heads, qkv.dtype, seed is not None, *numbers)
    return o, lse
