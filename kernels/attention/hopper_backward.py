"""Attention backward for Hopper, in Gluon: backward.py's two kernels with their products in flight under the rest.

The same formulas and units, and results within the same tolerances; what hopper.py says of copies, slots, waits and
what the compiler does not check holds here too. A program is one warpgroup with 64 rows: queries for dq, keys for dk
and dv. Tiles of the other side come by TMA, both tensors of a tile into one of three slots and counted by one mbarrier:
tile j uses slot j % 3, its phase has parity (j // 3) % 2. One iteration of dq:

    queue  s = q k(j)^T, dp = do v(j)^T, dq += ds(j-1) k(j-1)      asynchronous, in this order
    wait   for s                                                    two are left
    do     p = exp2(s - lse)                                        under dp and dq
    wait   for dp
    do     ds = p (dp - delta)                                      under dq
    wait   for dq                                                   then slot (j-1) % 3 takes tile j + 2
    do     ds to fp16

and of dk and dv, with scores transposed, keys by queries, so that p and ds are left operands again:

    queue  s = k q(i)^T, dp = v do(i)^T, dv += p(i-1) do(i-1), dk += ds(i-1) q(i-1)
    ...    the same, and at the end slot (i-1) % 3 takes tile i + 2

ptxas would move the waits up, in front of the elementwise part; it moves nothing across the loop that waits for an
mbarrier, so before each wait for a product stands one for a phase that is long over (_hold).

The first kernel hands -lse and delta on in rows of a multiple of 64 queries, 0 beyond T_q: so the second loads them
without a mask and in pairs, whatever T_q is, and a query beyond the last one adds nothing: q and do are 0 there, so
p = 1, dp = 0, ds = 0. Keys beyond the last one make rows of dk and dv that are not stored.

No atomics: two runs give the same bits. FLOPs and bytes are backward.py's.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.backward import _packed
from kernels.attention.hopper import _copy_tile, _Described, _matrix, _scores, _store_rows
from kernels.attention.tiles import _key_tiles, _locate, _row_bounds
from kernels.configs import heads_in_l2, hopper_config
from kernels.launch import Launcher
from kernels.library import LOG2E

SLOTS = gl.constexpr(3)
STATS_ROWS = 64  # a multiple of every BLOCK_M


@gluon.jit
def _load_pair(a_desc, b_desc, b, h, row, full, a_slot, b_slot, pred):
    """Starts the copies of rows from `row` on of one head of two tensors; `full` flips when both are there."""
    mbarrier.expect(full, a_desc.block_type.nbytes + b_desc.block_type.nbytes, pred=pred)
    _copy_tile(a_desc, [b, h, row, 0], full, a_slot, pred=pred)
    _copy_tile(b_desc, [b, h, row, 0], full, b_slot, pred=pred)


@gluon.jit
def _hold(x, in_flight: gl.constexpr, full, parity):
    """x, computed here and not behind what follows: the first wait, which is for nothing, keeps LLVM from that.

    The second, for a phase that is long over, keeps ptxas from moving the next wait up.
    """
    x = warpgroup_mma_wait(in_flight, deps=(x,))
    mbarrier.wait(full, parity)
    return x


@gluon.jit
def _left(x, like, dtype: gl.constexpr):
    """x, an accumulator, as the left operand in registers of a product that accumulates like `like`."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, like.type.layout, k_width=2))


@gluon.jit
def _store_sums(partial_ptr, rows, first, T, dtype: gl.constexpr, program, column, width):
    """tiles._store_sums of an accumulator [64, HEAD_DIM], the rows from `first` on: those below T."""
    below = first + gl.arange(0, rows.shape[0], layout=gl.SliceLayout(1, rows.type.layout)) < T
    sums = gl.sum(gl.where(below[:, None], rows.to(dtype).to(gl.float32), 0.0), 0)  # [HEAD_DIM]
    offs_d = gl.arange(0, rows.shape[1], layout=gl.SliceLayout(0, rows.type.layout))
    gl.store(partial_ptr + program * width + column + offs_d, sums)


