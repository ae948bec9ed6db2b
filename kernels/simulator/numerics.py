"""Number formats that numpy lacks, and roundings that it would do twice."""

import numpy as np

U16, U32, U64 = np.uint16, np.uint32, np.uint64


def bf16_to_f32(bits):
    """uint16 bit patterns -> float32, exact."""
    return (bits.astype(U32) << U32(16)).view(np.float32)


def f32_to_bf16(values):
    """float32 -> uint16 bit patterns of bf16, to nearest even; NaN becomes the canonical 0x7fff."""
    bits = values.view(U32)
    rounded = ((bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1)))) >> U32(16)).astype(U16)
    nan = np.isnan(values)
    return np.where(nan, U16(0x7FFF), rounded) if np.count_nonzero(nan) else rounded


def f32_to_tf32(values):
    """float32 -> float32 with the 13 low mantissa bits cut off: what the tensor cores read of a tf32 operand."""
    return (values.view(U32) & U32(0xFFFFE000)).view(np.float32)


def fma_f32(a, b, c):
    """a * b + c in float32 with a single rounding.

    The product is exact in float64; the float64 sum is inexact in its 53rd bit, and rounding it again to 24 bits can
    only differ from one rounding where the sum fell on a midpoint between two float32 values. There the sum is redone
    with the rounding error known. (Midpoints between subnormal results are not treated.)
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    midpoint = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if np.count_nonzero(midpoint):
        total = np.where(midpoint, round_to_odd(product, np.float64(1) * c, total), total)
    return total.astype(np.float32)


def round_to_odd(a, b, total):
    """`total` = fl(a + b), moved to the odd neighbour on the exact sum's side where it was rounded (Boldo, Melquiond
    2008).

    Rounding the result to a narrower format is then as if the exact sum had been rounded.
    """
    shadow = total - a
    error = (a - (total - shadow)) + (b - shadow)  # Knuth's TwoSum: exact
    bits = np.atleast_1d(total).view(np.int64)
    even = (bits & 1) == 0
    away = (error > 0) == (total > 0)  # the exact sum has the larger magnitude
    step = np.where(away, 1, -1)
    moved = np.where(even & (error != 0) & np.isfinite(total), bits + step, bits)
    return moved.view(np.float64)


def flush(values):
    """Subnormal float32 values become zeros of the same sign: `.ftz`."""
    small = np.abs(values) < np.float32(2**-126)
    return np.where(small, np.copysign(np.float32(0), values), values) if np.count_nonzero(small) else values
