"""Dropout as LayerNorm draws it, which drops what is added to the residual stream; attention's: attention/dropout.py.

Whether an element is kept depends on the seed and on the element's place, never on a tile: forward and backward draw
the same mask again, each in tiles of its own, and nothing is stored. (Philox4x32 with 7 rounds: Salmon et al., 2011.)
"""

import triton
import triton.language as tl

# Each element is decided by 16 random bits, so a probability is a multiple of 1 / 65536.
STEPS = 2**16


def dropout_numbers(dropout_p):
    """keep_scale = 1 / (1 - p) and drop_below = p * STEPS, for dropout_p rounded to a p that the kernels can draw."""
    drop_below = round(dropout_p * STEPS)
    return STEPS / (STEPS - drop_below), drop_below


@triton.jit
def dropout_mask(seed, offs_m, n, drop_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout keep-mask of rows offs_m, columns n to n + BLOCK_N; True with probability 1 - p. [BLOCK_M, BLOCK_N] bool.

    Philox at the counter (row, column // 8): each of its four words decides for two columns with 16 bits each.
    n is a multiple of 8; p is drop_below / STEPS.
    """
    row = tl.broadcast_to(offs_m[:, None], [BLOCK_M, BLOCK_N // 8]).to(tl.uint32)
    octet = tl.broadcast_to((n // 8 + tl.arange(0, BLOCK_N // 8))[None, :], [BLOCK_M, BLOCK_N // 8]).to(tl.uint32)
    zero = tl.zeros_like(row)
    a, b, c, d = tl.philox(seed, row, octet, zero, zero, n_rounds=7)  # [BLOCK_M, BLOCK_N / 8] each
    words = tl.join(tl.join(a, b), tl.join(c, d))  # [BLOCK_M, BLOCK_N / 8, 2, 2]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [BLOCK_M, BLOCK_N / 8, 2, 2, 2]
    return tl.reshape(halves, [BLOCK_M, BLOCK_N]) >= drop_below
