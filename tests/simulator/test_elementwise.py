"""Each instruction that works thread by thread, against the same operation on Python numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from simulator.snippets import elementwise

rng = np.random.default_rng(0)
SPECIAL = np.array([0, 1, 2, 5, 31, 32, 33, 63, 64, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF], np.uint32)
U32 = np.concatenate([np.repeat(SPECIAL, len(SPECIAL)), rng.integers(0, 2**32, 60, np.uint32)])
V32 = np.concatenate([np.tile(SPECIAL, len(SPECIAL)), rng.integers(0, 2**32, 60, np.uint32)])
W32 = rng.permutation(U32)
U64 = np.concatenate([U32.astype(np.uint64), rng.integers(0, 2**64, 30, np.uint64), np.uint64([2**63, 2**64 - 1])])
V64 = rng.permutation(U64)
SHIFT = np.resize(np.array([0, 1, 5, 16, 31, 32, 33, 63, 64, 200], np.uint32), len(U32))


def signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) else value


def bits_of(kind):
    return int(kind[1:])


def run_integers(instruction, sources, result, formula, types=None):
    """Compares with a formula on Python ints, which get signed values where a source's type says so."""
    types = types or [result] * len(sources)
    actual = elementwise(instruction, sources, result)
    bits = 8 * actual.dtype.itemsize
    for i in range(len(actual)):
        values = [int(s[i]) & ((1 << bits_of(t)) - 1) for s, t in zip(sources, types)]
        values = [signed(v, bits_of(t)) if t[0] == "s" else v for v, t in zip(values, types)]
        expected = formula(*values) & ((1 << bits) - 1)
        assert int(actual[i]) & ((1 << bits) - 1) == expected, (instruction, values)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = [
    ("add.s32 {d}, {a}, {b}", "s32", lambda a, b: a + b),
    ("sub.s32 {d}, {a}, {b}", "s32", lambda a, b: a - b),
    ("mul.lo.s32 {d}, {a}, {b}", "s32", lambda a, b: a * b),
    ("mul.hi.s32 {d}, {a}, {b}", "s32", lambda a, b: (a * b) >> 32),
    ("mul.hi.u32 {d}, {a}, {b}", "u32", lambda a, b: (a * b) >> 32),
    ("mad.lo.s32 {d}, {a}, {b}, {c}", "s32", lambda a, b, c: a * b + c),
    ("mad.hi.u32 {d}, {a}, {b}, {c}", "u32", lambda a, b, c: ((a * b) >> 32) + c),
    ("min.s32 {d}, {a}, {b}", "s32", min),
    ("min.relu.s32 {d}, {a}, {b}", "s32", lambda a, b: max(min(a, b), 0)),
    ("max.s32 {d}, {a}, {b}", "s32", max),
    ("min.u32 {d}, {a}, {b}", "u32", min),
    ("max.u32 {d}, {a}, {b}", "u32", max),
    ("max.s32 {d}, {a}, {b}, {c}", "s32", max),
    ("neg.s32 {d}, {a}", "s32", lambda a: -a),
    ("abs.s32 {d}, {a}", "s32", abs),
    ("sad.u32 {d}, {a}, {b}, {c}", "u32", lambda a, b, c: abs(a - b) + c),
    ("and.b32 {d}, {a}, {b}", "b32", lambda a, b: a & b),
    ("or.b32 {d}, {a}, {b}", "b32", lambda a, b: a | b),
    ("xor.b32 {d}, {a}, {b}", "b32", lambda a, b: a ^ b),
    ("not.b32 {d}, {a}", "b32", lambda a: ~a),
    ("cnot.b32 {d}, {a}", "b32", lambda a: int(a == 0)),
    ("popc.b32 {d}, {a}", "b32", lambda a: bin(a).count("1")),
    ("clz.b32 {d}, {a}", "b32", lambda a: 32 - a.bit_length()),
    ("brev.b32 {d}, {a}", "b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 {d}, {a}", "u32", lambda a: a.bit_length() - 1),
    ("bfind.s32 {d}, {a}", "s32", lambda a: (~a if a < 0 else a).bit_length() - 1),
    ("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "b32", lambda a, b, c: (((b << 32 | a) << (c % 32)) >> 32)),
    ("shf.r.wrap.b32 {d}, {a}, {b}, {c}", "b32", lambda a, b, c: (b << 32 | a) >> (c % 32)),
    ("shf.l.clamp.b32 {d}, {a}, {b}, {c}", "b32", lambda a, b, c: (((b << 32 | a) << min(c, 32)) >> 32)),
    ("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "b32", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96", "b32", lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xca", "b32", lambda a, b, c: (a & b) | (~a & c)),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xf8", "b32", lambda a, b, c: a | (b & c)),
    ("bfe.u32 {d}, {a}, 3, 4", "u32", lambda a: (a >> 3) & 15),
    ("bfe.s32 {d}, {a}, 3, 4", "s32", lambda a: signed((a >> 3) & 15, 4)),
    ("bfi.b32 {d}, {a}, {b}, 8, 5", "b32", lambda a, b: (a & 31) << 8 | (b & ~(31 << 8))),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "kind", "formula"), INTEGER, ids=[case[0] for case in INTEGER])
