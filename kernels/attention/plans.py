"""From shapes and strides to launches: what the plans of forward.py, backward.py and decode.py share.

A plan is what kernels/launch.py asks for; it gets strides of [B, H, T, D] as tuples. Packed tensors are [B, T, n C].
"""

import math

import triton

from kernels.library import dot_precision

# Numbers whose divisibility helps no load: kernels are not compiled anew for it.
COUNTS = ("H", "heads_per_group")


def constants(strides, head_dim, **rest):
    """The constexprs and compiler's options that every attention kernel takes, and the rest. strides: its tensors'."""
    BLOCK_D = max(16, triton.next_power_of_2(head_dim))
    VECTOR = math.gcd(8, *strides)
    return {"HEAD_DIM": head_dim, "BLOCK_D": BLOCK_D, "VECTOR": VECTOR, "enable_fp_fusion": True, **rest}


def tile_constants(config, dtype, strides, head_dim, causal, dropout):
    """constants of the kernels that walk over tiles."""
    return constants(
        strides,
        head_dim,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        IS_CAUSAL=causal,
        HAS_DROPOUT=dropout,
        DOT_PRECISION=dot_precision(dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def contiguous_heads(T, H, D, n=1):
    """Strides of [B, H, T, D] where memory holds [B, T, n, H, D]."""
    return T * n * H * D, D, n * H * D


def packed_heads(strides, D):
    """Strides of [B, H, T, D] where a tensor [B, T, n C] has these strides."""
    return strides[0], D, strides[1]
