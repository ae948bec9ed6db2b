"""setp set selp slct testp: comparisons and choices."""

import numpy as np

from ..numerics import bf16_to_f32
from ..operands import reader, writer
from ..ptx import TYPES, Pair
from .registry import Formula, elementwise, guard_of, instruction, unknown

_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


def comparison(inst):
    """The function of two numpy arrays that the instruction's comparison operator names."""
    name = inst.modifiers[0]
    is_float = inst.type in ("f16", "bf16", "f32", "f64")
    if name == "num":
        compare = lambda a, b: ~_unordered(a, b)  # noqa: E731
    elif name == "nan":
        compare = _unordered
    elif is_float and name == "ne":  # ordered: false where one is NaN, unlike numpy's
        compare = lambda a, b: (a != b) & ~_unordered(a, b)  # noqa: E731
    elif is_float and name.endswith("u") and name[:-1] in _ORDERED:
        ordered = _ORDERED[name[:-1]]
        compare = lambda a, b: ordered(a, b) | _unordered(a, b)  # noqa: E731
    elif name in _ORDERED:
        compare = _ORDERED[name]
    else:
        raise unknown(inst)
    if inst.type == "bf16":
        return lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b))
    return compare


@instruction("setp")
def setp(inst, kernel):
    """setp.cmp p|q, a, b: p = cmp, q = not cmp; with .and/.or/.xor each is combined with a third predicate."""
    target, *operands = inst.operands
    if inst.type in ("f16x2", "bf16x2"):
        raise unknown(inst)
    compare = comparison(inst)
    combine = next((_COMBINE[m] for m in inst.modifiers[1:-1] if m in _COMBINE), None)
    a, b = (reader(operand, inst.type, kernel) for operand in operands[:2])
    third = reader(operands[2], "pred", kernel) if combine else None
    guard = guard_of(inst, kernel)
    targets = [target.first, target.second] if isinstance(target, Pair) else [target]
    write = [writer(t, "pred") for t in targets]

    def execute(team):
        result, mask = compare(a(team), b(team)), guard(team)
        for put, value in zip(write, (result, ~result) if len(write) == 2 else (result,)):
            put(team, value if combine is None else combine(value, third(team)), mask)

    return execute


@elementwise("set")
def set_(inst):
    """set.cmp.dtype.stype: all ones, or 1.0 for a float destination, where the comparison holds."""
    result = inst.modifiers[-2]
    compare = comparison(inst)
    yes = TYPES[result].type(1) if result == "f32" else np.array(-1).astype(TYPES[result])[()]
    return Formula(lambda a, b: np.where(compare(a, b), yes, TYPES[result].type(0)), result, (inst.type,) * 2)


@elementwise("selp")
def selp(inst):
    return Formula(lambda a, b, p: np.where(p, a, b), inst.type, (inst.type, inst.type, "pred"))


@elementwise("slct")
def slct(inst):
    """slct d, a, b, c: a where c >= 0, else b."""
    kind = inst.modifiers[-2]
    return Formula(lambda a, b, c: np.where(c >= 0, a, b), kind, (kind, kind, inst.type))


@instruction("testp")
def testp(inst, kernel):
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
    }
    test, read = tests[inst.modifiers[0]], reader(inst.operands[1], inst.type, kernel)
    write, guard = writer(inst.operands[0], "pred"), guard_of(inst, kernel)
    return lambda team: write(team, test(read(team)), guard(team))
