"""Attention forward for Hopper, in Gluon: the copy engine and the matrix units work while the softmax is computed.

The same formulas, units and results as forward.py; what differs is who waits for whom. In plain Triton each product is
waited for before anything else is done. Gluon leaves the order to the kernel. A program is one warpgroup with 64
queries of one head; it walks over the keys in tiles of BLOCK_N, from the last to the first, so that the tiles that need
a mask come first. One thread starts the copies (TMA: a whole tile by one instruction, into shared memory, counted by an
mbarrier); k and v have two slots each, tile j uses slot j % 2, and the copies run two tiles ahead. One iteration:

    queue  s = q k(j)^T                   asynchronous (WGMMA)
    queue  acc += p(j-1) v(j-1)           asynchronous, behind it
    wait   for s                          then k(j)'s slot takes k(j+2)
    do     m, p(j) = exp2(s - m), l       while p(j-1) v(j-1) is still computed
    wait   for v(j), and for acc          then v(j-1)'s slot takes v(j+1)
    do     acc *= alpha, p(j) to fp16

What must hold, and is not checked by the compiler:

- p(j-1) is an operand in registers of a product in flight: nobody may write these registers before it has been waited
  for. So the wait names it among its results, and p(j) is made of registers of its own, after the wait.
- A slot is filled again only after all four warps have waited for the product that reads it. One thread starts the
  copy, behind the barrier that Triton places between `expect` and a copy: `expect` stands behind the wait.
- ptxas moves a wait for a product up, in front of the exponentials, where it can. It moves nothing across the loop that
  waits for an mbarrier, so one stands before the wait for acc: that for v(j), which the next product needs.
- An mbarrier's phase ends with its copy; tile j is the (j // 2)-th in its slot, so its phase has parity (j // 2) % 2.
- A tile that reaches beyond the last row is filled up with zeros, and its bytes count as copied.

FLOPs and bytes are forward.py's at 64 queries a program: k and v are read once per 64 queries. Compiled for sm_90 in
bf16 at D = 64 by Triton 3.7.1 the loop takes 6.9 instructions per score of a thread, and the kernel 161 registers:
three programs share a multiprocessor, and the softmax of one runs under the products of the others too. Up to T = 1024
tiles of 64 keys, four programs, are faster. Measured times: README.md.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.plans import contiguous_heads, packed_heads
from kernels.attention.tiles import _key_tiles, _locate, _row_bounds
from kernels.configs import HOPPER_HEAD_DIMS, heads_in_l2, hopper_config
from kernels.launch import Launcher
from kernels.library import LOG2E, active_arch

# Triton 3.9 calls it async_load.
_copy_tile = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared

PARTS = gl.constexpr(8)
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
_ELEMENTS = {**DTYPES, torch.float32: gl.float32}


@gluon.jit
def _load_tile(desc, b, h, row, full, slot, pred):
    """Starts the copy of rows [row, row + BLOCK) of one head into a slot; `full` flips when all bytes are there."""
    mbarrier.expect(full, desc.block_type.nbytes, pred=pred)
    _copy_tile(desc, [b, h, row, 0], full, slot, pred=pred)


@gluon.jit
def _matrix(slots, i, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Slot i as a matrix [ROWS, HEAD_DIM]."""
    return slots.index(i).reshape([ROWS, HEAD_DIM])


@gluon.jit
def _scores(q, k):
    """q k^T, a product in flight."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = k.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    nothing = gl.zeros([M, N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _partial_sums(p):
    """Of each row's every eighth element, [M, PARTS]."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // PARTS, PARTS]), 1)


