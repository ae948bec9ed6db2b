"""Wrong calls, made from right ones: each argument in turn is replaced by values of other kinds, sizes and contents."""

import inspect
import re

import numpy as np
import torch


def mutations(value, required):
    """(what it is, another value) for an argument that is `value` in a right call."""
    yield from _kinds()
    if required and value is not None:
        yield "None", None
    if isinstance(value, torch.Tensor):
        yield from _tensors(value)
    if isinstance(value, (int, float)) or value is None:
        yield from _numbers()


def _kinds():
    yield "str", "x"
    yield "list", [1.0, 2.0]
    yield "dict", {"a": 1}
    yield "object", object()
    yield "type", int
    yield "bytes", b"abc"
    yield "bool", True
    yield "array", np.ones((2, 3), np.float32)
    yield "complex", 1j
    yield "tensor of no dimension", torch.tensor(1.0)
    yield "empty tensor", torch.empty(0)


def _numbers():
    for number in (-1, 0, 2**40, -(2**40), 0.5, float("nan"), float("inf"), -float("inf"), 1 - 1e-12):
        yield repr(number), number
    yield "numpy float", np.float32(0.5)
    yield "array of one", np.array([1])


def _tensors(tensor):
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64):
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    yield "on meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "one dimension more", tensor[None]
    yield "array of the same", tensor.numpy()
    if tensor.dim():
        yield "one dimension less", tensor[0]
        yield "empty last dimension", tensor[..., :0]
        yield "empty first dimension", tensor[:0]
        yield "longer last dimension", torch.cat([tensor, tensor[..., :1]], -1)
        yield "longer first dimension", torch.cat([tensor, tensor[:1]])
        yield "every second of the last dimension", torch.cat([tensor, tensor], -1)[..., ::2]
        yield "expanded", tensor[..., :1].expand(tensor.shape)
        yield "nested", torch.nested.nested_tensor([tensor, tensor])
    if tensor.dim() > 1:
        yield "transposed", tensor.transpose(-1, -2)
        yield "transposed in memory", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    contents = (
        (float("nan"), float("inf"), -float("inf")) if tensor.is_floating_point() else (-1, 10**6, -(2**31), 2**31 - 1)
    )
    for number in contents:
        yield f"full of {number}", torch.full_like(tensor, number)


def wrong_calls(function, arguments):
    """(the argument, what replaces it, all arguments) for each argument of a function, given those of a right call."""
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        required = parameter.default is parameter.empty
        value = arguments.get(name, None if required else parameter.default)
        for what, other in mutations(value, required):
            yield name, what, {**arguments, name: other}


REFUSED, RESULT, WRONG = "refused", "result", "wrong"


def outcome(function, owners, arguments):
    """(REFUSED, None), (RESULT, what came) or (WRONG, the error that names neither function nor argument).

    owners: words of which an error must hold one, the function's name first. Which of two arguments that do not fit
    each other is to blame is not for the test to say.
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    try:
        return RESULT, function(**arguments)
    except Exception as caught:
        error = caught
    text = str(error)
    promised = isinstance(error, (TypeError, ValueError)) and any(owner in text for owner in owners)
    if promised and any(re.search(rf"\b{name}\b", text) for name in names):
        return REFUSED, None
    return WRONG, f"{type(error).__name__}: {text[:200]}"
