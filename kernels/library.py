"""How our kernels meet PyTorch and Triton: the op library, the device they run on, the constants they share."""

import contextlib
import math

import torch
import triton
from triton.runtime import driver

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Triton decides when a kernel is decorated whether it is compiled or interpreted, so one process does one of the two.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_LIBRARY = torch.library.Library("gpt2", "DEF")


def define_op(schema, implementation, fake):
    """Registers `gpt2::<schema>`: `implementation` for tensors on any device, `fake` for tracing.

    Registered this way an op costs a few microseconds a call, less than through torch.library.custom_op. Returns it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"gpt2::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gpt2, name).default


def active_arch():
    """What kernels are compiled for now: a capability such as 90, an AMD name such as "gfx942", None if interpreted."""
    return None if INTERPRETED else driver.active.get_current_target().arch


def device_of(tensor):
    """A context in which launches go to the tensor's GPU; it does nothing for tensors that are on none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype):
    """tl.dot's input_precision: fp32 operands are multiplied as fp32, never as TF32. Other dtypes ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def without_autocast(tensor):
    """A context in which torch's own functions compute in the dtypes that they are given, on the tensor's device."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