@gluon.jit
def _attention_dq_hopper_kernel(
    q_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    k_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    v_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    do_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    do_ptr,  # [B, H, T_q, HEAD_DIM]
    dq_ptr,  # [B, H, T_q, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    stats_ptr,  # [B, H, 2, T_pad] fp32: -lse and delta, for the other kernel
    q_start_ptr,  # [B] int32 or None
    partial_ptr,  # [B tiles, H HEAD_DIM] fp32 or None: the sums of dq over the rows of each tile
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
    T_pad,
    heads_per_group,
    scale,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    ONE_MASK: gl.constexpr,  # the first tile is the only one that needs a mask
):
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)

    q_slot = gl.allocate_shared_memory(dtype, [1] + q_desc.block_type.shape, q_desc.layout)
    do_slot = gl.allocate_shared_memory(dtype, [1] + do_desc.block_type.shape, do_desc.layout)
    k_slots = gl.allocate_shared_memory(dtype, [SLOTS] + k_desc.block_type.shape, k_desc.layout)
    v_slots = gl.allocate_shared_memory(dtype, [SLOTS] + v_desc.block_type.shape, v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())  # of tiles, and q and do
    for i in gl.static_range(SLOTS + 1):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()  # the copy engine sees them

    tile, b, h = _locate(gl.cdiv(T_q, BLOCK_M), H, heads_per_group, IS_CAUSAL)
    head = b * H + h
    _, num_keys, diagonal = _row_bounds(b, None, None, q_start_ptr, T_q, T_k)
    m = tile * BLOCK_M
    first_full, seen = _key_tiles(m, num_keys, diagonal, BLOCK_M, BLOCK_N, IS_CAUSAL)
    tiles = gl.maximum(gl.cdiv(seen, BLOCK_N), 1)  # tile j holds the keys from (tiles - 1 - j) * BLOCK_N on
    masked = gl.maximum(tiles - first_full // BLOCK_N, 1)  # the first ones
    bi = b.to(gl.int32)
    hi = h.to(gl.int32)
    last = (tiles - 1) * BLOCK_N
    _load_pair(q_desc, do_desc, bi, hi, m, full.index(SLOTS), q_slot.index(0), do_slot.index(0), True)
    for i in gl.static_range(2):
        n = last - i * BLOCK_N
        _load_pair(k_desc, v_desc, bi, hi, n, full.index(i), k_slots.index(i), v_slots.index(i), i < tiles)

    offs_m = m + gl.arange(0, BLOCK_M, layout=rows)
    end = gl.zeros_like(offs_m) + num_keys
    if IS_CAUSAL:
        end = gl.minimum(end, diagonal + offs_m + 1)
    lse = gl.load(lse_ptr + head * T_q + offs_m, mask=offs_m < T_q, other=0.0)  # [BLOCK_M]
    stats_ptr += head * 2 * T_pad
    gl.store(stats_ptr + offs_m, -lse)
    # Eight neighbours of a row to a thread: 16 bytes.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    wide_m = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    wide_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
    inside = (wide_m < T_q)[:, None]
    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + (wide_m.to(gl.int64) * stride_ot)[:, None] + wide_d[None, :]
    do_ptrs = do_ptr + b * stride_dob + h * stride_doh + (wide_m.to(gl.int64) * stride_dot)[:, None] + wide_d[None, :]
    o = gl.load(o_ptrs, mask=inside, other=0.0)
    do = gl.load(do_ptrs, mask=inside, other=0.0)
    delta = gl.convert_layout(gl.sum(o.to(gl.float32) * do.to(gl.float32), 1), rows)  # [BLOCK_M]
    gl.store(stats_ptr + T_pad + offs_m, delta)

    q = _matrix(q_slot, 0, BLOCK_M, HEAD_DIM)
    do = _matrix(do_slot, 0, BLOCK_M, HEAD_DIM)
    mbarrier.wait(full.index(SLOTS), 0)
    mbarrier.wait(full.index(0), 0)
    s = _scores(q, _matrix(k_slots, 0, BLOCK_N, HEAD_DIM))
    dp = _scores(do, _matrix(v_slots, 0, BLOCK_N, HEAD_DIM))
    s = warpgroup_mma_wait(1, deps=(s,))
    offs_n = last + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    p = gl.exp2(s * scale_log2 - lse[:, None])
    p = gl.where(end[:, None] > offs_n[None, :], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dq = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, dq_layout)
    ds = _left(p * (dp - delta[:, None]), dq, dtype)
    n = last - 2 * BLOCK_N
    _load_pair(k_desc, v_desc, bi, hi, n, full.index(2), k_slots.index(2), v_slots.index(2), tiles > 2)

    # Then the other tiles with a mask, then those without one.
    for PART in gl.static_range(1 if ONE_MASK else 0, 2):
        for j in range(masked if PART else 1, tiles if PART else masked):
            n = last - j * BLOCK_N
            slot = j % SLOTS
            old = (j - 1) % SLOTS
            parity = (j // SLOTS) & 1
            mbarrier.wait(full.index(slot), parity)
            s = _scores(q, _matrix(k_slots, slot, BLOCK_N, HEAD_DIM))
            dp = _scores(do, _matrix(v_slots, slot, BLOCK_N, HEAD_DIM))
            dq = warpgroup_mma(ds, _matrix(k_slots, old, BLOCK_N, HEAD_DIM), dq, is_async=True)
            s = warpgroup_mma_wait(2, deps=(s,))
            p = gl.exp2(s * scale_log2 - lse[:, None])
            if PART == 0:
                offs_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
                p = gl.where(end[:, None] > offs_n[None, :], p, 0.0)
            p = _hold(p, 2, full.index(slot), parity)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            new = _hold(p * (dp - delta[:, None]), 1, full.index(slot), parity)
            dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
            n -= 2 * BLOCK_N
            more = j + 2 < tiles
            _load_pair(k_desc, v_desc, bi, hi, n, full.index(old), k_slots.index(old), v_slots.index(old), more)
            ds = _left(new, dq, dtype)

    k = _matrix(k_slots, (tiles - 1) % SLOTS, BLOCK_N, HEAD_DIM)
    dq = warpgroup_mma_wait(0, deps=(warpgroup_mma(ds, k, dq, is_async=True),))
    dq *= scale
    _store_rows(dq_ptr + b * stride_dqb + h * stride_dqh, dq, m, T_q, stride_dqt, dtype)
    if partial_ptr is not None:
        program = b * gl.cdiv(T_q, BLOCK_M) + tile
        _store_sums(partial_ptr, dq, m, T_q, dtype, program, h * HEAD_DIM, H * HEAD_DIM)


@gluon.jit
def _attention_dkdv_hopper_kernel(
    q_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    k_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    v_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    do_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    dk_ptr,  # [B, H, T_k, HEAD_DIM]
    dv_ptr,  # [B, H, T_k, HEAD_DIM]
    stats_ptr,  # [B, H, 2, T_pad] fp32: -lse in log2 units, and delta
    q_start_ptr,  # [B] int32 or None
    partial_ptr,  # [B tiles, 2 H HEAD_DIM] fp32 or None: those of dk, and behind them those of dv
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
    queries: gl.constexpr = gl.SliceLayout(0, s_layout)

    k_slot = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_slot = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    q_slots = gl.allocate_shared_memory(dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)
    do_slots = gl.allocate_shared_memory(dtype, [SLOTS] + do_desc.block_type.shape, do_desc.layout)
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
    masked = gl.minimum(gl.maximum(masked, 1), tiles)  # the first ones
    bi = b.to(gl.int32)
    hi = h.to(gl.int32)
    _load_pair(k_desc, v_desc, bi, hi, n, full.index(SLOTS), k_slot.index(0), v_slot.index(0), True)
    for i in gl.static_range(2):
        m = first + i * BLOCK_M
        _load_pair(q_desc, do_desc, bi, hi, m, full.index(i), q_slots.index(i), do_slots.index(i), i < tiles)

    offs_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    from_query = offs_n - diagonal  # from which on a key is seen
    columns = gl.arange(0, BLOCK_M, layout=queries)
    stats_ptr += head * 2 * T_pad + first
    k = _matrix(k_slot, 0, BLOCK_N, HEAD_DIM)
    v = _matrix(v_slot, 0, BLOCK_N, HEAD_DIM)
    minus_lse = gl.load(stats_ptr + columns.to(gl.int64))  # [BLOCK_M]
    delta = gl.load(stats_ptr + T_pad + columns.to(gl.int64))  # [BLOCK_M]
    mbarrier.wait(full.index(SLOTS), 0)
    mbarrier.wait(full.index(0), 0)
    s = _scores(k, _matrix(q_slots, 0, BLOCK_M, HEAD_DIM))  # [BLOCK_N, BLOCK_M]
    dp = _scores(v, _matrix(do_slots, 0, BLOCK_M, HEAD_DIM))
    s = warpgroup_mma_wait(1, deps=(s,))
    p_new = gl.exp2(s * scale_log2 + minus_lse[None, :])
    if IS_CAUSAL:
        offs_m = first + columns
        p_new = gl.where(offs_m[None, :] >= from_query[:, None], p_new, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dk = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, d_layout)
    dv = gl.zeros([BLOCK_N, HEAD_DIM], gl.float32, d_layout)
    p = _left(p_new, dv, dtype)
    ds = _left(p_new * (dp - delta[None, :]), dk, dtype)
    m = first + 2 * BLOCK_M
    _load_pair(q_desc, do_desc, bi, hi, m, full.index(2), q_slots.index(2), do_slots.index(2), tiles > 2)

    for PART in gl.static_range(0 if IS_CAUSAL else 1, 2):
        for i in range(masked if PART else 1, tiles if PART else masked):
            m = first + i * BLOCK_M
            slot = i % SLOTS
            old = (i - 1) % SLOTS
            parity = (i // SLOTS) & 1
            stats_ptr += BLOCK_M
            minus_lse = gl.load(stats_ptr + columns.to(gl.int64))
            delta = gl.load(stats_ptr + T_pad + columns.to(gl.int64))
            mbarrier.wait(full.index(slot), parity)
            s = _scores(k, _matrix(q_slots, slot, BLOCK_M, HEAD_DIM))
            dp = _scores(v, _matrix(do_slots, slot, BLOCK_M, HEAD_DIM))
            dv = warpgroup_mma(p, _matrix(do_slots, old, BLOCK_M, HEAD_DIM), dv, is_async=True)
            dk = warpgroup_mma(ds, _matrix(q_slots, old, BLOCK_M, HEAD_DIM), dk, is_async=True)
            s = warpgroup_mma_wait(3, deps=(s,))
            p_new = gl.exp2(s * scale_log2 + minus_lse[None, :])
            if PART == 0:
                offs_m = m + columns
                p_new = gl.where(offs_m[None, :] >= from_query[:, None], p_new, 0.0)
            p_new = _hold(p_new, 3, full.index(slot), parity)
            dp = warpgroup_mma_wait(2, deps=(dp,))
            ds_new = _hold(p_new * (dp - delta[None, :]), 2, full.index(slot), parity)
            dv, dk, p, ds = warpgroup_mma_wait(0, deps=(dv, dk, p, ds))
            m += 2 * BLOCK_M
            more = i + 2 < tiles
            _load_pair(q_desc, do_desc, bi, hi, m, full.index(old), q_slots.index(old), do_slots.index(old), more)
            p = _left(p_new, dv, dtype)
            ds = _left(ds_new, dk, dtype)

    slot = (tiles - 1) % SLOTS
    dv = warpgroup_mma(p, _matrix(do_slots, slot, BLOCK_M, HEAD_DIM), dv, is_async=True)
    dk = warpgroup_mma(ds, _matrix(q_slots, slot, BLOCK_M, HEAD_DIM), dk, is_async=True)
    # For both: what is stored is exchanged in shared memory that Triton takes from the slots, which dk may still read.
    dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
    _store_rows(dv_ptr + b * stride_dvb + h * stride_dvh, dv, n, T_k, stride_dvt, dtype)
    dk *= scale
    _store_rows(dk_ptr + b * stride_dkb + h * stride_dkh, dk, n, T_k, stride_dkt, dtype)
    if partial_ptr is not None:
        program = b * gl.cdiv(T_k, BLOCK_N) + tile
        _store_sums(partial_ptr, dk, n, T_k, dtype, program, h * HEAD_DIM, 2 * H * HEAD_DIM)
        _store_sums(partial_ptr, dv, n, T_k, dtype, program, (H + h) * HEAD_DIM, 2 * H * HEAD_DIM)


def _plan(direction, shape, T_k, stored, scale, causal, q, k, v, do, dtype, has_q_start, offsets):
    """stored: the strides [B, H, T, D] that the kernel gets as numbers; q, k, v, do: those of what comes by TMA."""
    B, H, T_q, D = shape
    config = hopper_config(direction, D, T_q)
    keys = (B, H, T_k, D)
    descriptors = {
        0: _Described(shape, q[:3], config.BLOCK_M, dtype),
        1: _Described(keys, k[:3], config.BLOCK_N, dtype),
        2: _Described(keys, v[:3], config.BLOCK_N, dtype),
        3: _Described(shape, do[:3], config.BLOCK_M, dtype),
    }
    T, BLOCK = (T_q, config.BLOCK_M) if direction == "dq" else (T_k, config.BLOCK_N)
    heads_per_group = heads_in_l2(2 * (T_k if direction == "dq" else T_q) * D * dtype.itemsize, B * H)
    strides = (stride for each in stored for stride in each[:3])
    numbers = (*strides, H, T_q, T_k, _padded(T_q), heads_per_group, scale, scale * LOG2E)
    options = {
        "HEAD_DIM": D,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "IS_CAUSAL": causal,
        "num_warps": config.num_warps,
    }
    if direction == "dq":
        sees_all = not causal or (T_q == T_k and not has_q_start)
        options["ONE_MASK"] = sees_all and config.BLOCK_N >= config.BLOCK_M
    return (B * H * triton.cdiv(T, BLOCK),), numbers, options, offsets or {}, descriptors


def _padded(T_q):
    """The length of a row of stats."""
    return triton.cdiv(T_q, STATS_ROWS) * STATS_ROWS


def _dq_plan(shape, T_k, q, k, v, o, do, dq, dk, dv, dtype, scale, causal, has_q_start, offsets=None):
    return _plan("dq", shape, T_k, (o, do, dq), scale, causal, q, k, v, do, dtype, has_q_start, offsets)


def _dkdv_plan(shape, T_k, q, k, v, o, do, dq, dk, dv, dtype, scale, causal, has_q_start, offsets=None):
    return _plan("dkdv", shape, T_k, (dk, dv), scale, causal, q, k, v, do, dtype, has_q_start, offsets)


_launch_dq = Launcher(_attention_dq_hopper_kernel, _dq_plan)
_launch_dkdv = Launcher(_attention_dkdv_hopper_kernel, _dkdv_plan)
_launch_packed_dq = Launcher(_attention_dq_hopper_kernel, _packed(_dq_plan, {1: 1, 2: 2}, 10))
_launch_packed_dkdv = Launcher(_attention_dkdv_hopper_kernel, _packed(_dkdv_plan, {1: 1, 2: 2, 4: 1, 5: 2}, 8))


def stats_size(B, H, T_q):
    """How many fp32 numbers the first kernel hands on to the second: [B, H, 2, T_pad]."""
    return B * H * 2 * _padded(T_q)


def partial_rows(head_dim, T):
    """As backward.partial_rows."""
    dq, dkdv = (hopper_config(direction, head_dim, T) for direction in ("dq", "dkdv"))
    return triton.cdiv(T, dq.BLOCK_M), triton.cdiv(T, dkdv.BLOCK_N)


def _launch_hopper_backward(do, q, k, v, o, lse, dq, dk, dv, options):
    """Writes dq, dk and dv, which have the shapes of q, k and v and strides of their own."""
    if q.numel():
        stats = lse.new_empty(stats_size(*lse.shape))
        strides = [x.stride() for x in (q, k, v, o, do, dq, dk, dv)]
        key = (q.shape, k.shape[2], *strides, q.dtype, options.scale, options.causal, options.q_start is not None)
        _launch_dq((q, k, v, do, o, do, dq, lse, stats, options.q_start, None), *key)
        _launch_dkdv((q, k, v, do, dk, dv, stats, options.q_start, None), *key)
    else:
        dk.zero_()  # no query at all, but there may be keys
        dv.zero_()


def _launch_packed_hopper_backward(do, qkv, o, lse, num_heads, options):
    """dqkv [B, T, 3C], contiguous."""
    shape = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if shape[0] and shape[1]:
        stats = lse.new_empty(stats_size(*lse.shape))
        numbers = qkv.dtype, options.scale, options.causal, options.q_start is not None
        key = (shape, qkv.stride(), o.stride(), do.stride(), num_heads, *numbers, 0)
        _launch_packed_dq((qkv, qkv, qkv, do, o, do, dqkv, lse, stats, options.q_start, None), *key)
        _launch_packed_dkdv((qkv, qkv, qkv, do, dqkv, dqkv, stats, options.q_start, None), *key)
    return dqkv
