"""What can be known of a kernel before it runs: straight-line stretches, and which registers are live where it
forks."""

from functools import cache

from .ptx import Address, Box, Pair, Register, Special, Vector

_NO_RESULT = {
    "st", "red", "bra", "brx", "bar", "barrier", "ret", "exit", "cp", "fence", "membar", "stmatrix", "nanosleep",
    "trap",
    "prefetch", "griddepcontrol", "setmaxnreg", "brkpt", "discard", "applypriority",
}  # fmt: skip
# What these make comes from memory or from other threads.
_TALKS = {
    "ld", "atom", "ldmatrix", "ldu", "shfl", "vote", "redux", "match", "elect", "activemask", "movmatrix", "mma",
    "wgmma", "mbarrier", "bar", "barrier", "tex", "clusterlaunchcontrol",
}  # fmt: skip
# After these the team may wait, fork or hold registers that an asynchronous instruction uses.
_ENDS_STRETCH = {"bra", "brx", "bar", "barrier", "ret", "exit", "trap", "wgmma", "mbarrier", "setmaxnreg"}
_LEAVES = {"ret", "exit", "trap", "bra", "brx"}  # what follows them is not the next instruction, unless predicated


def registers_in(operand):
    """The indices of the registers that an operand names, as a frozen set."""
    if isinstance(operand, Register):
        return frozenset({operand.index})
    if isinstance(operand, Vector):
        return frozenset().union(*map(registers_in, operand.items))
    if isinstance(operand, Address):
        return registers_in(operand.base)
    if isinstance(operand, Box):
        return registers_in(operand.map).union(*map(registers_in, operand.coordinates))
    if isinstance(operand, Pair):
        return registers_in(operand.first) | registers_in(operand.second)
    return frozenset()


@cache
def written(inst):
    """Registers that the instruction writes."""
    if inst.opcode in _NO_RESULT or not inst.operands or (inst.opcode == "wgmma" and not inst.has("mma_async")):
        return frozenset()
    if inst.opcode == "mbarrier" and inst.has("init", "inval"):
        return frozenset()
    return registers_in(inst.operands[0])


@cache
def read(inst):
    """Registers that the instruction reads, its predicate included."""
    has_result = bool(written(inst))
    sources = inst.operands[1:] if has_result else inst.operands
    registers = frozenset().union(*map(registers_in, sources))
    if inst.opcode == "wgmma" and has_result:
        registers |= written(inst)  # the accumulator
    return registers | (registers_in(inst.predicate) if inst.predicate else frozenset())


def pointers_of(kernel):
    """A function (address operand) -> names of the parameters that the address may be computed from.

    Followed through 64-bit registers, whatever the order of the instructions; what is loaded from memory comes from no
    parameter.
    """
    wide = [register.type in ("b64", "u64", "s64") for register in kernel.registers]
    names, steps = [frozenset()] * len(wide), []
    for inst in kernel.instructions:
        targets = [r for r in written(inst) if wide[r]]
        if targets and inst.opcode == "ld" and inst.has("param"):
            for r in targets:
                names[r] |= {inst.operands[1].base.name}
        elif targets and inst.opcode not in ("ld", "atom"):
            steps.append((targets, [r for r in read(inst) if wide[r]]))
    changed = True
    while changed:
        changed = False
        for targets, sources in steps:
            seen = frozenset().union(*(names[r] for r in sources))
            for r in targets:
                if not seen <= names[r]:
                    names[r], changed = names[r] | seen, True
    return lambda operand: frozenset().union(*(names[r] for r in registers_in(operand)))


def only_stored(kernel, loads):
    """{a load's index: the stores that its value goes to}, of those `loads` whose value goes nowhere else.

    Such a value, unlike one that becomes an address, a predicate, shared memory or another warp's register, matters to
    nobody unless its own thread executes the store.
    """
    result = {}
    for index in loads:
        load = kernel.instructions[index]
        stores = _stores_fed(kernel, written(load)) if load.opcode == "ld" else None
        if stores:  # a value that goes nowhere at all is left alone
            result[index] = stores
    return result


def _stores_fed(kernel, registers):
    """The stores that these registers' values flow into, or None where they also flow elsewhere."""
    tainted, stores, before = set(registers), set(), -1
    while before != len(tainted):
        before = len(tainted)
        for inst in kernel.instructions:
            if tainted.isdisjoint(read(inst)):
                continue
            if inst.opcode == "st" and inst.has("global"):
                if not tainted.isdisjoint(registers_in(inst.operands[0]) | registers_in(inst.predicate)):
                    return None
                stores.add(inst.index)
                continue
            # What a branch decides: all that is computed before its ways meet again.
            decided = _until_join(kernel, inst) if inst.targets else [inst]
            if not all(map(_computes, decided)):
                return None
            tainted.update(*map(written, decided))
    return frozenset(stores)


def _computes(inst):
    """Does it nothing but make registers of registers of its own thread?"""
    return bool(written(inst)) and inst.opcode not in _TALKS


