"""Attention backward for Hopper in one pass, for `deterministic=False`: five matrix products where two kernels do 7.

A program has 64 keys, as in hopper_backward.py's second kernel, and walks over the tiles of queries that see them; dk
and dv stay in registers. s and dp are computed once, so each tile also gives its share of dq, which the copy engine
adds up in global memory, in fp32: the shares of several programs arrive in any order, so the last bits of dq differ
from run to run. dk and dv do not. One iteration, tile i in slot i % 3:

    queue  s = k q(i)^T, dp = v do(i)^T, dv += p(i-1) do(i-1), dk += ds(i-1) q(i-1), share = ds(i-1)^T k
    wait   for s, dp                                                 the other three are left
    do     p = exp2(s - lse), ds = p (dp - delta)                    under them
    wait   for them                                                  then slot (i-1) % 3 takes tile i + 2
    do     ds to shared memory, where both products that take it read it, one of them transposed
    do     share to shared memory; one thread has it added to dq     read until the next iteration has come here

Before it a kernel makes -lse and delta, padded as hopper_backward.py says, and zeros for dq; behind it dq is multiplied
by the scale and rounded. Bytes: dq's share of each tile of queries and keys is written once, 4 BLOCK_M D each, added in
L2: T_k / 64 times what dq takes in fp32, half of it when causal.
"""

import torch
import triton
import triton.language as tl
from triton._C.libtriton import gluon_ir, ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.backward import _packed
from kernels.attention.hopper import _Described, _matrix, _scores, _store_rows
from kernels.attention.hopper_backward import SLOTS, _hold, _load_pair, _padded, stats_size
from kernels.attention.tiles import _locate, _row_bounds
from kernels.configs import HOPPER, heads_in_l2
from kernels.launch import Launcher
from kernels.library import LOG2E

# From here on `deterministic=False` takes it. At T keys a query's share of dq is written T / 128 times in fp32 when
# causal: at 2048 these bytes are 32 times dq's in bf16, all in L2, and two of seven products are saved. Not measured.
LEAST_QUERIES = 2048
# Triton 3.6 and 3.7 lower it, and Gluon has no name for it yet.
CAN_ADD = hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce")


def refusal(head_dim):
    """What this kernel does not support beside what hopper.refusal says, in words, or None."""
    if head_dim not in HOPPER["one pass"]:
        return f"head_dim {head_dim}: {' or '.join(map(str, HOPPER['one pass']))} is required"
    if not CAN_ADD:
        return f"Triton {triton.__version__}, whose Gluon has no create_async_tma_reduce, by which the copy engine adds"
    return None


@builtin
def _add_tile(tensor_desc, coord, src, _semantic=None):
    """The copy engine adds a tile of shared memory to a tensor's; asynchronous, as async_copy_shared_to_global is."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, coord, src.handle)


@triton.jit
def _prepare_kernel(
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    do_ptr,  # [B, H, T_q, HEAD_DIM]
    sums_ptr,  # [B, H, T_q, HEAD_DIM] fp32, contiguous
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    stats_ptr,  # [B, H, T_pad / TILE, 2, TILE] fp32: -lse and delta
    stride_ob,
    stride_oh,
    stride_ot,
    stride_dob,
    stride_doh,
    stride_dot,
    H,
    T_q,
    T_pad,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of ROWS queries of one head: -lse, delta, and zeros where dq will be added up."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    offs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_DIM)
    inside = offs < T_q
    rows = offs.to(tl.int64)[:, None]
    o = tl.load(o_ptr + b * stride_ob + h * stride_oh + rows * stride_ot + offs_d, mask=inside[:, None], other=0.0)
    do_ptrs = do_ptr + b * stride_dob + h * stride_doh + rows * stride_dot + offs_d
    do = tl.load(do_ptrs, mask=inside[:, None], other=0.0)
    stats_ptr += head * 2 * T_pad + offs // TILE * (2 * TILE) + offs % TILE
    tl.store(stats_ptr, -tl.load(lse_ptr + head * T_q + offs, mask=inside, other=0.0))
    tl.store(stats_ptr + TILE, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))
    zeros = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    tl.store(sums_ptr + (head * T_q + rows) * HEAD_DIM + offs_d, zeros, mask=inside[:, None])


@gluon.jit
def _hand_on(share, share_slot, dq_desc, bi, hi, m):
    """Has dq's share of a tile of queries added, once the one before has been read out of its place."""
    tma.store_wait(0)
    share_slot.store(gl.reshape(share, [1, 1, share.shape[0], share.shape[1]]))
    fence_async_shared()
    _add_tile(dq_desc, [bi, hi, m, 0], share_slot)


