"""How an instruction's operands become numpy arrays, and results become registers.

A register of a team is one array with an element per thread. It is never written in place: a result replaces the array,
so a move costs nothing and arrays may be shared. Its dtype is whatever the last writer produced; readers view the same
bits as the type that they name. Immediates are numpy scalars, which broadcast.
"""

import numpy as np

from .errors import Unimplemented
from .ptx import TYPES, Immediate, Register, Special, Symbol

POISON = 0xFF  # every byte that no one wrote: NaN in each float format, and no plausible address


def constant(operand, kind):
    """An Immediate as a numpy scalar of the PTX type `kind`."""
    dtype = TYPES[kind]
    if operand.float_bits:
        value = np.array(operand.value, f"u{operand.float_bits // 8}")
        if dtype.kind == "f" and dtype.itemsize * 8 != operand.float_bits:
            return value.view(f"f{operand.float_bits // 8}").astype(dtype)[()]
        return value.view(dtype)[()]
    if dtype.kind == "b":
        return np.bool_(operand.value != 0)
    if dtype.kind == "f":
        return dtype.type(operand.value)
    bits = 8 * dtype.itemsize
    return np.array(operand.value & ((1 << bits) - 1), f"u{dtype.itemsize}").view(dtype)[()]


def reader(operand, kind, kernel):
    """A function of the team that gives the operand's value as the PTX type `kind`."""
    dtype = TYPES[kind]
    if isinstance(operand, Immediate):
        value = constant(operand, kind)
        return lambda team: value
    if isinstance(operand, Special):
        name = operand.name
        return lambda team: team.special(name).astype(dtype)
    if isinstance(operand, Symbol) and operand.name in kernel.symbols:
        value = dtype.type(kernel.symbols[operand.name] + SHARED_BASE)
        return lambda team: value
    if isinstance(operand, Symbol) and operand.name in kernel.tables:
        return lambda team: dtype.type(team.memory.tables[operand.name])
    if isinstance(operand, Symbol) and operand.name in kernel.maps:
        value = dtype.type(MAPS_BASE + 128 * kernel.maps.index(operand.name))
        return lambda team: value
    if isinstance(operand, Symbol):
        raise Unimplemented(f"{operand.name}, which is neither an array in shared or local memory nor a table of bytes")
    if not isinstance(operand, Register):
        raise Unimplemented(f"operand {operand} as {kind}")
    index, declared = operand.index, TYPES[operand.type]
    if declared.itemsize < dtype.itemsize or (declared.kind == "b") != (dtype.kind == "b"):
        raise Unimplemented(f"a .{operand.type} register read as .{kind}")
    if declared.itemsize == dtype.itemsize:

        def read(team):
            value = team.registers[index]
            if value is None:
                value = team.poison(index, declared)
            return value if value.dtype is dtype else value.view(dtype)

        return read
    wide, narrow = np.dtype(f"u{declared.itemsize}"), np.dtype(f"u{dtype.itemsize}")

    def read_low(team):
        value = team.registers[index]
        if value is None:
            value = team.poison(index, declared)
        return value.view(wide).astype(narrow).view(dtype)

    return read_low


# Where tensor maps among the parameters stand, one after the other: Triton 3.9 takes their addresses by 32 bits.
MAPS_BASE = 0x6F000000
# Shared memory starts here in every block, so that address zero is never valid.
SHARED_BASE = 1024


def writer(operand, kind):
    """A function (team, value, mask) that puts `value`, of the PTX type `kind`, into the operand where the mask is set.

    A register wider than the type is filled by sign or zero extension, as `ld` does.
    """
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda team, value, mask: None
    if not isinstance(operand, Register):
        raise Unimplemented(f"destination {operand}")
    index, declared, dtype = operand.index, TYPES[operand.type], TYPES[kind]
    if declared.itemsize < dtype.itemsize:
        raise Unimplemented(f"a .{kind} result in a .{operand.type} register")
    widen = (
        np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{declared.itemsize}")
        if declared.itemsize > dtype.itemsize
        else None
    )

    def write(team, value, mask):
        if widen is not None:
            value = value.astype(widen)
        if value.ndim == 0:
            value = np.full(team.size, value)
        if mask is not None:
            old = team.registers[index]
            if old is None:
                old = team.poison(index, declared)
            value = np.where(mask, value, old if old.dtype is value.dtype else old.view(value.dtype))
        team.registers[index] = value

    return write