@gluon.jit
def _per_row(x, like):
    """x [M] as a column beside `like` [M, N]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _store_rows(ptr, rows, first, T, stride, dtype: gl.constexpr):
    """Stores an accumulator [64, HEAD_DIM] at the rows from `first` on of one head, those below T.

    Each thread gets eight neighbours of a row, exchanged inside its warp, so that whole sectors are stored.
    """
    HEAD_DIM: gl.constexpr = rows.shape[1]
    store: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]] + ([[0, 64]] if HEAD_DIM == 128 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, HEAD_DIM],
    )
    offs = first + gl.arange(0, 64, layout=gl.SliceLayout(1, store))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store))
    ptrs = ptr + (offs.to(gl.int64) * stride)[:, None] + offs_d[None, :]
    gl.store(ptrs, gl.convert_layout(rows.to(dtype), store), mask=(offs < T)[:, None])


@gluon.jit
def _softmax(s, m_i, end, n, scale_log2, MASKED: gl.constexpr, SEES_ALL: gl.constexpr):
    """p, alpha and the new maximum, of scores [64, keys] of keys from n on.

    end: a row sees the keys below it. SEES_ALL: every row sees some key in the first tile already.
    """
    if MASKED:
        offs_n = n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(_per_row(end, s) > offs_n[None, :], s, float("-inf"))
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, s.type.layout))
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    m_shift = m_new
    if not SEES_ALL:
        m_shift = gl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
    return gl.exp2(s * scale_log2 - m_shift[:, None]), gl.exp2(m_i - m_shift), m_new


@gluon.jit
def _attention_hopper_kernel(
    q_desc,  # [B, H, T_q, HEAD_DIM] in tiles [1, 1, BLOCK_M, HEAD_DIM]
    k_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    v_desc,  # [B, H, T_k, HEAD_DIM] in tiles [1, 1, BLOCK_N, HEAD_DIM]
    o_ptr,  # [B, H, T_q, HEAD_DIM]
    lse_ptr,  # [B, H, T_q] fp32, log2 units
    q_start_ptr,  # [B] int32 or None
    stride_ob,
    stride_oh,
    stride_ot,
    H,
    T_q,
    T_k,
    heads_per_group,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    SEES_ALL: gl.constexpr,  # every query sees some key of the first tile, the only one that needs a mask
):
    dtype: gl.constexpr = q_desc.dtype
    # Every other tile of queries sees only the first half of its last tile of keys, and computes no more of it, unless
    # there is no other.
    HAS_HALVES: gl.constexpr = IS_CAUSAL and SEES_ALL and BLOCK_N == 2 * BLOCK_M
    # Accumulators of scores and of o, and p as the left operand of the second product: in registers, as WGMMA has them.
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)

    q_slot = gl.allocate_shared_memory(dtype, [1] + q_desc.block_type.shape, q_desc.layout)
    k_slots = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_slots = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())  # of q, k, k, v, v
    for i in gl.static_range(5):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()  # the copy engine sees them

    tile, b, h = _locate(gl.cdiv(T_q, BLOCK_M), H, heads_per_group, IS_CAUSAL)
    head = b * H + h
    _, num_keys, diagonal = _row_bounds(b, None, None, q_start_ptr, T_q, T_k)
    m = tile * BLOCK_M
    first_full, seen = _key_tiles(m, num_keys, diagonal, BLOCK_M, BLOCK_N, IS_CAUSAL)
    tiles = gl.maximum(gl.cdiv(seen, BLOCK_N), 1)  # tile j holds the keys from (tiles - 1 - j) * BLOCK_N on
    masked = gl.maximum(tiles - first_full // BLOCK_N, 1)  # the first ones
    offs_m = m + gl.arange(0, BLOCK_M, layout=rows)
    end = gl.zeros_like(offs_m) + num_keys
    if IS_CAUSAL:
        end = gl.minimum(end, diagonal + offs_m + 1)

    bi = b.to(gl.int32)
    hi = h.to(gl.int32)
    last = (tiles - 1) * BLOCK_N
    _load_tile(q_desc, bi, hi, m, full.index(0), q_slot.index(0), True)
    for i in gl.static_range(2):
        _load_tile(k_desc, bi, hi, last - i * BLOCK_N, full.index(1 + i), k_slots.index(i), i < tiles)
        _load_tile(v_desc, bi, hi, last - i * BLOCK_N, full.index(3 + i), v_slots.index(i), i < tiles)

    q = _matrix(q_slot, 0, BLOCK_M, HEAD_DIM)
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, o_layout)
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, rows)
    l_i = _partial_sums(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout))
    mbarrier.wait(full.index(0), 0)
    mbarrier.wait(full.index(1), 0)
    first = 0
    if HAS_HALVES and tile % 2 == 0 and tiles > 1:
        # Tile 0 by half: each step is waited for.
        k = _matrix(k_slots, 0, BLOCK_N, HEAD_DIM).slice(0, BLOCK_M)
        s = warpgroup_mma_wait(0, deps=(_scores(q, k),))
        _load_tile(k_desc, bi, hi, last - 2 * BLOCK_N, full.index(1), k_slots.index(0), tiles > 2)
        p_half, _alpha, m_half = _softmax(s, m_i, end, last, scale_log2, True, SEES_ALL)
        m_i = gl.convert_layout(m_half, rows)
        l_i = gl.convert_layout(_partial_sums(p_half), l_i.type.layout)
        mbarrier.wait(full.index(3), 0)
        v = _matrix(v_slots, 0, BLOCK_N, HEAD_DIM).slice(0, BLOCK_M)
        left = gl.convert_layout(p_half.to(dtype), p_layout)
        acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(left, v, acc, use_acc=False, is_async=True),))
        _load_tile(v_desc, bi, hi, last - 2 * BLOCK_N, full.index(3), v_slots.index(0), tiles > 2)
        mbarrier.wait(full.index(2), 0)
        first = 1

    # The first whole tile: there is no product under which its softmax could run.
    n = last - first * BLOCK_N
    s = warpgroup_mma_wait(0, deps=(_scores(q, _matrix(k_slots, first, BLOCK_N, HEAD_DIM)),))
    _load_tile(k_desc, bi, hi, n - 2 * BLOCK_N, full.index(1 + first), k_slots.index(first), first + 2 < tiles)
    p, alpha, m_i = _softmax(s, m_i, end, n, scale_log2, True, SEES_ALL)
    l_i = l_i * _per_row(alpha, l_i) + _partial_sums(p)
    acc = acc * _per_row(alpha, acc)
    p16 = gl.convert_layout(p.to(dtype), p_layout)
    mbarrier.wait(full.index(3 + first), 0)

    # Then the other tiles with a mask, then those without one.
    for PART in gl.static_range(1 if SEES_ALL else 0, 2):
        for j in range(gl.maximum(masked, first + 1) if PART else first + 1, tiles if PART else masked):
            n = last - j * BLOCK_N
            new = j & 1
            old = new ^ 1
            mbarrier.wait(full.index(1 + new), (j >> 1) & 1)
            s = _scores(q, _matrix(k_slots, new, BLOCK_N, HEAD_DIM))
            acc = warpgroup_mma(p16, _matrix(v_slots, old, BLOCK_N, HEAD_DIM), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            _load_tile(k_desc, bi, hi, n - 2 * BLOCK_N, full.index(1 + new), k_slots.index(new), j + 2 < tiles)
            p, alpha, m_i = _softmax(s, m_i, end, n, scale_log2, PART == 0, SEES_ALL)
            l_i = l_i * _per_row(alpha, l_i) + _partial_sums(p)
            mbarrier.wait(full.index(3 + new), (j >> 1) & 1)  # v(j), for the next product; ptxas stays behind it
            acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
            _load_tile(v_desc, bi, hi, n - BLOCK_N, full.index(3 + old), v_slots.index(old), j + 1 < tiles)
            acc = acc * _per_row(alpha, acc)
            p16 = gl.convert_layout(p.to(dtype), p_layout)

    acc = warpgroup_mma(p16, _matrix(v_slots, (tiles - 1) & 1, BLOCK_N, HEAD_DIM), acc, is_async=True)
    l_sum = gl.convert_layout(gl.sum(l_i, 1), rows)
    l_sum = gl.where(l_sum == 0, 1.0, l_sum)  # a query that saw no key: acc is 0 and m_i is -inf; NaN stays NaN
    gl.store(lse_ptr + head * T_q + offs_m, m_i + gl.log2(l_sum), mask=offs_m < T_q)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _store_rows(o_ptr + b * stride_ob + h * stride_oh, acc / _per_row(l_sum, acc), m, T_q, stride_ot, dtype)


def refusal(dtype, head_dim, padded, dropout):
    """What these kernels, and those of hopper_backward.py, do not support of a call, in words, or None."""
    arch = active_arch()
    if arch != 90:
        what = "the interpreter" if arch is None else f"architecture {arch}"
        return f"{what}: compute capability 9.0 is required"
    if dtype not in DTYPES:
        return f"{dtype}: fp16 or bf16 is required"
    if head_dim not in HOPPER_HEAD_DIMS:
        return f"head_dim {head_dim}: {' or '.join(map(str, HOPPER_HEAD_DIMS))} is required"
    if padded:
        return "padding: no kv_start and no kv_end is required"
    if dropout:
        return "dropout: dropout_p of 0 is required"
    return None


def strides_refusal(tensors):
    """The same of the tensors' strides, with which the copy engine must reach each row."""
    for tensor in tensors:
        strides = [step for size, step in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
        if any(step <= 0 or step % 8 for step in strides):
            return f"strides {tuple(tensor.stride())}: positive multiples of 8 elements are required"
    return None


class _Described:
    """Makes descriptors of tensors of one geometry: all but the address is checked and kept once."""

    def __init__(self, shape, strides, rows, dtype):
        D = shape[3]
        block = [1, 1, rows, D]
        # Of an axis of one element the stride says nothing and may be anything; the hardware wants one that it can use.
        strides = [step if size > 1 else D for size, step in zip(shape[:3], strides)]
        self.geometry = [*shape], [*strides, 1], block, gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[dtype])
        self.fields = None

    def __call__(self, base):
        """base: a tensor, or whatever gives its address by data_ptr()."""
        if self.fields is None:
            descriptor = TensorDescriptor(base, *self.geometry)
            self.fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
            return descriptor
        descriptor = object.__new__(TensorDescriptor)
        vars(descriptor).update(self.fields, base=base)
        return descriptor