def _until_join(kernel, branch):
    """The instructions but branches that may run between `branch` and where its ways meet again."""
    after = _successors(kernel)
    meets = _always_passed(kernel)[branch.index] & ~(1 << branch.index)
    inside, waiting = set(), list(after[branch.index])
    while waiting:
        index = waiting.pop()
        if index < len(after) and not meets >> index & 1 and index not in inside:
            inside.add(index)
            waiting += after[index]
    return [inst for i in sorted(inside) if not (inst := kernel.instructions[i]).targets]


def _successors(kernel):
    """For each instruction, the indices of those that may run right after it; past the last one where it ends."""
    after = [[] for _ in kernel.instructions]
    for index, sources in enumerate(predecessors(kernel)):
        for source in sources:
            after[source].append(index)
    end = [len(after)]
    return [
        (end if inst.opcode in ("ret", "exit", "trap") else []) + (following or end)
        for inst, following in zip(kernel.instructions, after)
    ]


def _always_passed(kernel):
    """Post-dominators: for each instruction, as a bit set, what every way from it to the end passes, and itself."""
    after = _successors(kernel)
    everything = (1 << len(after) + 1) - 1
    passed = [everything] * len(after) + [1 << len(after)]
    changed = True
    while changed:
        changed = False
        for index in reversed(range(len(after))):
            common = everything
            for following in after[index]:
                common &= passed[following]
            common |= 1 << index
            changed |= common != passed[index]
            passed[index] = common
    return passed


def stretch_ends(kernel):
    """For each instruction, the index after the straight-line stretch that it stands in."""
    starts = {target for inst in kernel.instructions for target in inst.targets}
    ends, end = [], len(kernel.instructions)
    for inst in reversed(kernel.instructions):
        if inst.opcode in _ENDS_STRETCH or inst.index + 1 in starts:
            end = inst.index + 1
        ends.append(end)
    return ends[::-1]


def predecessors(kernel):
    """For each instruction, the indices of those that may run right before it."""
    before = [[] for _ in kernel.instructions]
    for inst in kernel.instructions:
        leaves = inst.opcode in _LEAVES and inst.predicate is None
        if not leaves and inst.index + 1 < len(before):
            before[inst.index + 1].append(inst.index)
        for target in inst.targets:
            before[target].append(inst.index)
    return before


def reachable(kernel, index, stop):
    """The instructions that may run after `index`, up to the next of the opcode `stop`, which is one of them."""
    after = _successors(kernel)
    seen, waiting = set(), list(after[index])
    while waiting:
        i = waiting.pop()
        if i < len(after) and i not in seen:
            seen.add(i)
            waiting += [] if kernel.instructions[i].opcode == stop else after[i]
    return sorted(seen)


_STEPS = {"add", "sub", "and", "or", "xor", "shl", "shr", "bfe", "mov", "cvt", "mul", "mad", "setp", "selp"}


def per_thread(kernel):
    """The registers that may hold another value in each thread of a warp, but those that one step makes of another."""
    return _varying(kernel) - _one_step(kernel)


def _one_step(kernel):
    """The registers that are made once, by integer arithmetic, of one register."""
    makers = {}
    for inst in kernel.instructions:
        for register in written(inst):
            makers.setdefault(register, []).append(inst)
    integers = ("b32", "u32", "s32", "b64", "u64", "s64", "b16", "u16", "s16")
    return {
        register
        for register, (inst, *others) in makers.items()
        if not others and inst.opcode in _STEPS and inst.type in integers and len(read(inst)) <= 1
    }


def _varying(kernel):
    """The registers that may hold another value in each thread of a warp."""
    varies, before = set(), -1
    talks = _TALKS | {"wgmma"}
    while before != len(varies):
        before = len(varies)
        for inst in kernel.instructions:
            apart = (inst.opcode in talks and not inst.has("param", "idx")) or not varies.isdisjoint(read(inst))
            if apart or any(isinstance(o, Special) and o.name.startswith(("tid", "laneid")) for o in inst.operands):
                varies |= written(inst)
    return varies


_WORDS = {"pred": 0, "b64": 2, "u64": 2, "s64": 2, "f64": 2}


def words(kernel, chosen):
    """How many 32-bit registers these registers, a bit set, take."""
    return sum(_WORDS.get(kernel.registers[i].type, 1) for i in indices(chosen))


def live_registers(kernel):
    """For each instruction, the registers that may still be read from there on, as a bit set; one more for the end."""
    instructions = kernel.instructions
    live = [0] * (len(instructions) + 1)
    reads = [bits(read(inst)) for inst in instructions]
    kills = [0 if inst.predicate else bits(written(inst)) for inst in instructions]
    changed = True
    while changed:
        changed = False
        for inst in reversed(instructions):
            i = inst.index
            leaves = inst.opcode in _LEAVES and inst.predicate is None
            after = 0 if leaves else live[i + 1]
            for target in inst.targets:
                after |= live[target]
            before = reads[i] | (after & ~kills[i])
            changed |= before != live[i]
            live[i] = before
    return live


def bits(registers):
    return sum(1 << r for r in registers)


def indices(bits):
    """The positions of a bit set's ones."""
    return [i for i, digit in enumerate(reversed(bin(bits)[2:])) if digit == "1"]
