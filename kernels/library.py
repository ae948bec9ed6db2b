"""How our kernels meet PyTorch and Triton: the op library, who must see a call, the constants that kernels share."""

import contextlib
import math

import torch
import triton
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from triton.runtime import driver

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Devices of which torch can tell it. torch.amp.is_autocast_available would say more, but torch 2.11 cannot trace it.
AUTOCAST_KINDS = ("cpu", "cuda", "mps", "xpu")

# Triton decides when a kernel is decorated whether it is compiled or interpreted, so one process does one of the two.
INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED and triton.__version__.startswith("3.6."):
    # It takes int() of arrays of shape [1], which numpy refuses from 2.4 on. Triton 3.7 squeezes them, as this does.
    from triton.runtime import interpreter

    _patch_of_3_6 = interpreter._patch_lang_tensor

    def _patch_as_of_3_7(tensor, scope):
        _patch_of_3_6(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_as_of_3_7

_LIBRARY = torch.library.Library("gpt2", "DEF")


def define_op(schema, implementation, fake):
    """Registers `gpt2::<schema>`: `implementation` for tensors on any device, `fake` for tracing. Returns the op.

    A call through torch's dispatcher costs more than the rest of the launch. The op returned calls `implementation`
    itself where that is all that the dispatcher would do (is_plain), and is `overload` everywhere else.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"gpt2::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.gpt2, name).default
    kinds = [_KINDS[str(argument.type)] for argument in overload._schema.arguments]

    def op(*arguments):
        if torch.compiler.is_compiling() or not is_plain(arguments, kinds):
            return overload(*arguments)
        return implementation(*arguments)

    op.overload = overload
    return op


_TENSOR = frozenset((torch.Tensor, torch.nn.Parameter))
_NONE = frozenset((type(None),))
# By a schema's type the Python types that the dispatcher hands on as they are.
_KINDS = {"Tensor": _TENSOR, "Optional[Tensor]": _TENSOR | _NONE} | {
    kind.__name__: frozenset((kind,)) for kind in (int, float, bool, str)
}
_KINDS["Optional[int]"] = _NONE | {torch.dtype}  # what a schema calls ScalarType?; no op of ours takes an int?
_KEY = torch._C.DispatchKey
_ORDINARY = 0  # the dispatch keys of a tensor that a kernel can take as it is
for _key in (
    *(_KEY.CPU, _KEY.AutogradCPU, _KEY.AutocastCPU, _KEY.CUDA, _KEY.AutogradCUDA, _KEY.AutocastCUDA),
    _KEY.ADInplaceOrView,
):
    _ORDINARY |= torch._C.DispatchKeySet(_key).raw_repr()
_PECULIAR = ~_ORDINARY
_QUIET = {0}  # what a thread includes in every dispatch while no mode is active
for _key in (_KEY.BackendSelect, _KEY.ADInplaceOrView):
    _QUIET |= {before | torch._C.DispatchKeySet(_key).raw_repr() for before in _QUIET}
_included = torch._C._dispatch_tls_local_include_set
_keys = torch._C._dispatch_keys
_profiling = torch._C._autograd._profiler_enabled  # a profile names the ops


def is_plain(arguments, kinds):
    """Whether the dispatcher would hand these arguments to the kernel unchanged, with nobody else to tell.

    It goes by the dispatch keys of the thread and of the tensors: modes (fake tensors, proxies, counters), torch.func,
    functionalization, tensor subclasses, negative views and zero tensors show there. Overridden torch functions and
    the profiler do not, and are asked for.
    """
    if _included().raw_repr() not in _QUIET or has_torch_function(arguments) or _profiling():
        return False
    if len(arguments) != len(kinds):
        return False
    for argument, allowed in zip(arguments, kinds):
        kind = type(argument)
        if kind not in allowed or (kind in _TENSOR and _keys(argument).raw_repr() & _PECULIAR):
            return False
    return True


def needs_graph(*tensors):
    """Whether autograd must see a call: in reverse mode, in forward mode or under torch.func."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def active_arch():
    """What kernels are compiled for now: a capability such as 90, an AMD name such as "gfx942", None if interpreted."""
    return None if INTERPRETED else driver.active.get_current_target().arch


def dot_precision(dtype):
    """tl.dot's input_precision: fp32 operands are multiplied as fp32, never as TF32. Other dtypes ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


def without_autocast(tensor):
    """A context in which torch's own functions compute in the dtypes that they are given, on the tensor's device."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST_KINDS else contextlib.nullcontext()


def is_autocast_on(kind):
    """Whether autocast is on for devices of this kind."""
    return kind in AUTOCAST_KINDS and torch.is_autocast_enabled(kind)
