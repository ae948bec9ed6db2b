"""shfl vote match redux elect activemask: the threads of a warp look at each other.

Arrays are reshaped to (warps, 32). A thread named in the member mask but not active is undefined on hardware, and so
are values read from inactive threads; here they are whatever the register holds.
"""

import numpy as np

from ..operands import reader, writer
from ..ptx import TYPES, Pair
from .registry import guard_of, instruction, unknown

_LANE = np.arange(32)


def _rows(team, value):
    return np.broadcast_to(value, team.size).reshape(-1, 32)


def _active_rows(team, mask):
    return np.ones((team.warps, 32), bool) if mask is None else mask.reshape(-1, 32)


@instruction("shfl")
def shfl(inst, kernel):
    """shfl.sync.mode d|p, a, b, c: c holds the last lane and the segment mask; p: the source lies in it."""
    mode = inst.modifiers[1]
    target = inst.operands[0]
    value, shift, clamp = (reader(o, kind, kernel) for o, kind in zip(inst.operands[1:4], ("b32", "u32", "u32")))
    guard = guard_of(inst, kernel)
    write = writer(target.first if isinstance(target, Pair) else target, "b32")
    write_valid = writer(target.second, "pred") if isinstance(target, Pair) else None
    if mode not in ("up", "down", "bfly", "idx"):
        raise unknown(inst)

    def execute(team):
        mask = guard(team)
        b = np.asarray(shift(team)).astype(np.int64) & 31
        c = np.asarray(clamp(team)).astype(np.int64)
        b, c = (x if x.ndim == 0 else x.reshape(-1, 32) for x in (b, c))
        segment = (c >> 8) & 31
        low = _LANE & segment
        last = low | (c & 31 & ~segment)
        source = {
            "up": lambda: _LANE - b,
            "down": lambda: _LANE + b,
            "bfly": lambda: _LANE ^ b,
            "idx": lambda: low | (b & ~segment),
        }[mode]()
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, _LANE)
        rows = _rows(team, value(team))
        moved = rows[:, source] if source.ndim == 1 else np.take_along_axis(rows, source, 1)
        write(team, np.ascontiguousarray(moved).reshape(-1), mask)
        if write_valid:
            write_valid(team, np.broadcast_to(valid, rows.shape).reshape(-1).copy(), mask)

    return execute


@instruction("vote")
def vote(inst, kernel):
    mode = inst.modifiers[1]
    read = reader(inst.operands[1], "pred", kernel)
    guard, write = guard_of(inst, kernel), writer(inst.operands[0], "b32" if mode == "ballot" else "pred")

    def execute(team):
        mask = guard(team)
        holds, here = _rows(team, read(team)), _active_rows(team, mask)
        if mode == "ballot":
            result = ((holds & here) << _LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            every, some = (holds | ~here).all(1), (holds & here).any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(team, np.repeat(result, 32), mask)

    return execute


@instruction("activemask")
def activemask(inst, kernel):
    guard, write = guard_of(inst, kernel), writer(inst.operands[0], "b32")

    def execute(team):
        mask = guard(team)
        bits = (_active_rows(team, mask) << _LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        write(team, np.repeat(bits, 32), mask)

    return execute


@instruction("match")
def match(inst, kernel):
    """match.any: the lanes that hold my value; match.all: every lane if all hold the same, else none."""
    mode = inst.modifiers[0]
    target = inst.operands[0]
    read, guard = reader(inst.operands[1], inst.modifiers[-1], kernel), guard_of(inst, kernel)
    write = writer(target.first if isinstance(target, Pair) else target, "b32")
    write_all = writer(target.second, "pred") if isinstance(target, Pair) else None

    def execute(team):
        mask = guard(team)
        values, here = _rows(team, read(team)), _active_rows(team, mask)
        same = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        bits = (same << _LANE.astype(np.uint32)).sum(2, dtype=np.uint32)
        if mode == "all":
            agree = bits == (here << _LANE.astype(np.uint32)).sum(1, dtype=np.uint32)[:, None]
            bits = np.where(agree, bits, np.uint32(0))
            if write_all:
                write_all(team, agree.reshape(-1), mask)
        write(team, bits.reshape(-1), mask)

    return execute


_REDUCE = {
    "add": (np.add, 0), "min": (np.minimum, None), "max": (np.maximum, None),
    "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
}  # fmt: skip


@instruction("redux")
def redux(inst, kernel):
    """The reduction over the warp's active threads. A float one ignores NaN unless .NaN asks for it."""
    name, kind = inst.modifiers[1], inst.type
    ufunc, neutral = _REDUCE[name]
    if kind == "f32":
        ufunc = {"min": np.fmin, "max": np.fmax} if not inst.has("NaN") else {"min": np.minimum, "max": np.maximum}
        ufunc, neutral = ufunc[name], np.inf if name == "min" else -np.inf
    elif neutral is None:
        neutral = np.iinfo(TYPES[kind]).max if name == "min" else np.iinfo(TYPES[kind]).min
    neutral = np.array(neutral).astype(TYPES[kind])
    read, write, guard = reader(inst.operands[1], kind, kernel), writer(inst.operands[0], kind), guard_of(inst, kernel)
    absolute = inst.has("abs")

    def execute(team):
        mask = guard(team)
        values = _rows(team, read(team))
        values = np.where(_active_rows(team, mask), np.abs(values) if absolute else values, neutral)
        write(team, np.repeat(ufunc.reduce(values, axis=1, dtype=values.dtype), 32), mask)

    return execute


@instruction("elect")
def elect(inst, kernel):
    """elect.sync d|p, members: p is true for one thread, the lowest active one, whose number d holds."""
    target, guard = inst.operands[0], guard_of(inst, kernel)
    write_lane, write_chosen = writer(target.first, "b32"), writer(target.second, "pred")

    def execute(team):
        mask = guard(team)
        leader = _active_rows(team, mask).argmax(1)
        write_lane(team, np.repeat(leader, 32).astype(np.uint32), mask)
        write_chosen(team, (leader[:, None] == _LANE).reshape(-1), mask)

    return execute