def test_integer(instruction, kind, formula):
    count = sum(f"{{{name}}}" in instruction for name in "abc")
    types = [kind.replace("b", "u")] * count
    run_integers(instruction, [U32, V32, W32][:count], kind, formula, types)


INTEGER_64 = [
    ("add.s64 {d}, {a}, {b}", "s64", lambda a, b: a + b),
    ("mul.lo.s64 {d}, {a}, {b}", "s64", lambda a, b: a * b),
    ("mul.hi.u64 {d}, {a}, {b}", "u64", lambda a, b: (a * b) >> 64),
    ("mul.hi.s64 {d}, {a}, {b}", "s64", lambda a, b: (a * b) >> 64),
    ("clz.b64 {d}, {a}", "u32", lambda a: 64 - a.bit_length()),
    ("popc.b64 {d}, {a}", "u32", lambda a: bin(a).count("1")),
    ("cvt.u32.u64 {d}, {a}", "u32", lambda a: a),
]


@pytest.mark.parametrize(("instruction", "kind", "formula"), INTEGER_64, ids=[case[0] for case in INTEGER_64])
def test_integer_64(instruction, kind, formula):
    sources = [U64, V64][: 2 if "{b}" in instruction else 1]
    run_integers(instruction, sources, kind, formula, ["s64" if kind == "s64" else "u64"] * len(sources))


WITH_TWO = [case for case in (*INTEGER, *INTEGER_64) if "{b}" in case[0] and "{c}" not in case[0]]


@pytest.mark.parametrize("literal", [7, -3, 2**31 - 1], ids=str)
@pytest.mark.parametrize(("instruction", "kind", "formula"), WITH_TWO, ids=[case[0] for case in WITH_TWO])
def test_a_literal_may_be_an_operand(instruction, kind, formula, literal):
    """As a divisor that the compiler has turned into a product is (mul.hi.s64 by a literal was refused once)."""
    kind = kind.replace("b", "u")
    bits = bits_of(kind)
    literal = signed(literal & ((1 << bits) - 1), bits) if kind[0] == "s" else literal & ((1 << (bits - 1)) - 1)
    source = U64 if bits == 64 else U32
    instruction = instruction.replace("{b}", str(literal))
    run_integers(instruction, [source], kind, lambda a: formula(a, literal), [kind])


