"""ld and st: parameters, global, shared and local memory."""

import numpy as np

from ..errors import Unimplemented
from ..global_races import STRONG
from ..operands import reader, writer
from ..ptx import TYPES, Address, Immediate, Register, Symbol, Vector
from .registry import guard_of, instruction, unknown

MEMORIES = {"global": "memory", "shared": "shared", "local": "local"}  # a team's attributes
SPACES = ("param", *MEMORIES)


def space_of(inst):
    return next((s for s in SPACES if s in inst.modifiers), None)


def address_reader(operand, kind, kernel):
    """A function of the team that gives the addresses `[base + offset]` as an array with one element per thread."""
    if not isinstance(operand, Address):
        raise Unimplemented(f"address {operand}")
    base, dtype = operand.base, TYPES[kind]
    read = reader(base, kind, kernel)
    offset = dtype.type(operand.offset & ((1 << 8 * dtype.itemsize) - 1))
    if isinstance(base, (Immediate, Symbol)):
        return lambda team: np.full(team.size, read(team) + offset)
    return (lambda team: read(team) + offset) if operand.offset else read


def _address_kind(space, operand):
    """Global addresses have 64 bits and shared ones 32; the compiler puts local ones into registers of either size."""
    if space == "local" and isinstance(operand, Address) and isinstance(operand.base, Register):
        return f"u{8 * TYPES[operand.base.type].itemsize}"
    return "u64" if space == "global" else "u32"


def items(operand):
    return operand.items if isinstance(operand, Vector) else (operand,)


def active(mask):
    """The indices of the threads that a mask chooses, None for all."""
    return None if mask is None else np.flatnonzero(mask)


def chosen(values, threads):
    return values if threads is None else values[threads]


@instruction("ld")
def ld(inst, kernel):
    space = space_of(inst)
    if space == "param":
        return _load_parameter(inst, kernel)
    if space is None:
        raise unknown(inst)
    targets, size, count = items(inst.operands[0]), TYPES[inst.type].itemsize, len(items(inst.operands[0]))
    where = address_reader(inst.operands[1], _address_kind(space, inst.operands[1]), kernel)
    write, guard = [writer(t, inst.type) for t in targets], guard_of(inst, kernel)
    dtype = TYPES[inst.type]
    strong = inst.has(*STRONG)

    def execute(team):
        mask = guard(team)
        threads = active(mask)
        if threads is not None and not len(threads):
            for put in write:
                put(team, np.zeros(team.size, dtype), mask)
            return
        memory = getattr(team, MEMORIES[space])
        addresses = chosen(where(team), threads)
        offsets = memory.locate(team, addresses, size * count, threads)
        if space == "shared":
            pattern = team.pattern(addresses, size * count, threads)
            team.races.read_by(team, inst, offsets, size * count, threads, pattern.distinct)
            team.counters.shared(pattern)
        elif space == "global":
            team.counters.read(team, inst, offsets, size * count, threads)
            look = team.global_races.atomic_by if strong else team.global_races.read_by
            look(team, inst, offsets, size * count, threads)
        rows = memory.load(offsets, size, count)
        for k, put in enumerate(write):
            column = np.ascontiguousarray(rows[:, k]).view(dtype)
            if threads is not None:
                spread = np.zeros(team.size, dtype)
                spread[threads] = column
                column = spread
            put(team, column, mask)

    return execute


def _load_parameter(inst, kernel):
    address = inst.operands[1]
    name = address.base.name
    if address.offset or isinstance(inst.operands[0], Vector):
        raise unknown(inst)
    write, guard, dtype = writer(inst.operands[0], inst.type), guard_of(inst, kernel), TYPES[inst.type]

    def execute(team):
        value = team.batch.launch.arguments[name]
        write(
            team,
            np.full(team.size, value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(dtype)),
            guard(team),
        )

    return execute


@instruction("st")
def st(inst, kernel):
    space = space_of(inst)
    if space not in MEMORIES:
        raise unknown(inst)
    sources, size = items(inst.operands[1]), TYPES[inst.type].itemsize
    count, raw = len(sources), f"b{8 * size}"
    where = address_reader(inst.operands[0], _address_kind(space, inst.operands[0]), kernel)
    read, guard = [reader(s, raw, kernel) for s in sources], guard_of(inst, kernel)
    dtype, strong = TYPES[raw], inst.has(*STRONG)

    def execute(team):
        threads = active(guard(team))
        if threads is not None and not len(threads):
            return
        memory = getattr(team, MEMORIES[space])
        addresses = chosen(where(team), threads)
        offsets = memory.locate(team, addresses, size * count, threads)
        values = np.empty((len(offsets), count), dtype)
        for k, get in enumerate(read):
            value = get(team)
            values[:, k] = value if value.ndim == 0 else chosen(value, threads)
        if space == "shared":
            team.races.written_by(team, inst, offsets, size * count, threads, values.view(np.uint8))
            team.counters.shared(team.pattern(addresses, size * count, threads))
        elif space == "global":
            team.counters.wrote(team, inst, offsets, size * count, threads)
            if strong:
                team.global_races.atomic_by(team, inst, offsets, size * count, threads)
            else:
                team.global_races.written_by(team, inst, offsets, size * count, threads, values.view(np.uint8))
        memory.store(offsets, values, size, count)

    return execute
