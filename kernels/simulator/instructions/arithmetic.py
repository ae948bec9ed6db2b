"""add sub mul mad fma div rem min max neg abs, and the special functions, for integers and floats.

fma rounds once. The approximate instructions (ex2.approx, rcp.approx, div.full, tanh.approx, ...) are computed to
within an ulp or so of exact, better than the hardware does. `.ftz` flushes subnormal inputs and results to zero.
"""

import numpy as np

from ..numerics import bf16_to_f32, f32_to_bf16, flush, fma_f32, round_to_odd
from ..ptx import TYPES
from .registry import Formula, elementwise, unknown

_FLOATS = {"f16", "bf16", "f32", "f64"}
_ROUNDED = {"rn", "ftz", "sat"}  # to nearest even is the only rounding that is computed
_HALVES = {"lo", "hi", "wide"}


def _uniform(inst, compute, count):
    return Formula(_on_values(inst, compute), inst.type, (inst.type,) * count)


def _on_values(inst, compute):
    """Lifts a function of numpy floats or integers to the packed and 16-bit forms, to .ftz and to .sat."""
    kind = inst.type
    if inst.has("sat") and kind in _FLOATS:
        compute = _saturated(compute)
    if inst.has("ftz") and kind == "f32":
        compute = _flushed(compute)
    if kind == "bf16":
        return lambda *v: f32_to_bf16(compute(*[bf16_to_f32(x) for x in v]))
    if kind in ("f32x2", "f16x2", "bf16x2"):
        return _packed(kind, compute)
    return compute


def _saturated(compute):
    """.sat: the result is clamped to [0, 1], NaN to 0."""
    return lambda *v: np.clip(np.nan_to_num(compute(*v), nan=0.0, posinf=np.inf, neginf=-np.inf), 0, 1)


def _flushed(compute):
    return lambda *v: flush(compute(*[flush(x) for x in v]))


def _packed(kind, compute):
    half = {"f32x2": "f4", "f16x2": "f2", "bf16x2": "u2"}[kind]
    whole = TYPES[kind]

    def lanes(*values):
        split = [np.atleast_1d(v).view(half).reshape(-1, 2) for v in values]
        if kind == "bf16x2":
            result = f32_to_bf16(compute(*[bf16_to_f32(s) for s in split]))
        else:
            result = compute(*split)
        return np.ascontiguousarray(result).view(whole).reshape(-1)

    return lanes


@elementwise("add", modifiers=_ROUNDED)
def add(inst):
    return _uniform(inst, np.add, 2)


@elementwise("sub", modifiers=_ROUNDED)
def sub(inst):
    return _uniform(inst, np.subtract, 2)


_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _high(kind):
    """The upper half of the product."""
    if kind in _WIDE:
        wide, bits = TYPES[_WIDE[kind]], 8 * TYPES[kind].itemsize
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide.type(bits)).astype(TYPES[kind])
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)

    def high_u64(a, b):
        a_low, a_high, b_low, b_high = a & mask, a >> shift, b & mask, b >> shift
        middle = ((a_low * b_low) >> shift) + ((a_high * b_low) & mask) + ((a_low * b_high) & mask)
        return a_high * b_high + ((a_high * b_low) >> shift) + ((a_low * b_high) >> shift) + (middle >> shift)

    def high_s64(a, b):
        unsigned = high_u64(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
        return unsigned - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)

    return high_u64 if kind == "u64" else high_s64


@elementwise("mul", modifiers=_ROUNDED | _HALVES)
def mul(inst):
    kind = inst.type
    if inst.has("wide"):
        wide = TYPES[_WIDE[kind]]
        return Formula(lambda a, b: np.multiply(a, b, dtype=wide), _WIDE[kind], (kind, kind))
    if inst.has("hi"):
        return Formula(_high(kind), kind, (kind, kind))
    return _uniform(inst, np.multiply, 2)


@elementwise("mad", modifiers=_ROUNDED | _HALVES)
def mad(inst):
    kind = inst.type
    if kind in _FLOATS:
        return fma(inst)
    if inst.has("wide"):
        wide = TYPES[_WIDE[kind]]
        return Formula(lambda a, b, c: np.multiply(a, b, dtype=wide) + c, _WIDE[kind], (kind, kind, _WIDE[kind]))
    if inst.has("hi"):
        high = _high(kind)
        return Formula(lambda a, b, c: high(a, b) + c, kind, (kind,) * 3)
    if inst.has("lo"):
        return Formula(lambda a, b, c: a * b + c, kind, (kind,) * 3)
    raise unknown(inst)