@gluon.jit
def _attention_one_pass_kernel(
    q_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    k_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    v_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    do_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    dq_desc,  # [B, H, T_q, HEAD_DIM] fp32 in tiles [1, 1, BLOCK_M, HEAD_DIM]: sums, without the scale
    dk_ptr,  # [B, H, T_k, HEAD_DIM]
    dv_ptr,  # [B, H, T_k, HEAD_DIM]
    stats_ptr,  # [B, H, T_pad / BLOCK_M, 2, BLOCK_M] fp32: -lse in log2 units, and delta
    q_start_ptr,  # [B] int32 or None
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    H,
    T_q,
    T_k,
    T_pad,
    heads_per_group,
    scale,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    ds_shape: gl.constexpr = [BLOCK_N, BLOCK_M]
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(ds_shape, dtype)

    k_slot = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_slot = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_slots = gl.allocate_shared_memory(dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)
    do_slots = gl.allocate_shared_memory(dtype, [SLOTS] + do_desc.block_type.shape, do_desc.layout)
    p_slots = gl.allocate_shared_memory(dtype, [2] + ds_shape, ds_layout)
    ds_slot = gl.allocate_shared_memory(dtype, ds_shape, ds_layout)
    share_slot = gl.allocate_shared_memory(gl.float32, dq_desc.block_type.shape, dq_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())  # of tiles, and k and v
    for i in gl.static_range(SLOTS + 1):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()  # the copy engine sees them

    # The first tile of keys is seen by the most queries: tiles already come longest first.
    tile, b, h = _locate(gl.cdiv(T_k, BLOCK_N), H, heads_per_group, False)
    head = b * H + h
    _, _, diagonal = _row_bounds(b, None, None, q_start_ptr, T_q, T_k)
    n = tile * BLOCK_N
    # Queries before `seen` see no key of the tile, queries from `all_from` on see all of them.
    first = 0
    masked = 0
    if IS_CAUSAL:
        seen = gl.maximum(n - diagonal, 0)
        all_from = gl.maximum(n + BLOCK_N - 1 - diagonal, 0)
        first = gl.minimum(seen // BLOCK_M, gl.cdiv(T_q, BLOCK_M) - 1)  # at least one tile, be it all masked
        masked = gl.cdiv(all_from, BLOCK_M) - first
    first *= BLOCK_M  # tile i holds the queries from first + i * BLOCK_M on
    tiles = gl.cdiv(T_q - first, BLOCK_M)
    # The first ones; all, where rows of the tile lie beyond the last key: there p may be infinite, and inf * 0 is NaN.
    masked = gl.where(n + BLOCK_N > T_k, tiles, gl.minimum(gl.maximum(masked, 1), tiles))
    bi = b.to(gl.int32)
    hi = h.to(gl.int32)
    _load_pair(k_desc, v_desc, bi, hi, n, full.index(SLOTS), k_slot.index(0), v_slot.index(0), True)
    for i in gl.static_range(2):
        m = first + i * BLOCK_M
        _load_pair(q_desc, do_desc, bi, hi, m, full.index(i), q_slots.index(i), do_slots.index(i), i < tiles)

    offs_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    NEVER: gl.constexpr = 2**31 - 1
    from_query = offs_n - diagonal if IS_CAUSAL else gl.zeros_like(offs_n)  # from which on a key is seen
    from_query = gl.where(offs_n < T_k, from_query, NEVER)
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
    stats_ptr += head * 2 * T_pad + 2 * first
    k = _matrix(k_slot, 0, BLOCK_N, HEAD_DIM)
    v = _matrix(v_slot, 0, BLOCK_N, HEAD_DIM)
    minus_lse = gl.load(stats_ptr + columns.to(gl.int64))  # [BLOCK_M]
    delta = gl.load(stats_ptr + BLOCK_M + columns.to(gl.int64))  # [BLOCK_M]
    mbarrier.wait(full.index(SLOTS), 0)
    mbarrier.wait(full.index(0), 0)
    s = _scores(k, _matrix(q_slots, 0, BLOCK_M, HEAD_DIM))  # [BLOCK_N, BLOCK_M]
    dp = _scores(v, _matrix(do_slots, 0, BLOCK_M, HEAD_DIM))
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p_new = gl.exp2(s * scale_log2 + minus_lse[None, :])
    p_new = gl.where((first + columns)[None, :] >= from_query[:, None], p_new, 0.0)
    dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, d_layout)
    dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, d_layout)
    p_slots.index(0).store(p_new.to(dtype))
    ds_slot.store((p_new * (dp - delta[None, :])).to(dtype))
    fence_async_shared()
    m = first + 2 * BLOCK_M
    _load_pair(q_desc, do_desc, bi, hi, m, full.index(2), q_slots.index(2), do_slots.index(2), tiles > 2)

    nothing = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, d_layout)
    for PART in gl.static_range(2):
        for i in range(masked if PART else 1, tiles if PART else masked):
            m = first + i * BLOCK_M
            slot = i % SLOTS
            old = (i - 1) % SLOTS
            parity = (i // SLOTS) & 1
            stats_ptr += 2 * BLOCK_M
            minus_lse = gl.load(stats_ptr + columns.to(gl.int64))
            mbarrier.wait(full.index(slot), parity)
            s = _scores(k, _matrix(q_slots, slot, BLOCK_M, HEAD_DIM))
            dp = _scores(v, _matrix(do_slots, slot, BLOCK_M, HEAD_DIM))
            dv = warpgroup_mma(p_slots.index((i - 1) & 1), _matrix(do_slots, old, BLOCK_M, HEAD_DIM), dv, is_async=True)
            dk = warpgroup_mma(ds_slot, _matrix(q_slots, old, BLOCK_M, HEAD_DIM), dk, is_async=True)
            share = warpgroup_mma(ds_slot.permute((1, 0)), k, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(4, deps=(s,))
            p_new = gl.exp2(s * scale_log2 + minus_lse[None, :])
            if PART == 0:
                p_new = gl.where((m + columns)[None, :] >= from_query[:, None], p_new, 0.0)
            p_slots.index(i & 1).store(p_new.to(dtype))
            delta = gl.load(stats_ptr + BLOCK_M + columns.to(gl.int64))  # here, as registers are short
            mbarrier.wait(full.index(slot), parity)
            dp = warpgroup_mma_wait(3, deps=(dp,))
            ds_new = _hold((p_new * (dp - delta[None, :])).to(dtype), 3, full.index(slot), parity)
            dv, dk, share = warpgroup_mma_wait(0, deps=(dv, dk, share))
            more = i + 2 < tiles
            m_next = m + 2 * BLOCK_M
            _load_pair(q_desc, do_desc, bi, hi, m_next, full.index(old), q_slots.index(old), do_slots.index(old), more)
            ds_slot.store(ds_new)
            _hand_on(share, share_slot, dq_desc, bi, hi, m - BLOCK_M)  # its fence is that of ds too

    slot = (tiles - 1) % SLOTS
    dv = warpgroup_mma(p_slots.index((tiles - 1) & 1), _matrix(do_slots, slot, BLOCK_M, HEAD_DIM), dv, is_async=True)
    dk = warpgroup_mma(ds_slot, _matrix(q_slots, slot, BLOCK_M, HEAD_DIM), dk, is_async=True)
    share = warpgroup_mma(ds_slot.permute((1, 0)), k, nothing, use_acc=False, is_async=True)
    dv, dk, share = warpgroup_mma_wait(0, deps=(dv, dk, share))
    _hand_on(share, share_slot, dq_desc, bi, hi, first + (tiles - 1) * BLOCK_M)
    # Rows counted from the tile's own first one, which saves a register that would live through the loops.
    dv_ptr += b * stride_dvb + h * stride_dvh + n.to(gl.int64) * stride_dvt
    dk_ptr += b * stride_dkb + h * stride_dkh + n.to(gl.int64) * stride_dkt
    _store_rows(dv_ptr, dv, 0, T_k - n, stride_dvt, dtype)
    _store_rows(dk_ptr, dk * scale, 0, T_k - n, stride_dkt, dtype)
    tma.store_wait(0)


def _prepare_plan(shape, o, do, T_pad):
    B, H, T_q, D = shape
    ROWS = 32
    numbers = (*o[:3], *do[:3], H, T_q, T_pad)
    return (
        (T_pad // ROWS, B * H),
        numbers,
        {"HEAD_DIM": D, "ROWS": ROWS, "TILE": HOPPER["one pass"][D].BLOCK_M, "num_warps": 4},
        {},
    )


def _one_pass_plan(shape, T_k, q, k, v, o, do, dq, dk, dv, dtype, scale, causal, has_q_start, offsets=None):
    """Strides [B, H, T, D]; that of dq says nothing here: it is added up in a tensor of its own."""
    B, H, T_q, D = shape
    config = HOPPER["one pass"][D]
    keys, sums = (B, H, T_k, D), (H * T_q * D, T_q * D, D)
    descriptors = {
        0: _Described(shape, q[:3], config.BLOCK_M, dtype),
        1: _Described(keys, k[:3], config.BLOCK_N, dtype),
        2: _Described(keys, v[:3], config.BLOCK_N, dtype),
        3: _Described(shape, do[:3], config.BLOCK_M, dtype),
        4: _Described(shape, sums, config.BLOCK_M, torch.float32),
    }
    heads_per_group = heads_in_l2(2 * T_q * D * dtype.itemsize, B * H)
    numbers = (*dk[:3], *dv[:3], H, T_q, T_k, _padded(T_q), heads_per_group, scale, scale * LOG2E)
    options = {
        "HEAD_DIM": D,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "IS_CAUSAL": causal,
        "num_warps": config.num_warps,
    }
    return (B * H * triton.cdiv(T_k, config.BLOCK_N),), numbers, options, offsets or {}, descriptors


_launch_prepare = Launcher(_prepare_kernel, _prepare_plan)
_launch = Launcher(_attention_one_pass_kernel, _one_pass_plan)
_launch_packed = Launcher(_attention_one_pass_kernel, _packed(_one_pass_plan, {1: 1, 2: 2, 5: 1, 6: 2}, None))


def _prepared(do, o, lse):
    """stats, and zeros [B, H, T_q, D] for dq; o and do [B, H, T_q, D]."""
    sums = lse.new_empty(o.shape)
    stats = lse.new_empty(stats_size(*lse.shape))
    _launch_prepare((o, do, sums, lse, stats), o.shape, o.stride(), do.stride(), _padded(o.shape[2]))
    return sums, stats


def _launch_one_pass_backward(do, q, k, v, o, lse, dq, dk, dv, options):
    """As hopper_backward.py's launcher."""
    if q.numel():
        sums, stats = _prepared(do, o, lse)
        strides = [x.stride() for x in (q, k, v, o, do, dq, dk, dv)]
        key = (q.shape, k.shape[2], *strides, q.dtype, options.scale, options.causal, options.q_start is not None)
        _launch((q, k, v, do, sums, dk, dv, stats, options.q_start), *key)
        torch.mul(sums, options.scale, out=dq)
    else:
        dk.zero_()  # no query at all, but there may be keys
        dv.zero_()


def _launch_packed_one_pass_backward(do, qkv, o, lse, num_heads, options):
    """dqkv [B, T, 3C], contiguous."""
    B, T, three_C = shape = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if B and T:
        o_heads, do_heads = (x.view(B, T, num_heads, -1).transpose(1, 2) for x in (o, do))
        sums, stats = _prepared(do_heads, o_heads, lse)
        numbers = qkv.dtype, options.scale, options.causal, options.q_start is not None
        key = (shape, qkv.stride(), o.stride(), do.stride(), num_heads, *numbers, 0)
        _launch_packed((qkv, qkv, qkv, do, sums, dqkv, dqkv, stats, options.q_start), *key)
        dq = dqkv[..., : three_C // 3].view(B, T, num_heads, -1).transpose(1, 2)
        torch.mul(sums, options.scale, out=dq)
    return dqkv
