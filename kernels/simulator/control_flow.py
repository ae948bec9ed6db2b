"""What can be known of a kernel before it runs: straight-line stretches, and which registers are live where it
forks."""

from .ptx import Address, Pair, Register, Vector

_NO_RESULT = {
    "st", "red", "bra", "bar", "barrier", "ret", "exit", "cp", "fence", "membar", "stmatrix", "nanosleep", "trap",
    "prefetch", "griddepcontrol", "setmaxnreg", "brkpt", "discard", "applypriority",
}  # fmt: skip
# After these the team may wait, fork or hold registers that an asynchronous instruction uses.
_ENDS_STRETCH = {"bra", "bar", "barrier", "ret", "exit", "trap", "wgmma"}


def registers_in(operand):
    """The indices of the registers that an operand names."""
    if isinstance(operand, Register):
        return {operand.index}
    if isinstance(operand, Vector):
        return set().union(*map(registers_in, operand.items))
    if isinstance(operand, Address):
        return registers_in(operand.base)
    if isinstance(operand, Pair):
        return registers_in(operand.first) | registers_in(operand.second)
    return set()


def written(inst):
    """Registers that the instruction writes."""
    if inst.opcode in _NO_RESULT or not inst.operands or (inst.opcode == "wgmma" and not inst.has("mma_async")):
        return set()
    return registers_in(inst.operands[0])


def read(inst):
    """Registers that the instruction reads, its predicate included."""
    has_result = bool(written(inst))
    sources = inst.operands[1:] if has_result else inst.operands
    registers = set().union(*map(registers_in, sources)) if sources else set()
    if inst.opcode == "wgmma" and has_result:
        registers |= written(inst)  # the accumulator
    return registers | (registers_in(inst.predicate) if inst.predicate else set())


def stretch_ends(kernel):
    """For each instruction, the index after the straight-line stretch that it stands in."""
    starts = {inst.target for inst in kernel.instructions if inst.opcode == "bra"}
    ends, end = [], len(kernel.instructions)
    for inst in reversed(kernel.instructions):
        if inst.opcode in _ENDS_STRETCH or inst.index + 1 in starts:
            end = inst.index + 1
        ends.append(end)
    return ends[::-1]


def live_after_branches(kernel):
    """For each branch, the registers that some path from it may still read: {instruction index: [register indices]}."""
    instructions = kernel.instructions
    count = len(instructions)
    live = [0] * (count + 1)  # before each instruction, as a bit set
    reads, kills = [], []
    for inst in instructions:
        reads.append(_bits(read(inst)))
        kills.append(0 if inst.predicate else _bits(written(inst)))
    after = [0] * count
    changed = True
    while changed:
        changed = False
        for i in range(count - 1, -1, -1):
            inst = instructions[i]
            falls_through = inst.opcode not in ("ret", "exit", "trap") and (inst.opcode != "bra" or inst.predicate)
            out = live[i + 1] if falls_through or (inst.predicate and inst.opcode != "bra") else 0
            if inst.opcode == "bra":
                out |= live[inst.target]
            into = reads[i] | (out & ~kills[i])
            changed |= into != live[i]
            live[i], after[i] = into, out
    return {inst.index: _indices(after[inst.index]) for inst in instructions if inst.opcode == "bra"}


def _bits(registers):
    return sum(1 << r for r in registers)


def _indices(bits):
    return [i for i, digit in enumerate(reversed(bin(bits)[2:])) if digit == "1"]
