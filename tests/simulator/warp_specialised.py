"""A warp-specialised attention kernel, small: two consumer warpgroups, one producer warp, the result stored by TMA."""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.hopper import _copy_tile, _scores
from kernels.attention.hopper_backward import _left

ROWS, D, SLOTS = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_tiles, k_slots, v_slots, full, empty, tiles):
    """One warp starts all copies; a slot is filled again once both consumers have let go of it."""
    m = gl.program_id(0) * 2 * ROWS
    for w in gl.static_range(2):
        mbarrier.expect(full.index(SLOTS + w), q_desc.block_type.nbytes)
        _copy_tile(q_desc, [m + w * ROWS, 0], full.index(SLOTS + w), q_tiles.index(w))
    for j in range(tiles):
        slot = j % SLOTS
        mbarrier.wait(empty.index(slot), ((j // SLOTS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        _copy_tile(k_desc, [j * ROWS, 0], full.index(slot), k_slots.index(slot))
        _copy_tile(v_desc, [j * ROWS, 0], full.index(slot), v_slots.index(slot))


@gluon.jit
def _consume(o_desc, q_tiles, k_slots, v_slots, full, empty, turn, tiles, scale_log2, w: gl.constexpr):
    """64 queries against all keys. The two warpgroups take turns at the matrix units: `turn`."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.zeros_like(m_i)
    mbarrier.wait(full.index(SLOTS + w), 0)
    for j in range(tiles):
        slot = j % SLOTS
        mbarrier.wait(full.index(slot), (j // SLOTS) & 1)
        mbarrier.wait(turn.index(w), j & 1)
        s = warpgroup_mma_wait(0, deps=(_scores(q_tiles.index(w), k_slots.index(slot)),))
        mbarrier.arrive(turn.index(1 - w), count=1)
        m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
        p = gl.exp2(s * scale_log2 - m_new[:, None])
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * alpha + gl.sum(p, 1)
        m_i = m_new
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        left = _left(p, acc, q_tiles.dtype)
        acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(left, v_slots.index(slot), acc, is_async=True),))
        mbarrier.arrive(empty.index(slot), count=1)
    # q's tile has been read: o takes its place, and the copy engine stores it.
    q_tiles.index(w).store((acc / gl.convert_layout(l_i, gl.SliceLayout(1, o_layout))[:, None]).to(q_tiles.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [gl.program_id(0) * 2 * ROWS + w * ROWS, 0], q_tiles.index(w))
    tma.store_wait(0)


@gluon.jit
def kernel(q_desc, k_desc, v_desc, o_desc, tiles, scale_log2, WORKER_REGISTERS: gl.constexpr):
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_slots = gl.allocate_shared_memory(q_desc.dtype, [SLOTS, ROWS, D], k_desc.layout)
    v_slots = gl.allocate_shared_memory(q_desc.dtype, [SLOTS, ROWS, D], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS + 2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS + 2):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    mbarrier.arrive(turn.index(0), count=1)
    gl.warp_specialize(
        [
            (_consume, (o_desc, q_tiles, k_slots, v_slots, full, empty, turn, tiles, scale_log2, 0)),
            (_consume, (o_desc, q_tiles, k_slots, v_slots, full, empty, turn, tiles, scale_log2, 1)),
            (_produce, (q_desc, k_desc, v_desc, q_tiles, k_slots, v_slots, full, empty, tiles)),
        ],
        [4, 1],
        [WORKER_REGISTERS, 24],
    )


def attention(q, k, v):
    """softmax(q k^T / 8) v for q [128 n, 64], k and v [64 n, 64], inside `simulate("sm_90")`."""
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    o = torch.full_like(q, math.nan)
    described = [TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 64], layout) for x in (q, k, v, o)]
    scale = q.shape[1] ** -0.5 * math.log2(math.e)
    kernel[(len(q) // 128,)](*described, len(k) // 64, scale, 200, num_warps=4, maxnreg=168)
    return o
