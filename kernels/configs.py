"""Tile shapes, warps and pipeline stages per chip, head dim and direction: a table, no search at run time.

Every row runs on its chips: it fits their shared memory and spills no register, which the compile lane asserts at the
pinned Triton, with the exceptions that tests/kernels/test_attention.py lists: faster on an H100 for all that. Rows were
chosen from compiled code (registers, spills, resident blocks), not from times, except where a comment above the row
names the device on which it was measured.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton

from kernels.library import active_arch

# What a group of heads may occupy of L2; the smallest supported chip's L2 with room to spare for queries and outputs.
L2_BYTES = 16 * 2**20


@dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_M queries by BLOCK_N keys a tile, computed by num_warps warps with num_stages tiles in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


C = AttentionConfig
# fp32 is multiplied by FMA with its operands in registers, whole rows of them: the largest tiles that do not spill. dq
# at a head dim of 256 spills about 200 bytes in every shape that was tried.
_FP32 = {
    ("forward", 4): {64: C(32, 32, 4, 2), 128: C(16, 32, 4, 1), 256: C(32, 16, 8, 1)},
    ("dq", 4): {64: C(32, 32, 4, 2), 128: C(16, 16, 8, 1), 256: C(16, 16, 8, 1)},
    ("dkdv", 4): {64: C(32, 32, 8, 2), 128: C(16, 32, 8, 1), 256: C(16, 16, 4, 1)},
}
# Waves, for 16 x 12 heads of 1024 tokens, D = 64 and causal: programs over what all multiprocessors hold at once. With
# 64 rows to a program (keys in dk and dv) 3072 programs: on 132 multiprocessors 11.6 waves at 2 blocks, 7.8 at 3, 5.8
# at 4; on 108 at 2 blocks 14.2. With 128 rows 1536: 5.8 at 2 blocks, 7.1 on 108. One row of the batch is 0.36 to 0.9 of
# a wave. Wasted: of the scores that are computed 5.8% lie beyond the diagonal in tiles of 64 x 64 and 32 x 64, 11.0% in
# 128 x 64 and 64 x 128 (at 2048 tokens half of that).
# {family: {(direction, bytes per element): {largest padded head dim: config}}}; bench/tune.py rewrites single lines.
# The comment of a row gives, per head dim, the SASS instructions of the unmasked loop per score of a thread and the
# blocks that an SM holds (bf16, causal, Triton 3.7.1), and why no other shape was taken.
ATTENTION = {
    # 163 KB of shared memory and mma.sync (A100).
    "sm_80": {
        # 9.5, 16.2, 72.4; 2, 1, 1 blocks. 128 x 128 at D = 64 takes 9.2 but holds one block; 64 rows re-read twice.
        ("forward", 2): {64: C(128, 64, 4, 3), 128: C(128, 64, 8, 3), 256: C(64, 32, 8, 2)},
        # 11.1, 19.9, 38.1; 2, 1, 2 blocks. Larger tiles hold one block or spill: q, do and dq all stay in registers.
        ("dq", 2): {64: C(64, 64, 4, 3), 128: C(64, 64, 8, 2), 256: C(32, 32, 4, 2)},
        # 14.6, 25.9, 48.2; 2, 1, 2 blocks. 64 x 128 at D = 64 takes 13.2 but spills without causality.
        ("dkdv", 2): {64: C(64, 64, 4, 3), 128: C(64, 64, 8, 2), 256: C(32, 32, 4, 2)},
        **_FP32,
    },
    # 99 KB of shared memory (RTX 30, 40, 50, L4, A10).
    "sm_86": {
        # 10.6, 23.5, 72.9; 3, 1, 1 blocks. 128 x 64 at D = 64 takes 9.4 but spills where there is padding.
        ("forward", 2): {64: C(64, 64, 4, 2), 128: C(64, 64, 4, 2), 256: C(64, 32, 8, 2)},
        # 10.9, 19.6, 40.2; 2, 1, 1 blocks. What fits beside k and v in 99 KB with two stages, or one at D = 256.
        ("dq", 2): {64: C(64, 64, 4, 2), 128: C(64, 32, 4, 2), 256: C(32, 32, 4, 1)},
        # 13.7, 25.8, 52.2; 2, 1, 1 blocks. As dq; 64 x 128 at D = 64 takes 13.2 but holds one block.
        ("dkdv", 2): {64: C(64, 64, 4, 2), 128: C(64, 64, 8, 2), 256: C(32, 32, 4, 1)},
        **_FP32,
    },
    # 227 KB of shared memory and WGMMA, which wants 64 rows per group of four warps (H100, H200, B200).
    "sm_90": {
        # 8.6, 10.3, 14.3; 2, 1, 1 blocks. At D = 64 128 x 128 takes 6.9 but holds one block: on an H100 this takes 13
        # to 29% less time (bench/results/nvidia-h100-80gb-hbm3/NOTES.md). 64 rows re-read k and v twice as often.
        ("forward", 2): {64: C(128, 64, 8, 3), 128: C(128, 64, 8, 3), 256: C(128, 64, 8, 2)},
        # 8.6; 3 blocks. Beside the row above 12, 12, 8 and 3% less time at T = 128, 256, 512, 1024 on the same H100, 1%
        # more at 2048 (second_visit/tiles.json there). Half the queries, and the same bits.
        ("short forward", 2): {64: C(64, 64, 4, 2)},
        # Times on the same H100 (second_visit/tiles.json, more_tiles.json there). D = 64: 128 x 64 takes 6.9
        # instructions per score, this 7.7, but holds two blocks, this four: 11 to 16% more time at every T. D = 256:
        # 8 warps take 40 to 65% more.
        ("dq", 2): {64: C(64, 64, 4, 2), 128: C(64, 64, 4, 2), 256: C(64, 32, 4, 2)},
        # D = 64: 64 x 64 takes 8.7, this 11.5, but holds two blocks, this three: 8 to 11% more time. D = 128: 8 warps
        # take 60 to 100% more. D = 256: 32 x 32 takes 60 to 85% more.
        ("dkdv", 2): {64: C(32, 64, 4, 3), 128: C(64, 64, 4, 2), 256: C(32, 64, 8, 2)},
        **_FP32,
    },
    # 64 KB of LDS, wavefronts of 64 (MI300): the largest tiles tried that spill no vector register in any dtype.
    "gfx942": {
        ("forward", 2): {64: C(128, 32, 4, 1), 128: C(128, 64, 4, 1), 256: C(64, 32, 4, 1)},
        ("dq", 2): {64: C(64, 32, 4, 1), 128: C(64, 32, 4, 1), 256: C(32, 32, 4, 1)},
        ("dkdv", 2): {64: C(32, 64, 4, 1), 128: C(64, 32, 4, 1), 256: C(32, 32, 4, 1)},
        ("forward", 4): {64: C(64, 32, 4, 1), 128: C(32, 32, 4, 1), 256: C(16, 32, 4, 1)},
        ("dq", 4): {64: C(32, 32, 4, 1), 128: C(32, 16, 4, 1), 256: C(16, 16, 4, 1)},
        ("dkdv", 4): {64: C(32, 32, 4, 1), 128: C(16, 32, 4, 1), 256: C(16, 16, 4, 1)},
    },
}
# Dropout's draws need registers too, at head dims up to 64 and two bytes: the rows above then spill 40 bytes in forward
# and 8 in dkdv on sm_80, where the sums of its gradients are wanted, too, and 40 in dkdv on sm_120; on sm_90 128 x 64
# holds one block of 8 warps where this holds three of 4. Not measured.
ATTENTION_WITH_DROPOUT = {
    "sm_80": {"forward": C(64, 64, 4, 3), "dkdv": C(32, 64, 4, 2)},
    "sm_86": {"dkdv": C(32, 64, 4, 2)},
    "sm_90": {"forward": C(64, 64, 4, 2)},
}

# Tiles of attention/hopper.py ("forward") and hopper_backward.py, which are Gluon and for sm_90 alone; num_stages are
# the slots of what comes by TMA. Instructions per score and blocks as above.
HOPPER = {
    # 6.9 and 10.6; 3 and 2 blocks. At D = 128 64 x 128 would hold one.
    "forward": {64: C(64, 128, 4, 2), 128: C(64, 64, 4, 2)},
    # 9.3; 4 blocks, with less to mask on the diagonal. On an H100 beside the row above 9, 7, 3, 2 and -4% less time at
    # T = 128, 256, 512, 1024, 2048 (bench/results/nvidia-h100-80gb-hbm3/fourth_visit).
    "short forward": {64: C(64, 64, 4, 2)},
    # 8.3 and 15.4; 3 and 2 blocks. 64 x 128 takes 6.6 but holds one block: 4 to 10% more time, backward as a whole.
    "dq": {64: C(64, 64, 4, 3), 128: C(64, 32, 4, 3)},
    # 12.3 and 17.3; 2 blocks.
    "dkdv": {64: C(64, 64, 4, 3), 128: C(32, 64, 4, 3)},
    # 15.0; 3 blocks. Backward as a whole beside the row above 3, 3, 2, 0, -1, -3% less time at T = 128, ..., 4096.
    "short dkdv": {64: C(32, 64, 4, 3)},
    # 64 keys; D = 128 would not fit a thread's registers.
    "one pass": {64: C(64, 64, 4, 3)},
}
HOPPER_HEAD_DIMS = tuple(HOPPER["forward"])
# {direction: head dims} for which kernel="auto" takes them: those that an H100 was faster with.
HOPPER_CHOSEN = {"forward": (64,), "backward": (64,)}


def hopper_config(direction, head_dim, T):
    """The tile of "forward", "dq" or "dkdv" for T queries."""
    rows = HOPPER[direction]
    if T <= SHORT_T:
        rows = rows | HOPPER.get(f"short {direction}", {})
    return rows[head_dim]


def family(arch):
    """The row of the table that serves an architecture: a compute capability, "gfx...", or None when interpreted."""
    if isinstance(arch, str):
        return "gfx942"
    if arch is None or arch in (86, 87, 89) or arch >= 120:
        return "sm_86"
    return "sm_80" if arch < 90 else "sm_90"


SHORT_T = 1024  # queries up to which a row "short ..." serves


def attention_row(chip, direction, itemsize, head_dim, T):
    """The key of the row of ATTENTION that serves T queries: a short one's, if there is one."""
    short = f"short {direction}", itemsize
    is_short = T is not None and T <= SHORT_T and any(head_dim <= limit for limit in ATTENTION[chip].get(short, ()))
    return short if is_short else (direction, itemsize)


