"""Attention's dropout mask, written out for a seed. For tests and for debugging.

The attention kernels draw the same mask tile by tile (kernels.dropout.dropout_mask) and store it nowhere.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.tiles import _row_bounds
from kernels.checks import check_device, dense
from kernels.dropout import dropout_mask, dropout_numbers
from kernels.launch import Launcher
from kernels.library import define_op


@triton.jit
def _attention_keep_kernel(
    keep_ptr,  # [B, H, T_q, T_k] bool
    seed_ptr,
    kv_start_ptr,
    H,
    T_q,
    T_k,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(T_q, BLOCK_M) * tl.cdiv(T_k, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    kv_start, _, _ = _row_bounds(head // H, kv_start_ptr, None, None, T_q, T_k)
    offs_m = tile % tl.cdiv(T_q, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tl.cdiv(T_q, BLOCK_M) * BLOCK_N
    position = kv_start + n + tl.arange(0, BLOCK_N)
    keep = dropout_mask(tl.load(seed_ptr), head, offs_m, n, drop_below, BLOCK_M, BLOCK_N)
    ptrs = keep_ptr + (head * T_q + offs_m[:, None]) * T_k + position[None, :]
    tl.store(ptrs, keep, mask=(offs_m < T_q)[:, None] & (position < T_k)[None, :])


def _plan(B, H, T_q, T_k, dropout_p):
    grid = (triton.cdiv(T_q, 16) * triton.cdiv(T_k, 64) * B * H,)
    return grid, (H, T_q, T_k, dropout_numbers(dropout_p)[1]), {"BLOCK_M": 16, "BLOCK_N": 64}, {}


_launch = Launcher(_attention_keep_kernel, _plan)


def _keep_mask(seed, B, H, T_q, T_k, dropout_p, kv_start):
    check_device("attention_keep_mask", seed, "seed")
    keep = torch.zeros(B, H, T_q, T_k, dtype=torch.bool, device=seed.device)
    _launch((keep, seed, dense(kv_start)), B, H, T_q, T_k, dropout_p)
    return keep


attention_keep_mask = define_op(
    "attention_keep_mask(Tensor seed, int B, int H, int T_q, int T_k, float dropout_p, Tensor? kv_start) -> Tensor",
    _keep_mask,
    lambda seed, B, H, T_q, T_k, dropout_p, kv_start: seed.new_empty(B, H, T_q, T_k, dtype=torch.bool),
)
attention_keep_mask.__doc__ = "Attention's dropout keep-mask for a seed, bool [B, H, T_q, T_k]."
