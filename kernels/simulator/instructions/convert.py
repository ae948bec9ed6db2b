"""cvt: between integer and float formats, with rounding, saturation and packing."""

import numpy as np

from ..numerics import bf16_to_f32, f32_to_bf16, flush
from ..ptx import TYPES
from .registry import Formula, elementwise, unknown

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _is_float(kind):
    return kind in ("f16", "bf16", "f32", "f64")


@elementwise("cvt")
def cvt(inst):
    if len(inst.modifiers) < 2 or inst.has("rs", "satfinite", "relu") or inst.modifiers[0] == "pack":
        raise unknown(inst)
    target, source = inst.modifiers[-2:]
    if target in ("bf16x2", "f16x2") and source == "f32":
        return _pack(inst, target)
    if target == "tf32":
        return Formula(_round_tf32(inst), "b32", ("f32",))
    if target not in TYPES or source not in TYPES or "x2" in target + source:
        raise unknown(inst)
    if _is_float(source):
        compute = (
            _float_to_float(inst, target, source) if _is_float(target) else _float_to_integer(inst, target, source)
        )
    else:
        compute = _integer_to_float(inst, target, source) if _is_float(target) else _integer_to_integer(inst, target)
    return Formula(compute, target, (source,))


def _rounds_to_nearest(inst):
    if inst.has("rz", "rm", "rp"):
        raise unknown(inst)


def _pack(inst, target):
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half."""
    _rounds_to_nearest(inst)
    narrow = f32_to_bf16 if target == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)

    def compute(upper, lower):
        upper, lower = np.broadcast_arrays(np.atleast_1d(upper), lower)
        pair = np.empty((len(upper), 2), np.uint16)
        pair[:, 0], pair[:, 1] = narrow(np.ascontiguousarray(lower)), narrow(np.ascontiguousarray(upper))
        return pair.view(np.uint32).reshape(-1)

    return Formula(compute, "b32", ("f32", "f32"))


def _round_tf32(inst):
    """.rna: to nearest, ties away from zero; .rn: ties to even. 10 mantissa bits stay."""
    half, unit = np.uint32(0x1000), np.uint32(0xFFFFE000)

    def away(values):
        bits = values.view(np.uint32)
        return np.where(np.isfinite(values), (bits + half) & unit, bits)

    def even(values):
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        return np.where(np.isfinite(values), (bits + (half - np.uint32(1)) + odd) & unit, bits)

    if not inst.has("rna", "rn"):
        raise unknown(inst)
    return away if inst.has("rna") else even


def _float_to_float(inst, target, source):
    integral = next((_TO_INTEGER[m] for m in inst.modifiers if m in _TO_INTEGER), None)
    if integral is None:
        _rounds_to_nearest(inst)
    if source == "f64" and target == "bf16":
        raise unknown(inst)
    ftz, saturate = inst.has("ftz"), inst.has("sat")

    def compute(value):
        if source == "bf16":
            value = bf16_to_f32(value)
        if ftz and source == "f32":
            value = flush(value)
        if integral is not None:
            value = integral(value)
        if saturate:
            value = np.clip(np.nan_to_num(value, nan=0.0, posinf=np.inf, neginf=-np.inf), 0, 1)
        if target == "bf16":
            return f32_to_bf16(value.astype(np.float32))
        return value.astype(TYPES[target])

    return compute


def _float_to_integer(inst, target, source):
    """Out-of-range values saturate, NaN gives zero (for 64-bit and unsigned targets too, as the ISA manual says)."""
    integral = next((_TO_INTEGER[m] for m in inst.modifiers if m in _TO_INTEGER), None)
    if integral is None:
        raise unknown(inst)
    dtype = TYPES[target]
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max

    def compute(value):
        if source == "bf16":
            value = bf16_to_f32(value)
        value = integral(value.astype(np.float64))
        inside = (value >= float(lowest)) & (value < float(highest) + 1)
        result = np.where(inside, value, 0).astype(dtype)
        result = np.where(value >= float(highest) + 1, dtype.type(highest), result)
        return np.where(value < float(lowest), dtype.type(lowest), result)

    return compute


def _integer_to_float(inst, target, source):
    _rounds_to_nearest(inst)
    if target == "bf16":
        # 24 bits pass through float32 unharmed; wider integers would be rounded twice.
        if TYPES[source].itemsize > 2:
            raise unknown(inst)
        return lambda value: f32_to_bf16(value.astype(np.float32))
    return lambda value: value.astype(TYPES[target])


def _integer_to_integer(inst, target):
    dtype = TYPES[target]
    if not inst.has("sat"):
        return lambda value: value.astype(dtype)
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max

    def saturate(value):
        low, high = max(lowest, np.iinfo(value.dtype).min), min(highest, np.iinfo(value.dtype).max)
        return np.clip(value, value.dtype.type(low), value.dtype.type(high)).astype(dtype)

    return saturate