def attention_config(direction, dtype, head_dim, T=None, dropout=False):
    """The tile shape for "forward", "dq" or "dkdv" on the chip that kernels are compiled for now.

    T: the number of queries, the only size that counts, so that a row's bits do not depend on the batch.
    """
    chip = family(active_arch())
    if dropout and dtype.itemsize == 2 and head_dim <= 64 and direction in ATTENTION_WITH_DROPOUT.get(chip, ()):
        return ATTENTION_WITH_DROPOUT[chip][direction]
    rows = ATTENTION[chip][attention_row(chip, direction, dtype.itemsize, head_dim, T)]
    return next(config for limit, config in rows.items() if head_dim <= limit)


@dataclass(frozen=True)
class RowConfig:
    """BLOCK_M rows at a time, each as COLUMN_TILES tiles of BLOCK_N columns.

    Of the backward pass: SUMS, with sums over rows beside them; STAGES, how many BLOCK_M rows are loaded ahead, and 1.
    """

    BLOCK_M: int
    BLOCK_N: int
    COLUMN_TILES: int
    num_warps: int
    SUMS: bool = True
    STAGES: int = 1


def row_config(direction, N):
    """How LayerNorm's "forward" or "backward" holds rows of N columns; N at most 16384.

    It depends on nothing but N, so that a row's bits do not depend on how many rows there are.

    Measured on an H100 (second_visit/rows.json), bf16, M 16384, N 768 and 1600. Forward: one row, and as few warps as
    keep 12 to 16 of its elements a thread: 18.7 and 36.3 us, where 16 and 8 rows to 8 warps took 23.2 and 62.0.
    Backward: few rows at a time, the next two asked for meanwhile, and two programs to a multiprocessor: 43.9 and 80.6
    us, where 8 and 4 rows, none ahead and one program took 65.1 and 179.
    """
    wide = max(16, triton.next_power_of_2(N))
    BLOCK_N = min(256 * max(1, wide // 2048), wide)
    if direction == "forward":
        return RowConfig(1, BLOCK_N, triton.cdiv(N, BLOCK_N), min(16, max(1, wide // 512)))
    if N <= 1024:
        return RowConfig(2, BLOCK_N, triton.cdiv(N, BLOCK_N), 4, STAGES=3)
    if N <= 8192:
        return RowConfig(1, wide, 1, 8 if N <= 4096 else 16, STAGES=3 if N <= 2048 else 1)
    return RowConfig(1, 4096, triton.cdiv(N, 4096), 16, SUMS=False)


@dataclass(frozen=True)
class TileConfig:
    """A tile of BLOCK_M rows by BLOCK_N columns, computed by num_warps warps."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


# GELU: a warp's row is 256 columns, which divides GPT-2's widths; the bias is read once for 16 rows.
GELU_TILE = TileConfig(16, 256, 4)


class VocabularyConfig(NamedTuple):
    """A row of logits in tiles of UNROLL * LANES * VEC columns: VEC neighbours a load, UNROLL loads a thread."""

    UNROLL: int
    LANES: int
    VEC: int

    @property
    def num_warps(self):
        return self.LANES // 32


def vocabulary_config(V, softcap, *rows):
    """The tile for rows of V logits, as wide as it may be loaded: 16 bytes where every row of every tensor is aligned.

    It depends on V, the dtype, the alignment and whether there is a softcap, whose tanh takes registers and leaves half
    as many columns to a thread; not on the number of rows.
    """
    per_load = 16 // rows[0].element_size()
    aligned = True
    for x in rows:
        if x.stride(0) % per_load or x.data_ptr() % 16:
            aligned = False
    return _vocabulary_config(V, softcap, per_load, aligned)


@functools.lru_cache
def _vocabulary_config(V, softcap, per_load, aligned):
    # On an H100 2048 rows of 50257 in bf16, loss and gradient, take 258 us with 256 lanes and 171 with 512: fewer rows
    # at once, so that a row's second pass finds it in L2.
    LANES = 512 if V > 32768 else min(256, max(32, triton.next_power_of_2(V) // 16))
    UNROLL = 1 if softcap else 2
    return VocabularyConfig(UNROLL, LANES, per_load) if aligned else VocabularyConfig(UNROLL * per_load, LANES, 1)


def heads_in_l2(bytes_per_head, heads):
    """How many heads' keys and values go into L2 together."""
    return max(1, min(heads, L2_BYTES // max(bytes_per_head, 1)))
