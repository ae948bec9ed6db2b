"""What the attention kernels share: where a program works, how a tile is loaded, which keys a query sees.

Keys are counted from the row's first valid one: key n stands at position kv_start + n of the tensor. A padded row
therefore goes through the same tiles as the same row without padding, and gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(num_tiles, H, heads_per_group, LONGEST_FIRST: tl.constexpr):
    """This program's tile, batch row and head, in a one-dimensional grid of B * H * num_tiles programs.

    Groups of `heads_per_group` heads run together, so that their keys and values stay in L2; inside a group every
    head's longest tile comes before any shorter one, so that the programs that finish last are short.
    """
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // num_tiles  # B * H
    first = pid // (heads_per_group * num_tiles) * heads_per_group
    here = tl.minimum(heads_per_group, heads - first)
    pid -= first * num_tiles
    tile = pid // here
    if LONGEST_FIRST:
        tile = num_tiles - 1 - tile
    head = first + pid % here
    return tile, (head // H).to(tl.int64), (head % H).to(tl.int64)


@triton.jit
def _head(b, h, stride_b, stride_h, VECTOR: tl.constexpr):
    """Where head h of batch row b begins, in elements. VECTOR divides both strides.

    Of an argument Triton finds out by itself only whether 16 divides it. A stride of 40, between heads of that size,
    would have rows loaded element by element.
    """
    return tl.multiple_of(b * stride_b + h * stride_h, VECTOR)


@triton.jit
def _row_bounds(b, kv_start_ptr, kv_end_ptr, q_start_ptr, T_q, T_k):
    """Of batch row b: kv_start, the number of valid keys, and the diagonal: query i sees key n if n <= diagonal + i."""
    kv_start = 0
    kv_end = T_k
    q_start = T_k - T_q
    if kv_start_ptr is not None:
        kv_start = tl.minimum(tl.maximum(tl.load(kv_start_ptr + b), 0), T_k)
    # Bounds of any size are cut to where they differ, so that no sum of them leaves int32.
    if kv_end_ptr is not None:
        kv_end = tl.minimum(tl.maximum(tl.load(kv_end_ptr + b), 0), T_k)
    if q_start_ptr is not None:
        q_start = tl.minimum(tl.maximum(tl.load(q_start_ptr + b), -T_q), T_k)
    return kv_start, kv_end - kv_start, q_start - kv_start


@triton.jit
def _key_tiles(m, num_keys, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """full, seen: queries [m, m + BLOCK_M) all see the keys [0, full), whole tiles; none sees the keys from seen on."""
    full = num_keys
    seen = num_keys
    if IS_CAUSAL:
        full = tl.minimum(num_keys, diagonal + m + 1)
        seen = tl.minimum(num_keys, diagonal + m + BLOCK_M)
    return tl.maximum(full, 0) // BLOCK_N * BLOCK_N, seen


@triton.jit
def _load_rows(ptr, offs, stride, lo, hi, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `offs` of one head, [len(offs), BLOCK_D]; zero beyond HEAD_DIM and, if MASKED, outside [lo, hi)."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    inside = (offs >= lo) & (offs < hi)
    if MASKED and HEAD_DIM != BLOCK_D:
        rows = tl.load(ptrs, mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        rows = tl.load(ptrs, mask=inside[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        rows = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def _store_rows(ptr, rows, offs, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores [len(offs), BLOCK_D] at rows `offs` of one head where `inside`, without the padding of the head dim."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, rows.to(ptr.dtype.element_ty), mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _store_sums(partial_ptr, rows, dtype: tl.constexpr, program, column, width, HEAD_DIM: tl.constexpr):
    """Stores the sums over `rows` [n, BLOCK_D], rounded to dtype as they are stored, at partial[program, column:] of
    rows of `width` fp32 numbers."""
    offs_d = tl.arange(0, rows.shape[1])
    sums = tl.sum(rows.to(dtype).to(tl.float32), 0)  # [BLOCK_D]
    tl.store(partial_ptr + program * width + column + offs_d, sums, mask=offs_d < HEAD_DIM)


@triton.jit
def _visible(offs_m, offs_n, num_keys, diagonal, IS_CAUSAL: tl.constexpr):
    """Which keys offs_n the queries offs_m see, by broadcasting the two: causality and padding are independent."""
    visible = offs_n < num_keys
    if IS_CAUSAL:
        visible = visible & (offs_n <= diagonal + offs_m)
    return visible
