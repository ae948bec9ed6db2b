"""mov, cvta, and ld.param's companions: values change place or are packed and unpacked, never altered."""

import numpy as np

from ..operands import reader, writer
from ..ptx import TYPES, Vector
from .registry import Formula, elementwise, guard_of, instruction, unknown


def _raw(bits):
    return f"b{bits}"


@instruction("mov")
def mov(inst, kernel):
    target, source = inst.operands
    guard = guard_of(inst, kernel)
    if isinstance(target, Vector):
        return _unpack(inst, target.items, source, kernel, guard)
    if isinstance(source, Vector):
        return _pack(inst, target, source.items, kernel, guard)
    read, write = reader(source, inst.type, kernel), writer(target, inst.type)
    return lambda team: write(team, read(team), guard(team))


def _unpack(inst, targets, source, kernel, guard):
    """mov.b64 {lo, hi}, r: the low part comes first."""
    bits = 8 * TYPES[inst.type].itemsize // len(targets)
    part = np.dtype(f"u{bits // 8}")
    read = reader(source, _raw(8 * TYPES[inst.type].itemsize), kernel)
    write = [writer(t, _raw(bits)) for t in targets]

    def execute(team):
        value, mask = np.broadcast_to(read(team), team.size), guard(team)
        parts = np.ascontiguousarray(value).view(part).reshape(team.size, len(write))
        for k, put in enumerate(write):
            put(team, np.ascontiguousarray(parts[:, k]), mask)

    return execute


def _pack(inst, target, sources, kernel, guard):
    whole = TYPES[inst.type].itemsize
    bits = 8 * whole // len(sources)
    read = [reader(s, _raw(bits), kernel) for s in sources]
    write = writer(target, _raw(8 * whole))
    dtype = np.dtype(f"u{whole}")

    def execute(team):
        parts = np.empty((team.size, len(read)), f"u{bits // 8}")
        for k, get in enumerate(read):
            parts[:, k] = get(team)
        write(team, parts.view(dtype).reshape(-1), guard(team))

    return execute


@elementwise("cvta")
def cvta(inst):
    """Between generic and named address spaces; global addresses are their own generic ones here."""
    if not inst.has("global", "param", "const"):
        raise unknown(inst)
    return Formula(lambda a: a, inst.type, (inst.type,))
