"""Attention decode: a few queries (1 to 16) against a long cache, by splitting the keys over programs.

With one query per head the forward kernel would give one program per head, and a chip of 132 SMs would idle. Here each
program takes one split of SPLIT keys, one tile, without a loop, and leaves that split's output and log-sum-exp; a
second kernel merges the splits of each query (Flash-Decoding, Dao et al., 2023). A single query is a matrix-vector
product: multiply and sum, on no matrix unit, since a padded tl.dot would do sixteen times the work.

The size of a split is fixed by the head dim and the dtype; the number of splits is not chosen to fill the chip. So a
row's result does not depend on the batch around it, nor on how long the cache's buffer is: the merge goes through the
row's own splits in order, and stops where they end.

FLOPs: 4 B H T_q T_k D. Bytes, least: k and v once each, 4 B H T_k D at two bytes per element; the partial results add
8 T_q / SPLIT bytes per 4 bytes of cache.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.attention.plans import constants, contiguous_heads
from kernels.attention.tiles import _head, _load_rows, _row_bounds, _store_rows, _visible
from kernels.launch import Launcher
from kernels.library import LOG2E, dot_precision

MAX_QUERIES = 16
MERGED_AT_ONCE = 8


@triton.jit
def _attention_decode_kernel(
    q_ptr,  # [B, H, T_q, HEAD_DIM]
    k_ptr,  # [B, H, T_k, HEAD_DIM]
    v_ptr,  # [B, H, T_k, HEAD_DIM]
    partial_ptr,  # [B, H, splits, T_q, BLOCK_D] fp32: acc of each split
    lse_ptr,  # [B, H, splits, T_q] fp32, log2 units
    kv_start_ptr,  # [B] int32 or None
    kv_end_ptr,  # [B] int32 or None
    q_start_ptr,  # [B] int32 or None
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt: tl.constexpr,
    stride_vb,
    stride_vh,
    stride_vt: tl.constexpr,
    H,
    T_q,
    T_k,
    num_splits,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    # One dimension: along y and z a grid ends at 65535, which B * H may exceed.
    split = tl.program_id(0) % num_splits
    head = (tl.program_id(0) // num_splits).to(tl.int64)
    b = head // H
    h = head % H
    kv_start, num_keys, diagonal = _row_bounds(b, kv_start_ptr, kv_end_ptr, q_start_ptr, T_q, T_k)
    if split * SPLIT >= num_keys:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = split * SPLIT + tl.arange(0, SPLIT)
    first_key = tl.cast(kv_start, tl.int64)
    k_ptr += _head(b, h, stride_kb, stride_kh, VECTOR) + first_key * stride_kt
    v_ptr += _head(b, h, stride_vb, stride_vh, VECTOR) + first_key * stride_vt
    k = _load_rows(k_ptr, offs_n, stride_kt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [SPLIT, BLOCK_D]
    v = _load_rows(v_ptr, offs_n, stride_vt, 0, num_keys, HEAD_DIM, BLOCK_D, True)  # [SPLIT, BLOCK_D]
    q_ptr += _head(b, h, stride_qb, stride_qh, VECTOR)
    q = _load_rows(q_ptr, offs_m, stride_qt, 0, T_q, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]

    if BLOCK_M == 1:
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]  # [1, SPLIT]
    else:
        s = tl.dot(q, tl.trans(k), input_precision=DOT_PRECISION)  # [BLOCK_M, SPLIT]
    s = tl.where(_visible(offs_m[:, None], offs_n[None, :], num_keys, diagonal, IS_CAUSAL), s, float("-inf"))
    m_i = tl.max(s, 1) * scale_log2  # [BLOCK_M]
    m_shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    p = tl.math.exp2(s * scale_log2 - m_shift[:, None])  # [BLOCK_M, SPLIT]
    l_i = tl.sum(p, 1)
    l_i = tl.where(l_i == 0, 1.0, l_i)
    if BLOCK_M == 1:
        acc = tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]  # [1, BLOCK_D]
    else:
        acc = tl.dot(p.to(v.dtype), v, input_precision=DOT_PRECISION)  # [BLOCK_M, BLOCK_D]

    inside = offs_m < T_q
    row = (head * num_splits + split) * T_q
    _store_rows(partial_ptr + row * BLOCK_D, acc / l_i[:, None], offs_m, BLOCK_D, inside, BLOCK_D, BLOCK_D)
    tl.store(lse_ptr + row + offs_m, m_i + tl.log2(l_i), mask=inside)


@triton.jit
def _attention_merge_kernel(
    partial_ptr,  # [B, H, splits, T_q, BLOCK_D] fp32
    split_lse_ptr,  # [B, H, splits, T_q] fp32, log2 units
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    kv_start_ptr,  # [B] int32 or None
    kv_end_ptr,  # [B] int32 or None
    stride_ob,
    stride_oh,
    stride_ot,
    H,
    T_q,
    T_k,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One query of one head: o = sum of its splits' outputs, weighted by exp2 of their log-sum-exp."""
    i = tl.program_id(0) % T_q
    head = (tl.program_id(0) // T_q).to(tl.int64)
    b = head // H
    h = head % H
    _, num_keys, _ = _row_bounds(b, kv_start_ptr, kv_end_ptr, None, T_q, T_k)
    filled = tl.cdiv(tl.maximum(num_keys, 0), SPLIT)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    l_i = 0.0
    m_i = float("-inf")
    for first in tl.range(0, filled, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        row = (head * num_splits + offs_s) * T_q + i
        lse = tl.load(split_lse_ptr + row, mask=offs_s < filled, other=float("-inf"))  # [BLOCK_S]
        ptrs = partial_ptr + row[:, None] * BLOCK_D + offs_d
        partial = tl.load(ptrs, mask=(offs_s < filled)[:, None], other=0.0)  # [BLOCK_S, BLOCK_D]
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.math.exp2(lse - m_shift)  # [BLOCK_S]
        alpha = tl.math.exp2(m_i - m_shift)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * partial, 0)
        m_i = m_new
    l_i = tl.where(l_i == 0, 1.0, l_i)
    o = acc / l_i  # [BLOCK_D]
    o_ptr += _head(b, h, stride_ob, stride_oh, VECTOR) + i.to(tl.int64) * stride_ot
    tl.store(o_ptr + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    tl.store(lse_ptr + head * T_q + i, m_i + tl.log2(l_i))


def _decode_plan(shape, T_k, q_strides, k_strides, v_strides, dtype, scale, causal):
    B, H, T_q, D = shape
    SPLIT = split_size(D, dtype.itemsize)
    num_splits = triton.cdiv(T_k, SPLIT)
    strides = *q_strides[:3], *k_strides[:3], *v_strides[:3]
    numbers = (*strides, H, T_q, T_k, num_splits, scale * LOG2E)
    options = constants(
        strides,
        D,
        BLOCK_M=1 if T_q == 1 else MAX_QUERIES,
        SPLIT=SPLIT,
        IS_CAUSAL=causal,
        DOT_PRECISION=dot_precision(dtype),
        num_warps=4,
    )
    return (num_splits * B * H,), numbers, options, {}


def _merge_plan(shape, T_k, dtype):
    B, H, T_q, D = shape
    SPLIT = split_size(D, dtype.itemsize)
    strides = contiguous_heads(T_q, H, D)
    numbers = (*strides, H, T_q, T_k, triton.cdiv(T_k, SPLIT))
    return (T_q * B * H,), numbers, constants(strides, D, BLOCK_S=MERGED_AT_ONCE, SPLIT=SPLIT, num_warps=1), {}


_launch_decode = Launcher(_attention_decode_kernel, _decode_plan)
_launch_merge = Launcher(_attention_merge_kernel, _merge_plan)


def _launch_attention_decode(q, k, v, options):
    """o [B, H, T_q, D] in memory order [B, T_q, H, D], and lse [B, H, T_q], fp32, in units of log2. T_q <= 16."""
    shape = B, H, T_q, D = q.shape
    T_k = k.shape[2]
    o = torch.empty_permuted((B, H, T_q, D), (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    lse = q.new_empty((B, H, T_q), dtype=torch.float32)
    if o.numel():
        num_splits = -(-T_k // split_size(D, q.dtype.itemsize))
        BLOCK_D = _padded(D)
        partial = q.new_empty((B, H, num_splits, T_q, BLOCK_D), dtype=torch.float32)
        split_lse = q.new_empty((B, H, num_splits, T_q), dtype=torch.float32)
        kv_start, kv_end, q_start, _, scale, causal, _ = options
        strides = q.stride(), k.stride(), v.stride()
        tensors = (q, k, v, partial, split_lse, kv_start, kv_end, q_start)
        _launch_decode(tensors, shape, T_k, *strides, q.dtype, scale, causal)
        _launch_merge((partial, split_lse, o, lse, kv_start, kv_end), shape, T_k, q.dtype)
    return o, lse


@functools.lru_cache
def _padded(head_dim):
    return max(16, triton.next_power_of_2(head_dim))


@functools.lru_cache
def split_size(head_dim, bytes_per_element):
    """Keys per split: a tile of k of 16 KB, and never fewer than tl.dot takes."""
    return max(16, min(128, 2**14 // (triton.next_power_of_2(head_dim) * bytes_per_element)))
