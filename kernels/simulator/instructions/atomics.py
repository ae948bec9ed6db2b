"""atom and red: read-modify-write of global and shared memory.

Threads take their turns in the order of their blocks and numbers; another order is as right, and a float sum may then
differ in its last bits. Scopes and memory orders (.gpu, .acq_rel, ...) change no value, as every access is in order
here: they tell global_races.py what is ordered.
"""

import numpy as np

from ..numerics import bf16_to_f32, f32_to_bf16
from ..operands import reader, writer
from ..ptx import TYPES
from .memory_access import active, address_reader, chosen, items, space_of
from .registry import guard_of, instruction, unknown

_OPERATIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor":
    np.bitwise_xor, "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, np.zeros_like(old), old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
}  # fmt: skip


def _operation(inst):
    """A function (old, value) -> new on arrays of the instruction's type."""
    name = next((m for m in inst.modifiers if m in _OPERATIONS), None)
    if name is None:
        raise unknown(inst)
    compute, kind = _OPERATIONS[name], inst.type
    if name in ("min", "max") and kind in ("f16", "f32", "f64"):
        raise unknown(inst)
    if kind in ("bf16", "bf16x2"):
        return lambda old, new: f32_to_bf16(compute(bf16_to_f32(old), bf16_to_f32(new)))
    return compute


@instruction("atom", "red")
def atom(inst, kernel):
    space, kind = space_of(inst), inst.type
    if space not in ("global", "shared") or (inst.has("cas") and kind not in ("b16", "b32", "b64")):
        raise unknown(inst)
    operands = list(inst.operands)
    targets = items(operands.pop(0)) if inst.opcode == "atom" else ()
    where = address_reader(operands[0], "u32" if space == "shared" else "u64", kernel)
    read = [[reader(v, kind, kernel) for v in items(operand)] for operand in operands[1:]]
    write, guard = [writer(t, kind) for t in targets], guard_of(inst, kernel)
    compare = inst.has("cas")
    update = None if compare else _operation(inst)
    size, count = TYPES[kind].itemsize, len(read[0])
    # Packed halves are added one by one.
    element = {"f16x2": np.dtype("f2"), "bf16x2": np.dtype("u2")}.get(kind, TYPES[kind])

    def execute(team):
        mask = guard(team)
        threads = active(mask)
        if threads is None:
            threads = np.arange(team.size)
        if not len(threads):
            for put in write:
                put(team, np.zeros(team.size, TYPES[kind]), mask)
            return
        memory = team.shared if space == "shared" else team.memory
        addresses = chosen(where(team), threads)
        offsets = memory.locate(team, addresses, size * count, threads)
        if space == "shared":
            team.races.written_by(team, inst, offsets, size * count, threads, atomic=True)
            team.counters.shared(team.pattern(addresses, size * count, threads))
        else:
            team.counters.atomic(team, inst, offsets, size * count, threads)
            team.global_races.atomic_by(team, inst, offsets, size * count, threads)
        values = [
            np.stack([np.broadcast_to(get(team), team.size)[threads] for get in group], 1).view(element)
            for group in read
        ]
        table = memory.bytes.view(element).reshape(-1, values[0].shape[1])
        rows = offsets // (size * count)
        old = np.empty_like(values[0])
        for turn in _turns(rows):
            at = rows[turn]
            old[turn] = table[at]
            if compare:
                table[at] = np.where(old[turn] == values[0][turn], values[1][turn], old[turn])
            else:
                table[at] = update(old[turn], values[0][turn])
        result = old.view(TYPES[kind])
        for k, put in enumerate(write):
            spread = np.zeros(team.size, TYPES[kind])
            spread[threads] = result[:, k]
            put(team, spread, mask)

    return execute


def _turns(rows):
    """Splits positions into turns in which no row occurs twice; each row's positions come in order."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    if first.all():
        return [slice(None)]
    begin = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    turn = np.arange(len(rows)) - begin
    by_turn = order[np.argsort(turn, kind="stable")]
    return np.split(by_turn, np.cumsum(np.bincount(turn))[:-1])
