"""and or xor not shl shr shf bfe bfi prmt lop3 popc clz brev bfind: operations on bit patterns."""

import numpy as np

from ..ptx import TYPES, Immediate
from .registry import Formula, elementwise, unknown

U32, U64 = np.uint32, np.uint64


def _logic(opcode, compute):
    @elementwise(opcode)
    def describe(inst):
        if inst.type == "pred":
            return Formula(compute, "pred", ("pred",) * (len(inst.operands) - 1))
        return Formula(compute, inst.type, (inst.type,) * (len(inst.operands) - 1))


_logic("and", np.bitwise_and)
_logic("or", np.bitwise_or)
_logic("xor", np.bitwise_xor)
_logic("not", np.invert)


@elementwise("cnot")
def cnot(inst):
    dtype = TYPES[inst.type]
    return Formula(lambda a: (a == 0).astype(dtype), inst.type, (inst.type,))


@elementwise("shl")
def shl(inst):
    """Shifts of the register's width or more give zero."""
    dtype = TYPES[inst.type]
    bits = 8 * dtype.itemsize
    fixed = inst.operands[2]
    if isinstance(fixed, Immediate) and fixed.value < bits:
        return Formula(lambda a, n: a << dtype.type(n), inst.type, (inst.type, "u32"))
    return Formula(
        lambda a, n: np.where(n < bits, a << np.minimum(n, U32(bits - 1)).astype(dtype), dtype.type(0)),
        inst.type,
        (inst.type, "u32"),
    )


@elementwise("shr")
def shr(inst):
    """Signed types shift the sign in; shifts of the register's width or more leave only it, or zero."""
    dtype = TYPES[inst.type]
    bits = 8 * dtype.itemsize

    def compute(a, n):
        shifted = a >> np.minimum(n, U32(bits - 1)).astype(dtype)
        return shifted if dtype.kind == "i" else np.where(n < bits, shifted, dtype.type(0))

    fixed = inst.operands[2]
    if isinstance(fixed, Immediate) and fixed.value < bits:
        compute = lambda a, n: a >> dtype.type(n)  # noqa: E731
    return Formula(compute, inst.type, (inst.type, "u32"))


@elementwise("shf")
def shf(inst):
    """A funnel shift of the 64 bits {b, a}: .l gives the upper word, .r the lower one; .wrap takes the count mod 32."""
    left, wrap = inst.has("l"), inst.has("wrap")

    def compute(a, b, n):
        n = (n & U32(31)) if wrap else np.minimum(n, U32(32))
        both = np.atleast_1d(a).astype(U64) | (np.atleast_1d(b).astype(U64) << U64(32))
        n = np.asarray(n).astype(U64)
        # A shift by 32 + 32 would leave uint64's range, so the left shift is done as a right shift by 32 - n.
        return ((both >> (U64(32) - n)) if left else (both >> n)).astype(U32)

    return Formula(compute, "b32", ("b32", "b32", "u32"))


@elementwise("bfe")
def bfe(inst):
    """`length` bits of `a` from `start`, zero or sign extended. Bits above the register count as its sign, or zero."""
    dtype = TYPES[inst.type]
    bits = 8 * dtype.itemsize
    signed = dtype.kind == "i"

    def compute(a, start, length):
        start, length = start & U32(0xFF), length & U32(0xFF)
        wide = np.atleast_1d(a) >> np.minimum(start, U32(bits - 1)).astype(dtype)
        if not signed:
            wide = np.where(start < bits, wide, dtype.type(0))
            keep = np.where(length < bits, (U64(1) << np.minimum(length, U32(63)).astype(U64)) - U64(1), ~U64(0))
            return wide & keep.astype(dtype)
        unused = np.where(length < bits, U32(bits) - np.minimum(length, U32(bits)), U32(0)).astype(dtype)
        field = (wide << np.minimum(unused, dtype.type(bits - 1))) >> np.minimum(unused, dtype.type(bits - 1))
        return np.where(length == 0, dtype.type(0), field)

    return Formula(compute, inst.type, (inst.type, "u32", "u32"))


