"""What the phases of a decode step compute, for the kernels of step.py, one for each, and that of persistent.py.

A phase multiplies a row of activations with a program's rows of weights, which tiles.py has loaded, and puts what comes
of it where the next phase reads it; attention takes a split of a head's keys. Every sum has one order: the same bits
come out of both.
"""

import triton
import triton.language as tl

from kernels.decode.tiles import _activations, _product
from kernels.gelu import _gelu


@triton.jit
def _embedding(wte_ptr, wpe_ptr, token, length, C: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """wte[token] + wpe[length] in fp32, as _activations has it."""
    word = _activations(wte_ptr + token * C, C, BK, R)
    place = _activations(wpe_ptr + length.to(tl.int64) * C, C, BK, R)
    x = ()
    for c in tl.static_range((C + BK - 1) // BK):
        x += (word[c].to(tl.float32) + place[c].to(tl.float32),)
    return x


@triton.jit
def _store_row(ptr, x, here, C: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """A row [C], which every warp has, stored by one, where `here`."""
    for c in tl.static_range((C + BK - 1) // BK):
        k = c * BK + tl.arange(0, BK)[None, :]
        mine = (tl.arange(0, R)[:, None] == 0) & (k < C) & here
        tl.store(ptr + tl.arange(0, R)[:, None] * 0 + k, x[c], mask=mine)


@triton.jit
def _store_qkv(
    y,  # a row [C], normalised
    w,
    scale,
    bias,
    first,
    end,  # this program's rows of w: first to end
    place,  # q_ptr [C] of the row, cache_ptr [2, B, H, capacity, D] of the layer, b, length, B, H, capacity
    C: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """q, k, v = w y + bias: q to q_ptr, k and v into the cache of text b, at slot `length`."""
    q_ptr, cache_ptr, b, length, B, H, capacity = place
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        value = _product(w, y, scale, g, CHUNKS) + bias[g]  # [R]
        tl.store(q_ptr + n, value, mask=(n < end) & (n < C))
        m = n % C
        head = (n // C - 1).to(tl.int64) * B * H + b * H + m // D
        slot = (head * capacity + length) * D + m % D
        tl.store(cache_ptr + slot, value.to(cache_ptr.dtype.element_ty), mask=(n >= C) & (n < end))


@triton.jit
def _held(keys, split, length, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """A split's tile [SPLIT, BLOCK_D] of a head's keys or values [capacity, D], of which there are `length`."""
    slots = split * SPLIT + tl.arange(0, SPLIT)
    d = tl.arange(0, BLOCK_D)
    inside = (slots < length)[:, None] & (d < D)[None, :]
    return tl.load(keys + slots[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _with_new(tile, keys, split, length, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """The tile of _held with the key at slot `length`, where that is in the split."""
    d = tl.arange(0, BLOCK_D)
    here = (length // SPLIT == split) & (d < D)
    new = tl.load(keys + length * D + d, mask=here, other=0.0)  # [BLOCK_D]
    is_new = split * SPLIT + tl.arange(0, SPLIT) == length
    return tl.where(is_new[:, None], new[None, :], tile)


@triton.jit
def _attend(
    k,  # [SPLIT, BLOCK_D]
    v,
    q_ptr,  # [D]: of the head
    part_ptr,  # [BLOCK_D]
    lse_ptr,
    split,
    length,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A head's attention over a split's keys up to slot `length`: o and its log-sum-exp in log2 units."""
    d = tl.arange(0, BLOCK_D)
    slots = split * SPLIT + tl.arange(0, SPLIT)
    q = tl.load(q_ptr + d, mask=d < D, other=0.0) * scale_log2
    s = tl.where(slots <= length, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))  # [SPLIT]
    m = tl.max(s, 0)
    p = tl.exp2(s - m)
    l = tl.sum(p, 0)
    o = tl.sum(p[:, None] * v.to(tl.float32), 0) / l  # [BLOCK_D]
    tl.store(part_ptr + d, o)
    tl.store(lse_ptr, m + tl.log2(l))


@triton.jit
def _merged(
    part_ptr,  # [B, H, splits, BLOCK_D] fp32
    lse_ptr,  # [B, H, splits] fp32, log2 units
    head,
    filled,
    num_splits,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A row's attention output [C] as ceil(C / BK) tiles [1, BK]: its `filled` splits' outputs, weighted by their sums.

    The warps share the work, and exchange what they have before the product.

    The first split holds a key, so that the maximum is finite from it on, and a split that is not there weighs 0.
    """
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    state = ()  # of each chunk: the maximum, the sum and the weighted output so far
    for _ in tl.static_range(CHUNKS):
        state += (tl.full([BK], float("-inf"), tl.float32), tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32))
    for start in tl.range(0, filled, AT_ONCE):
        lse = ()
        o = ()
        for c in tl.static_range(CHUNKS):  # all are asked for before the first is used
            n = c * BK + tl.arange(0, BK)
            first = (head + n // D) * num_splits
            for i in tl.static_range(AT_ONCE):
                there = (n < C) & (start + i < filled)
                place = first + start + i
                lse += (tl.load(lse_ptr + place, mask=there, other=float("-inf")),)
                o += (tl.load(part_ptr + place * BLOCK_D + n % D, mask=there, other=0.0),)
        after = ()
        for c in tl.static_range(CHUNKS):
            inside = c * BK + tl.arange(0, BK) < C
            m = state[3 * c]
            l = state[3 * c + 1]
            acc = state[3 * c + 2]
            for i in tl.static_range(AT_ONCE):
                top = tl.maximum(m, lse[c * AT_ONCE + i])
                shift = tl.where(inside, top, 0.0)  # beyond C nothing is finite
                alpha = tl.exp2(m - shift)
                weight = tl.exp2(lse[c * AT_ONCE + i] - shift)
                l = l * alpha + weight
                acc = acc * alpha + weight * o[c * AT_ONCE + i]
                m = top
            after += (m, l, acc)
        state = after
    x = ()
    for c in tl.static_range(CHUNKS):
        inside = c * BK + tl.arange(0, BK) < C
        x += (tl.where(inside, state[3 * c + 2] / state[3 * c + 1], 0.0)[None, :],)
    return x


@triton.jit
def _add_product(w, h, scale, bias, x_ptr, first, end, CHUNKS: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr):
    """x [C] += w h + bias, for this program's rows of w, first to end."""
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        before = tl.load(x_ptr + n, mask=n < end, other=0.0)
        tl.store(x_ptr + n, before + (_product(w, h, scale, g, CHUNKS) + bias[g]), mask=n < end)


@triton.jit
def _store_product(
    w,
    y,  # a row [K], as _activations gives it
    scale,
    bias,  # () where there is none
    out_ptr,  # [N]: of the row
    first,
    end,  # this program's rows of w: first to end
    CHUNKS: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    GELU: tl.constexpr,
):
    """out = w y + bias, through GELU if so."""
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        value = _product(w, y, scale, g, CHUNKS)  # [R]
        if len(bias) > 0:
            value += bias[g]
        if GELU:
            value = _gelu(value)
        tl.store(out_ptr + n, value.to(out_ptr.dtype.element_ty), mask=n < end)
