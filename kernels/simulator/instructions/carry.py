"""Sums of more bits than a register has: add, sub and mad with .cc set the carry flag; addc, subc and madc read it.

The flag is a thread's, and lives from one instruction to the next: compilers put a chain side by side.
"""

import numpy as np

from ..operands import reader, writer
from ..ptx import TYPES
from .registry import guard_of, instruction, unknown

_SOURCES = {"add": 2, "sub": 2, "mad": 3}
_KINDS = ("u32", "s32", "b32")


@instruction("add.cc", "addc", "addc.cc", "sub.cc", "subc", "subc.cc", "mad.cc", "madc", "madc.cc")
def with_carry(inst, kernel):
    operation = inst.opcode.removesuffix("c")
    halves = {m for m in inst.modifiers if m not in TYPES} - {"cc"}
    if inst.type not in _KINDS or halves not in (({"lo"}, {"hi"}) if operation == "mad" else (set(),)):
        raise unknown(inst)
    target, *operands = inst.operands
    if len(operands) != _SOURCES[operation]:
        raise unknown(inst)
    read, write = [reader(operand, "u32", kernel) for operand in operands], writer(target, "u32")
    guard, sets, takes = guard_of(inst, kernel), inst.has("cc"), inst.opcode.endswith("c")
    is_high, is_signed, is_difference = "hi" in halves, inst.type == "s32", operation == "sub"

    def execute(team):
        values = [get(team).astype(np.int64) for get in read]
        carry = team.carry if takes else 0
        if operation == "mad":
            a, b, c = values
            if is_signed and is_high:
                a, b = (x.astype(np.uint32).view(np.int32).astype(np.int64) for x in (a, b))
                part = (a * b >> 32) & 0xFFFFFFFF
            else:
                product = a.astype(np.uint64) * b.astype(np.uint64)
                part = (product >> np.uint64(32) if is_high else product & np.uint64(0xFFFFFFFF)).astype(np.int64)
            total = part + c + carry
        else:
            a, b = values
            total = a - b - carry if is_difference else a + b + carry
        mask = guard(team)
        if sets:
            flag = np.broadcast_to(total >> 32 != 0, team.size).astype(np.int64)
            team.carry = flag if mask is None else np.where(mask, flag, team.carry)
        write(team, (total & 0xFFFFFFFF).astype(np.uint32), mask)

    return execute
