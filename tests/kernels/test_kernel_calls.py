"""Every argument of every public kernel, replaced by what it must not be: refused by name, or computed rightly."""

import math

import pytest
import torch
from wrong_calls import RESULT, WRONG, outcome, wrong_calls

import kernels
from kernels import reference

pytestmark = pytest.mark.interpret


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def right_calls():
    q, k, v = torch.randn(3, 2, 2, 4, 16).unbind()
    bounds = {"kv_start": ints(0, 1), "kv_end": ints(4, 3)}
    rows, vectors = torch.randn(3, 3, 8), torch.randn(2, 8)
    target = torch.tensor([1, 2, 3])
    norm = {"x": rows[0].clone(), "weight": vectors[0].clone(), "bias": vectors[1].clone()}
    return {
        "flash_attention": {"q": q, "k": k, "v": v, **bounds, "q_start": ints(0, 1)},
        "flash_attention_packed": {"qkv": torch.randn(2, 4, 96), "num_heads": 2, **bounds},
        "layer_norm": norm,
        "add_layer_norm": {**norm, "residual": rows[1].clone()},
        "gelu": {"x": norm["x"]},
        "bias_gelu": {"x": norm["x"], "bias": norm["bias"]},
        "cross_entropy": {"logits": rows[2].clone(), "target": target, "class_weight": torch.rand(8)},
        "linear_cross_entropy": {"x": norm["x"], "weight": torch.randn(5, 8), "target": target, "bias": torch.randn(5)},
    }


def test_every_public_kernel_is_called():
    assert right_calls().keys() == set(kernels.__all__)


def packed(qkv, num_heads, **options):
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    return reference.attention(q, k, v, **options)[0].transpose(1, 2).flatten(2)


def oracle(name, arguments):
    """What the plain-PyTorch definition makes of the same arguments, in float64; None where it draws at random."""
    if arguments.get("dropout_p"):
        return None
    wide = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
        if key
        not in ("return_lse", "inplace", "chunk_rows", "implementation", "dropout_p", "dropout_seed", "deterministic")
    }
    if name == "flash_attention":
        return reference.attention(**wide)[0]
    if name == "flash_attention_packed":
        return packed(**wide)
    if "target" in wide:  # one outside [0, V) gives NaN in its row
        V = wide["weight" if "linear" in name else "logits"].shape["linear" not in name]
        targets = wide["target"]
        if ((targets < 0) | (targets >= V))[targets != wide.get("ignore_index", -100)].any():
            return torch.tensor(math.nan)
    return getattr(reference, name)(**wide)


def agrees(actual, expected, call):
    """Whether a result is the oracle's. Infinite terms may meet in another order, and are NaN then."""
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    for a, e in zip(actual, expected):
        if a.shape != e.shape or a.is_meta != e.is_meta:
            return False
        e = e.double()
        known = e.isfinite()
        narrow = (torch.float16, torch.bfloat16)
        given = [getattr(value, "dtype", None) for value in call.values()]  # a loss is fp32, whatever its logits are
        precision = 2e-2 if a.dtype in narrow or any(dtype in narrow for dtype in given) else 1e-4
        if not a.is_meta and not torch.allclose(a[known].double(), e[known], rtol=precision, atol=precision):
            return False
        if not a.is_meta and a[e.isnan()].isfinite().any():
            return False
    return True


FUNCTIONS = right_calls()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_calls_are_refused_by_name_or_computed_rightly(name):
    function, arguments = getattr(kernels, name), right_calls()[name]
    faults, count = [], 0
    for argument, what, call in wrong_calls(function, arguments):
        kind, result = outcome(function, (f"{name}: ", f"{name}()"), call)
        count += 1
        if kind == WRONG:
            faults.append(f"{argument}, {what}: {result}")
        if kind == RESULT:
            result = result[0] if call.get("return_lse") else result
            expected = oracle(name, call)
            if expected is not None and not agrees(result, expected, call):
                faults.append(f"{argument}, {what}: not what the reference computes")
    assert not faults, "\n".join(faults)
    assert count > 20 * len(arguments)


@pytest.mark.parametrize("name", ["flash_attention", "flash_attention_packed", "add_layer_norm"])
def test_dropout_that_leaves_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: dropout_p is 0.99999.*; it must be in "):
        getattr(kernels, name)(**right_calls()[name], dropout_p=1 - 1e-12)