def _fma_f16(a, b, c):
    """The product of two halves is exact in float64, and so, but for sums 2^55 apart, is the sum."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float16)


def _fma_bf16(a, b, c):
    """Sources and result are float32 values that bf16 can hold; the caller's rounding to bf16 must be the only one."""
    product, c = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    exact = round_to_odd(product, c, product + c)
    near = exact.astype(np.float32)
    # float32 keeps 16 bits more than bf16: setting the last one where digits were lost keeps ties apart from near-ties.
    lost = (near.astype(np.float64) != exact) & np.isfinite(near)
    toward_zero = np.where(
        np.abs(near.astype(np.float64)) > np.abs(exact), near.view(np.int32) - 1, near.view(np.int32)
    )
    return np.where(lost, toward_zero | 1, near.view(np.int32)).view(np.float32)


@elementwise("fma", modifiers=_ROUNDED | {"relu"})
def fma(inst):
    kind = inst.type
    if kind == "f64":
        raise unknown(inst)
    if inst.has("relu"):
        raise unknown(inst)
    compute = {
        "f32": fma_f32,
        "f32x2": fma_f32,
        "f16": _fma_f16,
        "f16x2": _fma_f16,
        "bf16": _fma_bf16,
        "bf16x2": _fma_bf16,
    }
    return _uniform(inst, compute[kind], 3)


def _divide_integers(a, b):
    """Truncates toward zero; a zero divisor gives all ones, as the hardware happens to."""
    quotient = np.floor_divide(a, np.where(b == 0, 1, b).astype(b.dtype))
    if a.dtype.kind == "i":
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


@elementwise("div", modifiers=_ROUNDED | {"approx", "full"})
def div(inst):
    return _uniform(inst, np.divide if inst.type in _FLOATS else _divide_integers, 2)


@elementwise("rem", modifiers=set())
def rem(inst):
    return _uniform(inst, lambda a, b: a - _divide_integers(a, b) * b, 2)


def _extremum(inst, quiet, propagating):
    """min and max: without .NaN the other operand wins over a NaN, with it NaN does. .relu: never below 0."""
    if inst.has("xorsign"):
        raise unknown(inst)
    pick = propagating if inst.has("NaN") else quiet
    keep = (lambda x: np.maximum(x, 0)) if inst.has("relu") else (lambda x: x)
    if len(inst.operands) == 4:
        return _uniform(inst, lambda a, b, c: keep(pick(pick(a, b), c)), 3)
    return _uniform(inst, lambda a, b: keep(pick(a, b)), 2)


@elementwise("min", modifiers={"ftz", "NaN", "relu"})
def minimum(inst):
    return _extremum(inst, np.fmin, np.minimum)


@elementwise("max", modifiers={"ftz", "NaN", "relu"})
def maximum(inst):
    return _extremum(inst, np.fmax, np.maximum)


def _sign_bits(inst, on_sign):
    """neg and abs of floats change the sign bit alone, of NaN too."""
    kind = inst.type
    halves = {
        "f16": 0x8000,
        "bf16": 0x8000,
        "f16x2": 0x80008000,
        "bf16x2": 0x80008000,
        "f32": 0x80000000,
        "f64": 1 << 63,
    }
    raw = {2: "b16", 4: "b32", 8: "b64"}[TYPES[kind].itemsize]
    mask = TYPES[raw].type(halves[kind])
    return Formula(lambda a: on_sign(a, mask), raw, (raw,))


@elementwise("neg", modifiers={"ftz"})
def neg(inst):
    if inst.type[0] == "s":
        return _uniform(inst, np.negative, 1)
    return _sign_bits(inst, lambda a, mask: a ^ mask)


@elementwise("abs", modifiers={"ftz"})
def absolute(inst):
    if inst.type[0] == "s":
        return _uniform(inst, np.abs, 1)
    return _sign_bits(inst, lambda a, mask: a & ~mask)


def _special(compute):
    def describe(inst):
        if inst.type not in ("f32", "f16", "f64", "bf16"):
            raise unknown(inst)
        return _uniform(inst, compute, 1)

    return describe


for _name, _compute in {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}.items():
    elementwise(_name)(_special(_compute))


@elementwise("copysign")
def copysign(inst):
    """copysign d, a, b: the magnitude of b with the sign of a."""
    return _uniform(inst, lambda a, b: np.copysign(b, a), 2)


@elementwise("sad")
def sad(inst):
    return _uniform(inst, lambda a, b, c: np.where(a > b, a - b, b - a) + c, 3)