@pytest.mark.parametrize("kind", ["s16", "u16"])
@pytest.mark.parametrize("operand", ["{b}", "-23", "23"])
def test_the_upper_half_of_a_product_of_16_bits(kind, operand):
    """Of a division by a literal, such as a column's head: columns // 100."""
    if kind == "u16" and operand == "-23":
        operand = "43691"
    sources = [(U32 & 0xFFFF).astype(np.uint16), (V32 & 0xFFFF).astype(np.uint16)][: 2 if operand == "{b}" else 1]
    literal = None if operand == "{b}" else int(operand)
    instruction = f"mul.hi.{kind} {{d}}, {{a}}, {operand}"
    run_integers(instruction, sources, kind, lambda a, b=literal: (a * b) >> 16, [kind] * len(sources))


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind):
    run_integers(f"mul.wide.{kind} {{d}}, {{a}}, {{b}}", [U32, V32], kind[0] + "64", lambda a, b: a * b, [kind] * 2)
    sources, types = [U32, V32, np.resize(U64, len(U32))], [kind, kind, kind[0] + "64"]
    run_integers(
        f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}}", sources, kind[0] + "64", lambda a, b, c: a * b + c, types
    )


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_truncates_toward_zero(kind):
    a, b = (U32, V32) if "32" in kind else (U64, V64)
    keep = b != 0
    if kind[0] == "s":  # the one quotient that does not fit
        keep &= ~((a == np.iinfo(a.dtype).max // 2 + 1) & (b == np.iinfo(b.dtype).max))
    a, b = a[keep], b[keep]
    run_integers(f"div.{kind} {{d}}, {{a}}, {{b}}", [a, b], kind, truncated, [kind] * 2)
    run_integers(f"rem.{kind} {{d}}, {{a}}, {{b}}", [a, b], kind, lambda x, y: x - truncated(x, y) * y, [kind] * 2)


@pytest.mark.parametrize("amount", ["{b}", "7"])
@pytest.mark.parametrize(
    ("instruction", "kind", "formula"),
    [
        ("shl.b32", "u32", lambda a, n: a << n),
        ("shr.u32", "u32", lambda a, n: a >> n),
        ("shr.s32", "s32", lambda a, n: a >> n),
    ],
)
def test_shifts_beyond_the_width(instruction, kind, formula, amount):
    sources = [U32, SHIFT] if amount == "{b}" else [U32]
    compute = formula if amount == "{b}" else lambda a: formula(a, 7)
    run_integers(f"{instruction} {{d}}, {{a}}, {amount}", sources, kind, compute, [kind, "u32"][: len(sources)])


def test_bit_fields_with_variable_bounds():
    start, length = np.resize(np.uint32([0, 3, 31, 40]), len(U32)), np.resize(np.uint32([0, 1, 8, 32, 60]), len(U32))

    def extract_signed(a, p, n):
        value = signed(a, 32)
        field = (value >> min(p, 31)) & ((1 << min(n, 32)) - 1)
        return signed(field, min(n, 32)) if n else 0

    def insert(a, b, p, n):
        field = (((1 << n) - 1) << p) & 0xFFFFFFFF
        return (a << p) & field | (b & ~field)

    run_integers("bfe.u32 {d}, {a}, {b}, {c}", [U32, start, length], "u32", lambda a, p, n: (a >> p) & ((1 << n) - 1))
    run_integers("bfe.s32 {d}, {a}, {b}, {c}", [U32, start, length], "s32", extract_signed, ["u32"] * 3)
    for p, n in ((0, 32), (8, 5), (30, 5), (33, 4), (3, 0)):
        run_integers(
            f"bfi.b32 {{d}}, {{a}}, {{b}}, {p}, {n}", [U32, V32], "b32",
            lambda a, b, p=p, n=n: insert(a, b, p, n), ["u32"] * 2,
        )  # fmt: skip


def permuted(a, b, selector):
    octets = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        value = octets[nibble & 7]
        result |= ((0xFF if value & 0x80 else 0) if nibble & 8 else value) << 8 * k
    return result


def test_prmt():
    run_integers("prmt.b32 {d}, {a}, {b}, {c}", [U32, V32, W32], "b32", permuted, ["u32"] * 3)
    for selector in (0x5410, 0x7632, 0x3210, 0x0123, 0x9180):
        run_integers(
            f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector}", [U32, V32], "b32",
            lambda a, b, s=selector: permuted(a, b, s), ["u32"] * 2,
        )  # fmt: skip


# Floats

F = np.concatenate(
    [
        np.float32(
            [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 1e-45, 1e-38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 0.1, 255.5]
        ),
        (rng.standard_normal(80) * 10.0 ** rng.integers(-6, 6, 80)).astype(np.float32),
    ]
)
G, H = rng.permutation(F), rng.permutation(F)


def same(actual, expected):
    np.testing.assert_array_equal(actual, np.asarray(expected, actual.dtype))


def round_fraction(value, mantissa, smallest):
    """A Fraction rounded to nearest even at `mantissa` bits; `smallest` is the exponent of the last subnormal place."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) if abs(value) < 2**900 else 900
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - mantissa + 1, smallest)
    return float(round(value / unit) * unit)


def test_fma_rounds_once():
    a, b, c = (rng.standard_normal(400).astype(np.float32) for _ in range(3))
    # A sum that falls on a midpoint of float32 but for a part too small for float64: rounding twice goes wrong.
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    a[1], b[1], c[1] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)
    a[2], b[2], c[2] = 2.0**-40, 2.0**-40, 1 + 2.0**-23
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
    same(elementwise("fma.rn.f32 {d}, {a}, {b}, {c}", [a, b, c], "f32"), [round_fraction(e, 24, -149) for e in exact])
    double = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (double != np.float32([round_fraction(e, 24, -149) for e in exact]))[:2].any()  # the case bites


@pytest.mark.parametrize(
    ("suffix", "decode", "mantissa", "smallest"), [("f16", "f16", 11, -24), ("bf16", "bf16", 8, -133)]
)
def test_half_fma_rounds_once(suffix, decode, mantissa, smallest):
    def draw():
        values = rng.standard_normal(128).astype(np.float32)
        return (
            values.astype(np.float16).view(np.uint16)
            if suffix == "f16"
            else (values.view(np.uint32) >> 16).astype(np.uint16)
        )

    def value(bits):
        if suffix == "f16":
            return float(np.uint16(bits).view(np.float16))
        return float((np.uint32(bits) << np.uint32(16)).view(np.float32))

    a, b, c = draw(), draw(), draw()
    got = elementwise(f"fma.rn.{suffix} {{d}}, {{a}}, {{b}}, {{c}}", [a, b, c], "b16")
    packed = elementwise(f"fma.rn.{suffix}x2 {{d}}, {{a}}, {{b}}, {{c}}", [v.view(np.uint32) for v in (a, b, c)], "b32")
    same(packed.view(np.uint16), got)
    for x, y, z, d in zip(a, b, c, got):
        exact = Fraction(value(x)) * Fraction(value(y)) + Fraction(value(z))
        assert value(d) == round_fraction(exact, mantissa, smallest)


FLOAT = [
    ("add.f32 {d}, {a}, {b}", lambda a, b: a + b),
    ("add.rn.f32 {d}, {a}, {b}", lambda a, b: a + b),
    ("sub.f32 {d}, {a}, {b}", lambda a, b: a - b),
    ("mul.f32 {d}, {a}, {b}", lambda a, b: a * b),
    ("div.rn.f32 {d}, {a}, {b}", lambda a, b: a / b),
    ("div.full.f32 {d}, {a}, {b}", lambda a, b: a / b),
    ("sqrt.rn.f32 {d}, {a}", np.sqrt),
    ("max.f32 {d}, {a}, {b}", np.fmax),
    ("min.f32 {d}, {a}, {b}", np.fmin),
    ("max.NaN.f32 {d}, {a}, {b}", np.maximum),
    ("min.NaN.f32 {d}, {a}, {b}", np.minimum),
    ("copysign.f32 {d}, {a}, {b}", lambda a, b: np.copysign(b, a)),
]


@pytest.mark.parametrize(("instruction", "formula"), FLOAT, ids=[case[0] for case in FLOAT])
def test_float(instruction, formula):
    sources = [F, G][: 2 if "{b}" in instruction else 1]
    with np.errstate(all="ignore"):
        same(elementwise(instruction, sources, "f32"), formula(*sources))


def test_sign_instructions_keep_nan_payloads():
    payload = np.uint32([0x7FC01234, 0xFFC01234, 0x80000000, 0x3F800000])
    same(elementwise("neg.f32 {d}, {a}", [payload], "b32"), payload ^ np.uint32(0x80000000))
    same(elementwise("abs.f32 {d}, {a}", [payload], "b32"), payload & np.uint32(0x7FFFFFFF))
    same(elementwise("neg.bf16x2 {d}, {a}", [payload], "b32"), payload ^ np.uint32(0x80008000))


@pytest.mark.parametrize(
    ("name", "function"),
    [("ex2.approx", np.exp2), ("lg2.approx", np.log2), ("rcp.approx", lambda x: 1 / x), ("tanh.approx", np.tanh),
     ("rsqrt.approx", lambda x: 1 / np.sqrt(x)), ("sin.approx", np.sin), ("cos.approx", np.cos)],
)  # fmt: skip
def test_special_functions_are_within_two_ulps_of_exact(name, function):
    x = np.abs(rng.standard_normal(200)).astype(np.float32) + np.float32(0.01)
    exact = function(x.astype(np.float64))
    error = np.abs(elementwise(f"{name}.f32 {{d}}, {{a}}", [x], "f32") - exact)
    assert (error <= 2 * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_ftz_flushes_where_it_is_written_and_nowhere_else():
    tiny = np.float32([1e-40, -1e-40, 1.0, -127.0])
    same(elementwise("mul.f32 {d}, {a}, 0f3F800000", [tiny], "f32"), tiny)
    flushed = elementwise("mul.ftz.f32 {d}, {a}, 0f3F800000", [tiny], "f32")
    same(flushed, [0, 0, 1, -127])
    assert np.signbit(flushed[1])
    same(elementwise("ex2.approx.ftz.f32 {d}, {a}", [tiny], "f32"), [1, 1, 2, 0])
    assert elementwise("ex2.approx.f32 {d}, {a}", [tiny], "f32")[3] == np.float32(2.0**-127)


def test_saturation_clamps_to_the_unit_interval():
    same(
        elementwise("add.sat.f32 {d}, {a}, 0f00000000", [np.float32([-1, 0.5, 2, np.nan, np.inf])], "f32"),
        [0, 0.5, 1, 0, 1],
    )


def test_packed_arithmetic_works_on_each_half():
    pairs = rng.standard_normal((60, 2)).astype(np.float32)
    others = rng.standard_normal((60, 2)).astype(np.float32)
    wide = [x.view(np.uint64).reshape(-1) for x in (pairs, others)]
    same(elementwise("add.f32x2 {d}, {a}, {b}", wide, "b64").view(np.float32), (pairs + others).reshape(-1))
    same(elementwise("mul.f32x2 {d}, {a}, {b}", wide, "b64").view(np.float32), (pairs * others).reshape(-1))
    halves = [x.astype(np.float16) for x in (pairs, others)]
    narrow = [h.view(np.uint32).reshape(-1) for h in halves]
    same(elementwise("add.f16x2 {d}, {a}, {b}", narrow, "b32").view(np.float16), (halves[0] + halves[1]).reshape(-1))
    same(elementwise("max.f16x2 {d}, {a}, {b}", narrow, "b32").view(np.float16), np.fmax(*halves).reshape(-1))


# Conversions


def test_float_to_bf16_rounds_to_nearest_even():
    bits = np.concatenate(
        [rng.integers(0, 2**32, 200, np.uint32), np.uint32([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF])]
    )
    bits = bits[~np.isnan(bits.view(np.float32))]
    expected = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    same(elementwise("cvt.rn.bf16.f32 {d}, {a}", [bits], "b16"), expected)
    packed = elementwise("cvt.rn.bf16x2.f32 {d}, {a}, {b}", [bits, bits[::-1].copy()], "b32")
    same(packed >> np.uint32(16), expected)
    same(packed & np.uint32(0xFFFF), expected[::-1])
    assert elementwise("cvt.rn.bf16.f32 {d}, {a}", [np.float32([np.nan])], "b16")[0] == 0x7FFF


def test_float_formats_widen_exactly():
    bits = rng.integers(0, 2**16, 200, np.uint16)
    same(elementwise("cvt.f32.bf16 {d}, {a}", [bits], "b32"), bits.astype(np.uint32) << np.uint32(16))
    halves = bits.view(np.float16)
    same(elementwise("cvt.f32.f16 {d}, {a}", [halves], "f32"), halves.astype(np.float32))
    with np.errstate(over="ignore"):
        same(elementwise("cvt.rn.f16.f32 {d}, {a}", [F], "f16"), F.astype(np.float16))


def test_float_to_integer_rounds_and_saturates():
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, np.nan, np.inf, -np.inf, 2147483520, 3e9, -1.0])
    top, bottom = 2**31 - 1, -(2**31)
    same(elementwise("cvt.rni.s32.f32 {d}, {a}", [x], "s32"),
         [0, 2, 2, 0, -2, top, bottom, 0, top, bottom, 2147483520, top, -1])  # fmt: skip
    same(elementwise("cvt.rzi.s32.f32 {d}, {a}", [x], "s32"),
         [0, 1, 2, 0, -1, top, bottom, 0, top, bottom, 2147483520, top, -1])  # fmt: skip
    same(elementwise("cvt.rmi.s32.f32 {d}, {a}", [x[:5]], "s32"), [0, 1, 2, -1, -2])
    same(elementwise("cvt.rpi.s32.f32 {d}, {a}", [x[:5]], "s32"), [1, 2, 3, 0, -1])
    same(elementwise("cvt.rzi.u32.f32 {d}, {a}", [x], "u32"),
         [0, 1, 2, 0, 0, 2**32 - 1, 0, 0, 2**32 - 1, 0, 2147483520, 3000000000, 0])  # fmt: skip
    same(elementwise("cvt.rmi.f32.f32 {d}, {a}", [x[:5]], "f32"), [0, 1, 2, -1, -2])


def test_integers_extend_truncate_and_saturate():
    same(elementwise("cvt.s64.s32 {d}, {a}", [U32], "s64"), U32.view(np.int32).astype(np.int64))
    same(elementwise("cvt.u64.u32 {d}, {a}", [U32], "u64"), U32.astype(np.uint64))
    same(elementwise("cvt.u16.u32 {d}, {a}", [U32], "u16"), U32.astype(np.uint16))
    same(elementwise("cvt.s32.s8 {d}, {a}", [U32.astype(np.uint16)], "s32"), U32.astype(np.uint8).view(np.int8))
    same(elementwise("cvt.sat.s16.s32 {d}, {a}", [U32], "s16"), np.clip(U32.view(np.int32), -(2**15), 2**15 - 1))
    same(elementwise("cvt.rn.f32.s32 {d}, {a}", [U32], "f32"), U32.view(np.int32).astype(np.float32))
    same(elementwise("cvt.rn.f32.u32 {d}, {a}", [U32], "f32"), U32.astype(np.float32))


def test_tf32_rounding():
    x = np.uint32([0x3F801000, 0x3F800FFF, 0x3F803000, 0xBF801000])
    same(
        elementwise("cvt.rna.tf32.f32 {d}, {a}", [x], "b32"),
        np.uint32([0x3F802000, 0x3F800000, 0x3F804000, 0xBF802000]),
    )
    same(
        elementwise("cvt.rn.tf32.f32 {d}, {a}", [x], "b32"), np.uint32([0x3F800000, 0x3F800000, 0x3F804000, 0xBF800000])
    )


# Comparisons and moves

COMPARE = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
           "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip


@pytest.mark.parametrize("name", COMPARE)
def test_comparisons(name):
    compare = COMPARE[name]
    same(
        elementwise(f"setp.{name}.s32 {{d}}, {{a}}, {{b}}", [U32, V32], "pred"),
        compare(U32.view(np.int32), V32.view(np.int32)),
    )
    same(elementwise(f"setp.{name}.u32 {{d}}, {{a}}, {{b}}", [U32, V32], "pred"), compare(U32, V32))
    unordered = np.isnan(F) | np.isnan(G)
    same(elementwise(f"setp.{name}.f32 {{d}}, {{a}}, {{b}}", [F, G], "pred"), compare(F, G) & ~unordered)
    same(elementwise(f"setp.{name}u.f32 {{d}}, {{a}}, {{b}}", [F, G], "pred"), compare(F, G) | unordered)


def test_other_comparisons():
    unordered, p = np.isnan(F) | np.isnan(G), rng.integers(0, 2, len(F)).astype(bool)
    same(elementwise("setp.nan.f32 {d}, {a}, {b}", [F, G], "pred"), unordered)
    same(elementwise("setp.num.f32 {d}, {a}, {b}", [F, G], "pred"), ~unordered)
    same(elementwise("setp.lt.and.f32 {d}, {a}, {b}, {c}", [F, G, p], "pred"), (F < G) & p)
    same(elementwise("setp.lt.xor.f32 {d}|%p51, {a}, {b}, {c}", [F, G, p], "pred"), (F < G) ^ p)
    same(
        elementwise("set.lt.u32.f32 {d}, {a}, {b}", [F, G], "u32"), np.where(F < G, np.uint32(2**32 - 1), np.uint32(0))
    )
    same(elementwise("selp.b32 {d}, {a}, {b}, {c}", [F, G, p], "f32"), np.where(p, F, G))
    same(elementwise("slct.f32.s32 {d}, {a}, {b}, {c}", [F, G, V32[: len(F)]], "f32"),
         np.where(V32[: len(F)].view(np.int32) >= 0, F, G))  # fmt: skip
    same(elementwise("testp.finite.f32 {d}, {a}", [F], "pred"), np.isfinite(F))
    same(elementwise("and.pred {d}, {a}, {b}", [p, p[::-1].copy()], "pred"), p & p[::-1])
    same(elementwise("not.pred {d}, {a}", [p], "pred"), ~p)


def test_moves_pack_the_low_part_first():
    same(
        elementwise("mov.b64 {d}, {{{a}, {b}}}", [U32, V32], "b64"),
        U32.astype(np.uint64) | V32.astype(np.uint64) << np.uint64(32),
    )
    same(elementwise("{{mov.b64 {{%r1, %r2}}, {a}; mov.b32 {d}, %r2;}}", [U64], "b32"), U64 >> np.uint64(32))
    halves = (U32 & np.uint32(0xFFFF)).astype(np.uint16)
    same(elementwise("mov.b32 {d}, {{{a}, {b}}}", [halves, halves], "b32"), halves * np.uint32(0x10001))


def test_predicated_instructions_leave_other_threads_alone():
    p = rng.integers(0, 2, len(F)).astype(bool)
    same(elementwise("mov.b32 {d}, {b};\n@{c} add.f32 {d}, {a}, {b}", [F, G, p], "f32"), np.where(p, F + G, G))
    same(elementwise("mov.b32 {d}, {b};\n@!{c} add.f32 {d}, {a}, {b}", [F, G, p], "f32"), np.where(p, G, F + G))


def test_a_register_that_no_one_wrote_is_nan():
    assert np.isnan(elementwise("mov.b32 {d}, %r7", [F], "f32")).all()


def words(values, count):
    """Python integers as `count` arrays of their 32-bit words, the lowest first."""
    return [np.array([value >> 32 * i & 0xFFFFFFFF for value in values], np.uint32) for i in range(count)]


WIDE = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 2**96 - 1, 0x0123456789ABCDEF01234567, 0xFFFFFFFF00000001FFFFFFFF]


@pytest.mark.parametrize(("name", "formula"), [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b)])
def test_sums_of_96_bits_carry(name, formula):
    a, b = zip(*[(x, y) for x in WIDE for y in WIDE])
    sources = [*words(a, 3), *words(b, 3)]
    chain = (
        (f"{name}.cc.u32 %r60, {{a}}, {{d3}};\n{name}c.cc.u32 %r61, {{b}}, {{d4}};\n{name}c.u32 %r62, {{c}}, {{d5}};\n")
        .replace("{d3}", "%r43")
        .replace("{d4}", "%r44")
        .replace("{d5}", "%r45")
    )
    for i in range(3):
        found = elementwise(f"{chain}mov.b32 {{d}}, %r6{i}", sources, "u32")
        expected = [formula(x, y) >> 32 * i & 0xFFFFFFFF for x, y in zip(a, b)]
        assert found.tolist() == expected


def test_a_product_of_64_and_32_bits_carries():
    """As tl.sin's reduction of large arguments multiplies."""
    values = [1, 0x80000000, 0xFFFFFFFF, 0x9E3779B9]
    a, b = zip(*[(x, y) for x in WIDE[:5] for y in values])
    sources = [*words(a, 2), np.array(b, np.uint32)]
    chain = (
        "mad.lo.cc.u32 %r60, {a}, {c}, 0;\nmadc.hi.u32 %r61, {a}, {c}, 0;\nmad.lo.cc.u32 %r61, {b}, {c}, %r61;\n"
        "madc.hi.u32 %r62, {b}, {c}, 0;\n"
    )
    for i in range(3):
        found = elementwise(f"{chain}mov.b32 {{d}}, %r6{i}", sources, "u32")
        assert found.tolist() == [x * y >> 32 * i & 0xFFFFFFFF for x, y in zip(a, b)]


def test_the_carry_flag_is_kept_where_a_thread_does_not_execute():
    a = np.array([0xFFFFFFFF, 1, 0xFFFFFFFF, 1], np.uint32)
    chain = "setp.lt.u32 %p1, %r500, 2;\nadd.cc.u32 %r60, {a}, 1;\n@%p1 add.cc.u32 %r60, 0, 0;\naddc.u32 {d}, 0, 0"
    assert elementwise(chain, [a], "u32").tolist() == [0, 0, 1, 0]