@elementwise("bfi")
def bfi(inst):
    """Puts the `length` low bits of `a` into `b` from `start` on."""
    dtype = TYPES[inst.type]
    bits = 8 * dtype.itemsize

    def compute(a, b, start, length):
        start, length = (start & U32(0xFF)).astype(U64), (length & U32(0xFF)).astype(U64)
        ones = np.where(length < 64, (U64(1) << np.minimum(length, U64(63))) - U64(1), ~U64(0))
        field = np.where(start < bits, ones << np.minimum(start, U64(63)), U64(0)).astype(dtype)
        moved = np.where(start < bits, a << np.minimum(start, U64(bits - 1)).astype(dtype), dtype.type(0))
        return (moved & field) | (b & ~field)

    return Formula(compute, inst.type, (inst.type, inst.type, "u32", "u32"))


@elementwise("prmt")
def prmt(inst):
    """Picks four of the eight bytes {b, a}; each selector nibble's top bit replicates the byte's sign instead."""
    if inst.modifiers != ("b32",):
        raise unknown(inst)
    selector = inst.operands[3]
    if isinstance(selector, Immediate) and not selector.value & 0x8888:
        picks = [(selector.value >> (4 * k)) & 7 for k in range(4)]

        def compute(a, b, _):
            result = U32(0)
            for k, pick in enumerate(picks):
                source, byte = (a, pick) if pick < 4 else (b, pick - 4)
                part = source & U32(0xFF << (8 * byte))
                distance = 8 * (k - byte)
                result = result | (part << U32(distance) if distance >= 0 else part >> U32(-distance))
            return result

        return Formula(compute, "b32", ("b32", "b32", "b32"))

    def general(a, b, c):
        a, b, c = np.broadcast_arrays(a, b, c)
        both = np.atleast_1d(a).astype(U64) | (np.atleast_1d(b).astype(U64) << U64(32))
        result = U32(0)
        for k in range(4):
            nibble = (c >> U32(4 * k)) & U32(15)
            byte = ((both >> ((nibble & U32(7)) * U32(8)).astype(U64)) & U64(0xFF)).astype(U32)
            sign = np.where(byte & U32(0x80), U32(0xFF), U32(0))
            result = result | (np.where(nibble & U32(8), sign, byte) << U32(8 * k))
        return result

    return Formula(general, "b32", ("b32", "b32", "b32"))


@elementwise("lop3")
def lop3(inst):
    """Any function of three bits: its truth table is the fourth operand, a's value the table's high bit."""
    if inst.modifiers != ("b32",):
        raise unknown(inst)
    table = inst.operands[4].value

    def compute(a, b, c, _):
        result = U32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result | (a & U32(0))

    return Formula(compute, "b32", ("b32", "b32", "b32", "b32"))


@elementwise("popc")
def popc(inst):
    return Formula(lambda a: np.bitwise_count(a).astype(U32), "u32", (inst.type,))


def _leading_zeros(a, bits):
    """Smears the top bit downwards and counts what stays clear above it."""
    for distance in (1, 2, 4, 8, 16, 32):
        if distance < bits:
            a = a | (a >> a.dtype.type(distance))
    return (bits - np.bitwise_count(a)).astype(U32)


@elementwise("clz")
def clz(inst):
    bits = 8 * TYPES[inst.type].itemsize
    return Formula(lambda a: _leading_zeros(a, bits), "u32", (inst.type,))


@elementwise("bfind")
def bfind(inst):
    """The position of the most significant bit (for signed types, of the one that is not the sign), or -1."""
    dtype = TYPES[inst.type]
    bits = 8 * dtype.itemsize

    def compute(a):
        unsigned = (np.where(a < 0, ~a, a) if dtype.kind == "i" else a).view(f"u{dtype.itemsize}")
        return U32(bits - 1) - _leading_zeros(unsigned, bits)

    if inst.has("shiftamt"):
        raise unknown(inst)
    return Formula(compute, "u32", (inst.type,))


@elementwise("brev")
def brev(inst):
    dtype = TYPES[inst.type]

    def compute(a):
        octets = np.atleast_1d(a).view(np.uint8).reshape(-1, dtype.itemsize)
        flipped = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
        return np.packbits(flipped, axis=1, bitorder="little").view(dtype).reshape(-1)

    return Formula(compute, inst.type, (inst.type,))
