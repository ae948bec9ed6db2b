"""Attention's dropout: the mask as its kernels draw it, tile by tile, and written out for tests and debugging.

A thread of the matrix units' layout holds, of every 16 x 16 scores, rows r and r + 8 and columns c and c + 8, whether
queries go down (forward, dq) or keys do (dk, dv). One call of Philox decides these four, so that each thread draws for
its own scores and nothing is exchanged. (Philox2x32 with 7 rounds: Salmon et al., 2011.)
"""

import torch
import triton
import triton.language as tl

from kernels.attention.tiles import _row_bounds
from kernels.checks import check_device, dense
from kernels.dropout import dropout_numbers
from kernels.launch import Launcher
from kernels.library import define_op


@triton.jit
def dropout_key(seed, head):
    """The key of one head's draws, a uint32."""
    key, _, _, _ = tl.philox(seed, head.to(tl.uint32), (head >> 32).to(tl.uint32), 0, 0)
    return key


@triton.jit
def _philox(key, c0, c1):
    """Philox2x32: two words of 32 random bits for each counter (c0, c1), both uint32."""
    for _ in tl.static_range(7):
        high = tl.math.umulhi(c0, 0xD256D193)
        low = tl.mul(c0, 0xD256D193, sanitize_overflow=False)
        c0, c1 = high ^ key ^ c1, low
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return c0, c1


@triton.jit
def dropped_weight(drop_below):
    """0 in fp32, but to the compiler a number like any other.

    A constant it would take into the rounding to two bytes that follows: two instructions for each weight, not one.
    """
    return (drop_below >> 16).to(tl.float32)


@triton.jit
def keep_mask(key, m, n, drop_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """True with probability 1 - drop_below / 65536 for queries m to m + BLOCK_M and keys n to n + BLOCK_N.

    m and n: multiples of 16. [BLOCK_M, BLOCK_N] bool, or [BLOCK_N, BLOCK_M] if TRANSPOSED.
    """
    # Query 16 i + j and the query 8 beyond it, for j below 8, are pair 8 i + j; so with keys.
    query_pair = (m // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)
    key_pair = (n // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)
    if TRANSPOSED:
        query_pair, key_pair = tl.broadcast(query_pair[None, :], key_pair[:, None])
    else:
        query_pair, key_pair = tl.broadcast(query_pair[:, None], key_pair[None, :])
    a, b = _philox(key, query_pair, key_pair)
    # 16 bits a score, in the upper half of a word: [.., .., 2 keys, 2 queries].
    bits = tl.join(tl.join(a << 16, a), tl.join(b << 16, b))
    if TRANSPOSED:
        bits = tl.reshape(bits, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
        bits = tl.reshape(tl.permute(bits, 0, 4, 1, 2, 5, 3), [BLOCK_N, BLOCK_M])
    else:
        bits = tl.reshape(bits, [BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2])
        bits = tl.reshape(tl.permute(bits, 0, 5, 1, 2, 4, 3), [BLOCK_M, BLOCK_N])
    return bits >= (drop_below.to(tl.uint32) << 16)


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
    m = tile % tl.cdiv(T_q, BLOCK_M) * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    n = tile // tl.cdiv(T_q, BLOCK_M) * BLOCK_N
    position = kv_start + n + tl.arange(0, BLOCK_N)
    keep = keep_mask(dropout_key(tl.load(seed_ptr), head), m, n, drop_below, BLOCK_M, BLOCK_N)
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
