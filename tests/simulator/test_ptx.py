"""The parser."""

import pytest

from kernels.simulator import SimulatorError
from kernels.simulator.ptx import Address, Immediate, Pair, Register, Special, Vector, parse
from simulator.snippets import module


def only(text):
    return parse(module(text, 1, 64)).instructions[0]


def test_a_module():
    kernel = parse(module("mov.u32 %r1, %tid.x;", 2, 96))
    assert (kernel.name, kernel.block_size, kernel.target) == ("snippet", 96, "sm_90a")
    assert [(p.name, p.type) for p in kernel.parameters] == [("p0", "u64"), ("p1", "u64")]
    assert kernel.where(kernel.instructions[0]) == "snippet.py:1"


def test_operands():
    inst = only("@!%p3 ld.global.L1::evict_last.v2.b32 {%r1, %r2}, [%rd4 + -8];")
    assert (inst.opcode, inst.modifiers, inst.negated) == ("ld", ("global", "L1::evict_last", "v2", "b32"), True)
    assert inst.predicate.name == "%p3"
    vector, address = inst.operands
    assert isinstance(vector, Vector)
    assert [r.name for r in vector.items] == ["%r1", "%r2"]
    assert isinstance(address, Address)
    assert (address.base.name, address.offset) == ("%rd4", -8)
    assert only("mov.b32 %r1, 0f3F800000;").operands[1] == Immediate(0x3F800000, 32)
    for text in ("15.", "1.5e1", "150e-1"):  # inline PTX of other people's kernels
        assert only(f"setp.gt.f32 %p1, %r1, {text};").operands[2] == Immediate(0x402E000000000000, 64)
    assert only("mov.b32 %r1, -0x10;").operands[1] == Immediate(-16)
    assert only("mov.u32 %r1, %ctaid.y;").operands[1] == Special("ctaid.y")
    assert isinstance(only("setp.eq.s32 %p1|%p2, %r1, 0;").operands[0], Pair)


def test_scopes_shadow_names_and_labels():
    kernel = parse(module("{ .reg .b32 %r1; L: mov.b32 %r1, 1; bra L; }\n{ L: mov.b32 %r1, 2; bra L; }", 1, 32))
    first, jump, second, back = kernel.instructions[:4]
    assert isinstance(first.operands[0], Register)
    assert first.operands[0].index != second.operands[0].index
    assert (jump.target, back.target) == (first.index, second.index)


@pytest.mark.parametrize(
    ("text", "message"),
    [("mov.b32 %r1, 1", "no .entry"), (None, "label $NOWHERE"), ("@%q1 ret;", "%q1 is not declared")],
)
def test_errors(text, message):
    with pytest.raises(SimulatorError, match=message.replace("$", r"\$").replace(".", r"\.")):
        parse(text if text and "mov" in text else module(text or "bra $NOWHERE;", 1, 32))
