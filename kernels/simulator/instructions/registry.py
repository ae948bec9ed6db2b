"""How an instruction of the set is registered and found.

An instruction is registered in one of two forms:

    @elementwise("add")            the decorated function gets the Instruction and returns a Formula: what to compute
    def add(instruction): ...      from the sources, thread by thread. Masks and predicates are dealt with here.

    @instruction("ld")             the function gets the Instruction and the Kernel and returns execute(team), which
    def load(instruction, kernel): does everything itself, through the team.

Decoding happens once per kernel; executing happens once per team that reaches the instruction.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import Unimplemented
from ..operands import reader, writer
from ..ptx import TYPES

_ROOMS = {}


@dataclass(frozen=True)
class Formula:
    """result = compute(*sources): PTX types of the result and of each source, read from the operands after the
    first."""

    compute: Callable
    result: str
    sources: tuple


def instruction(*opcodes):
    """Registers a function (Instruction, Kernel) -> execute(team) for these opcodes."""

    def register(decoder):
        for opcode in opcodes:
            assert opcode not in _ROOMS, opcode
            _ROOMS[opcode] = decoder
        return decoder

    return register


def elementwise(*opcodes, modifiers=None):
    """Registers a function (Instruction) -> Formula for these opcodes.

    modifiers: those besides types that the function knows; an instruction with another is unknown. None: any.
    """

    def register(describe):
        def decoder(inst, kernel):
            if modifiers is not None and not modifiers.issuperset(m for m in inst.modifiers if m not in TYPES):
                raise unknown(inst)
            return _apply(describe(inst), inst, kernel)

        instruction(*opcodes)(decoder)
        return describe

    return register


def decode(inst, kernel):
    """The function execute(team) of one instruction; raises Unimplemented for what is not known."""
    name = f"{inst.opcode}.cc" if inst.has("cc") else inst.opcode  # what sets the carry flag: see carry.py
    if name not in _ROOMS:
        raise unknown(inst)
    return _ROOMS[name](inst, kernel)


def unknown(inst):
    return Unimplemented(f"unimplemented instruction `{inst.text}`")


def _apply(formula, inst, kernel):
    """Reads the sources, computes, writes where the thread is active."""
    target, *operands = inst.operands
    if len(operands) != len(formula.sources):
        raise unknown(inst)
    compute, write = formula.compute, writer(target, formula.result)
    read = [reader(operand, kind, kernel) for operand, kind in zip(operands, formula.sources)]
    guard = guard_of(inst, kernel)
    if len(read) == 1:
        (a,) = read
        return lambda team: write(team, compute(a(team)), guard(team))
    if len(read) == 2:
        a, b = read
        return lambda team: write(team, compute(a(team), b(team)), guard(team))
    return lambda team: write(team, compute(*[r(team) for r in read]), guard(team))


def guard_of(inst, kernel):
    """A function of the team: the threads that execute `inst`, as a bool array, or None where all do."""
    if inst.predicate is None:
        return lambda team: team.mask
    predicate, negated = reader(inst.predicate, "pred", kernel), inst.negated

    def guard(team):
        chosen = ~predicate(team) if negated else predicate(team)
        if team.mask is not None:
            return chosen & team.mask
        return None if chosen.all() else chosen

    return guard
