"""Validation of arguments. Each failed check says which function, what came and what is required."""

import numpy as np
import torch
from triton.runtime import driver

from kernels.dropout import STEPS
from kernels.library import INTERPRETED, is_autocast_on

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_NUMBERS = frozenset((int, float, bool, str, type(None)))
_MOST = 1024  # calls that a check remembers before it starts again


def _words(dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def once(check):
    """check(tensors, *values), a call of which is remembered for tensors of one geometry and equal values.

    What it returns, and whether it raises, may depend on the tensors' shapes, strides, dtypes and devices and on the
    values alone: not on addresses, contents or gradients. Errors are not remembered; nor is a call with a value that is
    no plain number (a tensor, a symbolic size).
    """
    known = {}

    def checked(tensors, *values):
        if torch.compiler.is_compiling():
            return check(tensors, *values)
        key = [*map(type, values), values]  # 1, 1.0 and True are equal, and not the same
        try:
            for tensor in tensors:
                key.append(None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
            key = tuple(key)
            result = known.get(key, known)
            if result is not known:  # another thread may empty it in between
                return result
        except (TypeError, AttributeError, RuntimeError):  # no tensor, or none with strides; or it cannot be hashed
            return check(tensors, *values)
        result = check(tensors, *values)
        if all(type(value) in _NUMBERS for value in values):
            if len(known) >= _MOST:
                known.clear()
            known[key] = result
        return result

    return checked


def check_tensor(function, value, name, dims=None):
    """The first check of a tensor: that it is one, with strides, and (dims) of so many dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} is {_brief(value)}, of {type(value).__name__}; it must be a tensor")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{function}: {name} has layout {layout}; it must be a dense tensor (torch.strided)")
    if dims is not None and value.dim() != len(dims):
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}; it must be [{', '.join(dims)}]")


_REALS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)
_INTEGERS = (int, np.integer, torch.SymInt)


def check_number(function, value, name, what, allowed, *, integer=False):
    """A number, no bool and no tensor, for which allowed(value) holds; `what` says so in words."""
    if not isinstance(value, _INTEGERS if integer else _REALS) or isinstance(value, bool):
        kind = "an integer" if integer else "a number"
        raise TypeError(f"{function}: {name} is {_brief(value)}; it must be {kind}, {what}")
    if not allowed(value):
        raise ValueError(f"{function}: {name} is {value}; it must be {what}")


def check_flag(function, value, name):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {name} is {_brief(value)}; it must be True or False")


def _brief(value):
    return type(value).__name__ if isinstance(value, (torch.Tensor, np.ndarray)) else f"{value!r:.40}"


_served = None  # the driver and the device that check_device last found to agree


def check_device(function, tensor, name):
    """The kernel's driver must own the tensor's device: a GPU, or the CPU inside the interpreter or the simulator."""
    if INTERPRETED:
        if tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"{function}: {name} is bfloat16, which Triton's interpreter multiplies wrongly; "
                "use float16 or float32, or run without TRITON_INTERPRET"
            )
        return
    global _served
    try:
        active = driver.active
        if (active, tensor.device) == _served:
            return
        device = active.get_active_torch_device()
    except RuntimeError as error:
        raise ValueError(
            f"{function}: {name} is on {tensor.device}, and Triton finds no GPU here; the kernel needs one, or "
            "TRITON_INTERPRET=1 in the environment before kernels are imported"
        ) from error
    if device.type != tensor.device.type:
        raise ValueError(
            f"{function}: {name} is on {tensor.device}, and Triton's active driver runs on {device.type}; "
            f"move the tensors to {device.type}"
        )
    _served = active, tensor.device


def check_dtype(function, tensor, name, allowed=FLOATS):
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{function}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {_words(allowed)}"
        )


def autocast_hint(tensor):
    """What a message about dtypes adds under autocast: it casts the inputs of torch's own functions, not of ours."""
    kind = tensor.device.type
    if not is_autocast_on(kind):
        return ""
    dtype = _words([torch.get_autocast_dtype(kind)])
    return f" (autocast to {dtype} is on; it casts no inputs of these kernels: cast them, or leave autocast)"


def check_same(function, first, first_name, second, second_name, *, may_be_fp32=False):
    """Two tensors must share dtype and device; the second may be fp32, if it may."""
    for what in ("dtype", "device"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs and not (may_be_fp32 and theirs is torch.float32):
            hint = autocast_hint(first) if what == "dtype" else ""
            raise ValueError(
                f"{function}: {second_name} has {what} {theirs}, {first_name} has {ours}; they must match{hint}"
            )


def check_last_stride(function, tensor, name):
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{function}: {name} has strides {tuple(tensor.stride())}; the last must be 1 (the kernel copies nothing)"
        )


def check_row_vector(function, tensor, name, B, device):
    """A bound per batch row: int32 [B], of any stride, on the same device, or None."""
    if tensor is None:
        return
    check_tensor(function, tensor, name)
    if tensor.shape != (B,) or tensor.dtype != torch.int32 or tensor.device != device:
        raise ValueError(
            f"{function}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
            f"it must be torch.int32 ({B},) on {device}"
        )


def dense(bound):
    """A bound per row as kernels read it: B numbers side by side (a column of a table, or one that was expanded)."""
    return None if bound is None else bound.contiguous()


def refuse_transforms(function):
    """torch.func's transforms (vmap, grad, jvp) wrap tensors in levels that a kernel cannot see through."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function}: torch.func transforms are not supported; make the vmapped dimension part of the batch, take "
            "gradients with autograd, or use the plain-PyTorch form (kernels.reference)"
        )


def refuse_second_derivative(function):
    """Called in backward, where gradients are on only if somebody asked for the gradient's own graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: no second derivative is implemented, and create_graph=True asks for one; "
            "use the plain-PyTorch form (kernels.reference) where higher-order gradients are needed"
        )


def check_dropout(function, tensor, dropout_p, seed):
    """The seed that dropout uses on `tensor`: None without dropout, `seed` if given, else one that torch draws."""
    if type(dropout_p) is float and dropout_p == 0.0 and seed is None:
        return None
    check_number(
        function,
        dropout_p,
        "dropout_p",
        f"in [0, 1) when rounded to a multiple of 1 / {STEPS}",
        lambda p: 0.0 <= p < 1.0 and round(p * STEPS) < STEPS,
    )
    if seed is not None:
        check_tensor(function, seed, "dropout_seed")
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != tensor.device:
            raise ValueError(
                f"{function}: dropout_seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; "
                f"it must be torch.int64 (1,) on {tensor.device}"
            )
    if dropout_p == 0.0:
        return None
    return torch.randint(2**31, (1,), dtype=torch.int64, device=tensor.device) if seed is None else seed
