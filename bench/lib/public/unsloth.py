"""Unsloth's kernels: pip install --no-deps unsloth unsloth_zoo. Its __init__ rewrites torch, so it stays out."""

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.lib.public.cases import case

UNSLOTH = "unsloth"


def module(name):
    """unsloth.kernels.`name`, without what the packages above it do when they are imported."""
    # else it makes a folder where it is run
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{tempfile.gettempdir()}/unsloth_compiled_cache")
    for top, inner in (("unsloth", "kernels"), ("unsloth_zoo", None)):
        if top in sys.modules:
            continue
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise ImportError(f"{top} is not installed; pip install --no-deps unsloth unsloth_zoo")
        folder = Path(spec.origin).parent
        _shell(top, folder)
        if inner:
            _shell(f"{top}.{inner}", folder / inner)
    return importlib.import_module(f"unsloth.kernels.{name}")


def _shell(package, folder):
    shell = ModuleType(package)
    shell.__spec__, shell.__path__ = importlib.util.spec_from_loader(package, None, is_package=True), [str(folder)]
    shell.DEVICE_TYPE = "cuda"
    sys.modules[package] = shell


@case(UNSLOTH, "RMSNorm", "7 x 770")
def rms_norm(randn):
    norm = module("rms_layernorm").Fast_RMS_Layernorm
    weight = randn(770)  # its gradient is asked for by another kernel, below
    return (
        {"x": randn(7, 770)},
        lambda x: norm.apply(x, weight.to(x.dtype), 1e-6),
        lambda x: F.rms_norm(x, (770,), weight.to(x.dtype), 1e-6),
    )


@case(UNSLOTH, "RMSNorm with its weight's gradient", "7 x 770")
def rms_norm_weight(randn):
    norm = module("rms_layernorm").Fast_RMS_Layernorm
    inputs = {"x": randn(7, 770), "weight": randn(770)}
    return inputs, lambda x, w: norm.apply(x, w, 1e-6), lambda x, w: F.rms_norm(x, (770,), w, 1e-6)


@case(UNSLOTH, "LayerNorm", "7 x 770", torch.float32)
def layer_norm(randn):
    norm = module("layernorm").Fast_Layernorm
    inputs = {"x": randn(7, 770), "weight": randn(770), "bias": randn(770)}
    return inputs, lambda x, w, b: norm.apply(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, (770,), w, b, 1e-5)


@case(UNSLOTH, "SwiGLU", "1 x 7 x 770", gradients=False)
def swiglu(randn):
    inputs = {"e": randn(1, 7, 770), "g": randn(1, 7, 770)}
    return inputs, module("swiglu").swiglu_fg_kernel, lambda e, g: F.silu(e) * g


@case(UNSLOTH, "SwiGLU's gradients, in place", "7 x 770", gradients=False)
def swiglu_backward(randn):
    def plain(dh, e, g):
        s = torch.sigmoid(e)
        return e * s * g, dh * e * s, dh * g * s * (1 + e * (1 - s))

    return {name: randn(7, 770) for name in ("dh", "e", "g")}, module("swiglu").swiglu_DWf_DW_dfg_kernel, plain


@case(UNSLOTH, "GeGLU", "1 x 7 x 770", gradients=False)
def geglu(randn):
    inputs = {"e": randn(1, 7, 770), "g": randn(1, 7, 770)}
    return inputs, module("geglu").geglu_exact_forward_kernel, lambda e, g: F.gelu(e) * g


@case(UNSLOTH, "GeGLU by tanh", "1 x 7 x 770", gradients=False)
def geglu_tanh(randn):
    inputs = {"e": randn(1, 7, 770), "g": randn(1, 7, 770)}
    kernel = module("geglu").geglu_approx_forward_kernel
    return inputs, kernel, lambda e, g: F.gelu(e, approximate="tanh") * g


@case(UNSLOTH, "rotary embedding", "B 2, H 4 and 2, T 19, D 64")
def rope(randn):
    turn = module("rope_embedding").fast_rope_embedding
    angles = torch.outer(torch.arange(19), 10000.0 ** -torch.linspace(0, 1, 33)[:-1])
    cos, sin = (f(torch.cat([angles, angles], -1)).to(torch.bfloat16) for f in (torch.cos, torch.sin))

    def plain(q, k):
        def turned(x):
            a, b = x.chunk(2, -1)
            return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)

        return turned(q), turned(k)

    inputs = {"q": randn(2, 4, 19, 64), "k": randn(2, 2, 19, 64)}
    return inputs, lambda q, k: turn(q * 1, k * 1, cos, sin), plain  # it turns its inputs in place


@case(UNSLOTH, "cross-entropy", "6 x 5003", torch.float32)
def cross_entropy(randn):
    loss = module("cross_entropy_loss").Fast_CrossEntropyLoss
    target = torch.randint(0, 5003, (6,))
    target[2] = -100

    def plain(logits):
        return F.cross_entropy(logits, target, reduction="none")

    return {"logits": 3 * randn(6, 5003)}, lambda logits: loss.apply(logits * 1, target), plain


@case(UNSLOTH, "cross-entropy in chunks, soft-capped", "3 x 70001", torch.float32)
def chunked_cross_entropy(randn):
    loss = module("cross_entropy_loss").Fast_CrossEntropyLoss
    target = torch.randint(0, 70001, (3,))

    def plain(logits):
        return F.cross_entropy(30 * torch.tanh(logits / 30), target, reduction="none")

    return {"logits": 3 * randn(3, 70001)}, lambda logits: loss.apply(logits * 1, target, 30.0), plain