def _plan(shape, T_k, q_strides, k_strides, v_strides, dtype, scale, causal, has_q_start, offsets=None):
    """shape: q's [B, H, T_q, D]; o is [B, T_q, H, D] in memory."""
    B, H, T_q, D = shape
    config = hopper_config("forward", D, T_q)
    keys = (B, H, T_k, D)
    descriptors = {
        0: _Described(shape, q_strides, config.BLOCK_M, dtype),
        1: _Described(keys, k_strides, config.BLOCK_N, dtype),
        2: _Described(keys, v_strides, config.BLOCK_N, dtype),
    }
    heads_per_group = heads_in_l2(2 * T_k * D * dtype.itemsize, B * H)
    numbers = (*contiguous_heads(T_q, H, D), H, T_q, T_k, heads_per_group, scale * LOG2E)
    options = {
        "HEAD_DIM": D,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "IS_CAUSAL": causal,
        "SEES_ALL": not causal or (T_q == T_k and not has_q_start),
        "num_warps": config.num_warps,
    }
    return (B * H * triton.cdiv(T_q, config.BLOCK_M),), numbers, options, offsets or {}, descriptors


def _packed_plan(shape, strides, num_heads, *rest):
    """shape and strides: those of qkv [B, T, 3C]."""
    B, T, three_C = shape
    C = three_C // 3
    heads = packed_heads(strides, C // num_heads)
    return _plan((B, num_heads, T, C // num_heads), T, heads, heads, heads, *rest, {1: C, 2: 2 * C})


_launch = Launcher(_attention_hopper_kernel, _plan)
_launch_packed = Launcher(_attention_hopper_kernel, _packed_plan)


def _launch_hopper_forward(q, k, v, options):
    """As forward.py's launcher: o [B, H, T_q, D] in memory order [B, T_q, H, D], and lse [B, H, T_q]."""
    shape = B, H, T_q, D = q.shape
    o = torch.empty_permuted((B, H, T_q, D), (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    lse = q.new_empty((B, H, T_q), dtype=torch.float32)
    if o.numel():
        strides = [x.stride()[:3] for x in (q, k, v)]
        numbers = options.scale, options.causal, options.q_start is not None
        _launch((q, k, v, o, lse, options.q_start), shape, k.shape[2], *strides, q.dtype, *numbers)
    return o, lse


def _launch_packed_hopper(qkv, num_heads, options):
    """As forward.py's launcher: o [B, T, C] and lse [B, H, T] from qkv [B, T, 3C]."""
    shape = B, T, three_C = qkv.shape
    o = qkv.new_empty((B, T, three_C // 3))
    lse = qkv.new_empty((B, num_heads, T), dtype=torch.float32)
    if B and T:
        numbers = options.scale, options.causal, options.q_start is not None
        _launch_packed((qkv, qkv, qkv, o, lse, options.q_start), shape, qkv.stride(), num_heads, qkv.dtype, *numbers)
    return o, lse
