"""What the decode kernels share: rows of a matrix held in registers, a row of activations beside them, LayerNorm.

A matrix-vector product has nothing to reuse: each weight is read once, and memory decides. A program takes a few rows
of a weight matrix [N, K] (packed as [out, in]) and keeps them in registers as tiles [R, BK], R the number of warps, so
that a warp holds whole rows: BK = 256 columns are one load of 16 bytes for each lane at two bytes an element, of 8 at
one. All loads of a program are issued before the first is used: that is what keeps memory busy.

A row of activations is loaded into the same layout, each warp all of it. So LayerNorm needs no barrier and the product
no exchange between warps: sums are over the lanes of a warp.
"""

import triton
import triton.language as tl


@triton.jit
def _weight_rows(w_ptr, first, N, K: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr):
    """Rows first to first + GROUPS R of w [N, K], as GROUPS ceil(K / BK) tiles [R, BK]; zero outside."""
    tiles = ()
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        for c in tl.static_range((K + BK - 1) // BK):
            k = c * BK + tl.arange(0, BK)
            inside = (n < N)[:, None]
            if (c + 1) * BK > K:
                inside = inside & (k < K)[None, :]
            tiles += (tl.load(w_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0),)
    return tiles


@triton.jit
def _activations(ptr, K: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """A row [K] as ceil(K / BK) tiles [R, BK], the same R times, as stored; zero beyond K."""
    tiles = ()
    for c in tl.static_range((K + BK - 1) // BK):
        k = c * BK + tl.arange(0, BK)[None, :]
        inside = (tl.arange(0, R)[:, None] >= 0) & (k < K)
        tiles += (tl.load(ptr + tl.arange(0, R)[:, None] * 0 + k, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _layer_norm(x, weight, bias, eps, K: tl.constexpr, BK: tl.constexpr):
    """The norm of a row in fp32; x, weight and bias as _activations gives them."""
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    acc = x[0]
    for c in tl.static_range(1, CHUNKS):
        acc += x[c]
    mean = tl.sum(acc, 1)[:, None] / K
    centred = ()
    for c in tl.static_range(CHUNKS):
        d = x[c] - mean
        if (c + 1) * BK > K:
            d = tl.where((c * BK + tl.arange(0, BK) < K)[None, :], d, 0.0)
        centred += (d,)
    acc = centred[0] * centred[0]
    for c in tl.static_range(1, CHUNKS):
        acc += centred[c] * centred[c]
    rstd = tl.rsqrt(tl.sum(acc, 1)[:, None] / K + eps)
    y = ()
    for c in tl.static_range(CHUNKS):
        y += (centred[c] * rstd * weight[c].to(tl.float32) + bias[c].to(tl.float32),)
    return y


@triton.jit
def _product(tiles, x, scale, g: tl.constexpr, CHUNKS: tl.constexpr):
    """The R numbers of group g: fp32 multiply-adds chunk by chunk, then one sum over the lanes of a warp.

    scale: of each row of weights, as _scales gives it, applied once to the sum; () where there is none.
    """
    acc = _number(tiles[g * CHUNKS]) * x[0].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        acc += _number(tiles[g * CHUNKS + c]) * x[c].to(tl.float32)
    y = tl.sum(acc, 1)  # [R]
    if len(scale) > 0:
        y *= scale[g]
    return y


@triton.jit
def _number(w):
    """A tile of weights in fp32. An int8 is added to the bits of 1.5 * 2**23, whose last counts 1; that is taken off.

    A byte permutation and two additions, where a conversion from integers goes at a fraction of their rate.
    """
    if w.dtype == tl.int8:
        return (w.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return w.to(tl.float32)


@triton.jit
def _scales(ptr, first, N, R: tl.constexpr, GROUPS: tl.constexpr):
    """As _vector; () where ptr is None, for weights that have no scales."""
    groups = ()
    if ptr is not None:
        groups = _vector(ptr, first, N, R, GROUPS)
    return groups


@triton.jit
def _vector(ptr, first, N, R: tl.constexpr, GROUPS: tl.constexpr):
    """Elements first to first + GROUPS R of a vector [N], in groups of R, fp32."""
    groups = ()
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        groups += (tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32),)
    return groups
