"""The registry of attention backends, and the contract that all of them keep.

The contract
- Tensors are [B, H, T, D] views with any strides whose last is 1; nobody copies them. The output's memory order is
  [B, T, H, D], so that merging heads is a view. A backend with a `projection` form reads q, k and v in place from the
  fused projection [B, T, 3C] and gives its gradient as one tensor of that shape.
- `scale` multiplies the scores; None is 1 / sqrt(D).
- Causal masks are aligned bottom-right: query i sees key j if j <= q_start[b] + i, where `q_start` [B] int32 is
  T_k - T_q unless given (rows of a cache may have different lengths).
- Padding is a pair of bounds per row, `kv_start` and `kv_end` [B] int32: the valid keys are [start, end). Causality and
  padding are independent. A query that sees no key gives 0, never NaN.
- `dropout_p` acts on the probabilities.
- Scores accumulate in fp32 and the softmax is fp32. With `upcast` (GPT-2's reorder_and_upcast_attn) scores are not
  rounded to the input's dtype on the way, as `eager` otherwise does; fused backends never store them.
- A backend declares what it can do, and is asked for nothing else: the options of a capability that it does not have
  are not passed to it, and asking for them raises an error that names the request and who could serve it. Nothing falls
  back silently. "auto" is the one choice made for you: triton on a GPU that it supports, else sdpa; eager where
  attention weights are wanted.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from kernels.attention import split_heads
from kernels.checks import check_flag, check_number, check_row_vector, check_same, check_tensor, once
from model.config import brief

_ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The options that a function takes for each capability that it declares; `scale` and `causal` it always takes.
_OPTIONS = {
    "padding": ("kv_start", "kv_end"),
    "dropout": ("dropout_p",),
    "unequal_lengths": ("q_start",),
    "upcast": ("upcast",),
    "weights": ("return_weights",),
}


@dataclass(frozen=True)
class AttentionBackend:
    """A name, a function that keeps the contract, and what it can do: nothing beyond the core, unless declared.

    forward(q, k, v, *, scale, causal, and the options of the declared capabilities)
        -> (o [B, H, T_q, D], weights [B, H, T_q, T_k] or None)
    projection(qkv, num_heads, *, scale, kv_start, kv_end, dropout_p), the last three where declared -> [B, T, C]
        optional: causal self-attention that reads the fused projection; its scores are fp32 throughout.
    """

    name: str
    forward: Callable
    projection: Callable | None = None
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] = _ALL_DTYPES
    max_head_dim: int | None = None  # None: any
    head_dims: tuple[int, ...] | None = None  # the only ones; None: any up to max_head_dim
    padding: bool = False  # kv_start, kv_end
    dropout: bool = False  # dropout_p
    unequal_lengths: bool = False  # T_q != T_k, and q_start: decoding with a cache needs it
    upcast: bool = False  # upcast
    weights: bool = False  # return_weights
    capturable: bool = False  # in a CUDA graph: it asks the device for no value and keeps nothing from call to call
    runs_on: Callable | None = None  # (torch.device) -> whether it runs on this one of its devices; None: it does

    def refusal(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        head_dim: int,
        padding: bool = False,
        dropout: bool = False,
        unequal_lengths: bool = False,
        upcast: bool = False,
        weights: bool = False,
    ) -> str | None:
        """Why this backend cannot serve the request, in words, or None if it can."""
        if self.devices is not None and torch.device(device).type not in self.devices:
            return f"device {torch.device(device).type} (it runs on {', '.join(self.devices)})"
        if dtype not in self.dtypes:
            return f"{dtype} (it computes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)})"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"head_dim {head_dim} (its largest is {self.max_head_dim})"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"head_dim {head_dim} (it computes {', '.join(map(str, self.head_dims))})"
        for wanted, able, what in (
            (padding, self.padding, "padding"),
            (dropout, self.dropout, "attention dropout"),
            (unequal_lengths, self.unequal_lengths, "queries and keys of different lengths"),
            (upcast, self.upcast, "upcast scores (reorder_and_upcast_attn)"),
            (weights, self.weights, "attention weights (output_attentions=True)"),
        ):
            if wanted and not able:
                return what
        return None

    def serves(self, **request):
        """Whether this backend serves the request on this machine."""
        is_here = self.runs_on is None or self.runs_on(torch.device(request["device"]))
        return is_here and self.refusal(**request) is None

    def check(self, **request):
        """Raises ValueError if this backend cannot serve the request; names those that could."""
        reason = self.refusal(**request)
        if reason is None:
            return
        others = [name for name, other in _BACKENDS.items() if other.serves(**request)]
        able = f"backends that could serve it: {', '.join(others)}" if others else "no registered backend can serve it"
        raise ValueError(f"attention backend {self.name!r} does not support {reason}; {able}")

    def options(self, **given):
        """Those of the options that belong to the core or to a capability declared."""
        undeclared = {name for what, names in _OPTIONS.items() if not getattr(self, what) for name in names}
        return {name: value for name, value in given.items() if name not in undeclared}


_BACKENDS: dict[str, AttentionBackend] = {}
_NOT_INSTALLED: dict[str, str] = {}  # the package that a backend needs and that is not there, by the backend's name


def register_attention(
    name: str, *, replace: bool = False, package: str | None = None, **capabilities: Any
) -> Callable[[Callable], Callable]:
    """Decorator: enters a function into the registry under `name`.

    capabilities: the fields of AttentionBackend after `forward`. package: one that the backend needs; where it is not
    installed the backend is not entered. Raises ValueError if the name is taken and replace is False; TypeError for a
    capability that there is not, one of the wrong type, and a function that cannot be called as it declares.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"register_attention: name is {name!r}; it must be a string, as in @register_attention('mine')")
    check_flag("register_attention", replace, "replace")
    if package is not None and not (isinstance(package, str) and package.isidentifier()):
        raise TypeError(f"register_attention: package is {brief(package)}; it must be the name of a package, or None")
    if name == "auto":
        raise ValueError("register_attention: 'auto' is the registry's own choice and cannot be a backend's name")
    if name in _BACKENDS and not replace:
        raise ValueError(f"register_attention: {name!r} is already registered; pass replace=True to replace it")
    _check_capabilities(name, capabilities)

    def register(forward):
        backend = AttentionBackend(name, forward, **capabilities)
        options = backend.options(**dict.fromkeys(("scale", "causal", *sum(_OPTIONS.values(), ()))))
        _check_signature(name, "the function", forward, 3, options)
        if backend.projection is not None:
            packed = backend.options(**dict.fromkeys(("scale", *_OPTIONS["padding"], *_OPTIONS["dropout"])))
            _check_signature(name, "projection", backend.projection, 2, packed)
        if package is not None and importlib.util.find_spec(package) is None:
            _NOT_INSTALLED[name] = package
        else:
            _BACKENDS[name] = backend
        return forward

    return register


def _check_capabilities(name, capabilities):
    known = [field.name for field in fields(AttentionBackend)][2:]
    for key, value in capabilities.items():
        if key not in known:
            raise TypeError(
                f"register_attention: {name!r} declares {key!r}, which is no capability; choose from {', '.join(known)}"
            )
        if key in ("projection", "runs_on"):
            is_right, required = value is None or callable(value), "a function or None"
        elif key in ("devices", "dtypes", "head_dims"):
            of = {"devices": str, "dtypes": torch.dtype, "head_dims": int}[key]
            is_right = isinstance(value, tuple) and all(isinstance(item, of) for item in value)
            is_right, required = is_right or (key != "dtypes" and value is None), f"a tuple of {of.__name__}"
        elif key == "max_head_dim":
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            is_right, required = value is None or (is_integer and value > 0), "a positive integer or None"
        else:
            is_right, required = isinstance(value, bool), "True or False"
        if not is_right:
            raise TypeError(f"register_attention: {name!r} declares {key}={value!r}; it must be {required}")


def _check_signature(name, what, function, tensors, options):
    """Raises TypeError unless function(*tensors, **options) fits its signature."""
    if not callable(function):
        raise TypeError(f"register_attention: {what} of {name!r} is {function!r}; it must be a function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(*[None] * tensors, **options)
    except TypeError as error:
        raise TypeError(
            f"register_attention: {what} of {name!r} takes {signature}, but with what is declared it is called "
            f"with {tensors} positional arguments and {', '.join(options)}: {error}"
        ) from None


def attention_backends() -> tuple[str, ...]:
    """The names of the registered backends."""
    return tuple(_BACKENDS)


def check_attention_name(name, argument="attn_implementation"):
    """Raises TypeError or ValueError unless `name` is "auto" or a registered backend; returns it."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} is {brief(name)}; it must be a string: auto, {', '.join(_BACKENDS)}")
    if name in _NOT_INSTALLED:
        raise ValueError(
            f"{argument}={name!r} needs the package {_NOT_INSTALLED[name]}, which is not installed; choose one of: "
            f"auto, {', '.join(_BACKENDS)}"
        )
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"{argument}={name!r} is unknown; choose one of: auto, {', '.join(_BACKENDS)}")
    return name


def get_attention(name="auto", *, device=None, dtype=None, head_dim=None, weights=False):
    """The backend called `name`; "auto" chooses for tensors of this device, dtype and head dim."""
    check_attention_name(name)
    if name != "auto":
        return _BACKENDS[name]
    device = torch.device(device or "cpu")
    for choice in ("triton", "sdpa", "eager"):
        backend = _BACKENDS[choice]
        # On a CPU the kernels run in the interpreter or the simulator, which nobody wants by default.
        is_wanted = choice != "triton" or device.type == "cuda"
        if is_wanted and backend.serves(device=device, dtype=dtype, head_dim=head_dim, weights=weights):
            return backend
    return _BACKENDS["sdpa"]


@once
def _check_call(tensors, scale, causal, dropout_p, upcast, return_weights):
    """What the contract says of attention()'s arguments; what a backend can do is asked of it afterwards."""
    function = "attention"
    q, k, v, *bounds = tensors
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        check_tensor(function, tensor, name, ("B", "H", "T", "D"))
    if not q.is_floating_point():
        raise TypeError(f"{function}: q is {q.dtype}; it must be a floating-point tensor")
    check_same(function, q, "q", k, "k")
    check_same(function, q, "q", v, "v")
    B, H, _, D = q.shape
    for tensor, name in ((k, "k"), (v, "v")):
        if tensor.shape != (B, H, k.shape[2], D):
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}; beside q {tuple(q.shape)} and k of T_k = "
                f"{k.shape[2]} it must be [B, H, T_k, D] = {(B, H, k.shape[2], D)}"
            )
    for bound, name in zip(bounds, ("kv_start", "kv_end", "q_start")):
        check_row_vector(function, bound, name, B, q.device)
    if scale is not None:
        check_number(function, scale, "scale", "positive and finite", lambda scale: 0 < scale < math.inf)
    check_number(function, dropout_p, "dropout_p", "from 0 to 1", lambda p: 0 <= p <= 1)
    for flag, name in ((causal, "causal"), (upcast, "upcast"), (return_weights, "return_weights")):
        check_flag(function, flag, name)


def attention(
    q,
    k,
    v,
    *,
    backend="auto",
    scale=None,
    causal=True,
    kv_start=None,
    kv_end=None,
    q_start=None,
    dropout_p=0.0,
    upcast=False,
    return_weights=False,
):
    """Attention by the backend called `backend`, under the contract above.

    q [B, H, T_q, D]; k, v [B, H, T_k, D]. Returns (o [B, H, T_q, D], weights [B, H, T_q, T_k] or None).
    """
    _check_call((q, k, v, kv_start, kv_end, q_start), scale, causal, dropout_p, upcast, return_weights)
    check_attention_name(backend, "attention: backend")
    chosen = get_attention(backend, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], weights=return_weights)
    chosen.check(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        padding=kv_start is not None or kv_end is not None,
        dropout=dropout_p > 0,
        unequal_lengths=q.shape[-2] != k.shape[-2] or q_start is not None,
        upcast=upcast,
        weights=return_weights,
    )
    options = chosen.options(
        scale=scale,
        causal=causal,
        kv_start=kv_start,
        kv_end=kv_end,
        q_start=q_start,
        dropout_p=dropout_p,
        upcast=upcast,
        return_weights=return_weights,
    )
    return chosen.forward(q, k, v, **options)


def self_attention(
    qkv, num_heads, *, backend="auto", scale=None, kv_start=None, kv_end=None, dropout_p=0.0, upcast=False
):
    """Causal self-attention straight from the fused projection [B, T, 3C]; returns the merged heads [B, T, C]."""
    B, T, three_C = qkv.shape
    head_dim = three_C // (3 * num_heads)
    chosen = get_attention(backend, device=qkv.device, dtype=qkv.dtype, head_dim=head_dim)
    if chosen.projection is not None:
        chosen.check(
            device=qkv.device,
            dtype=qkv.dtype,
            head_dim=head_dim,
            padding=kv_start is not None or kv_end is not None,
            dropout=dropout_p > 0,
            upcast=upcast,
        )
        options = chosen.options(scale=scale, kv_start=kv_start, kv_end=kv_end, dropout_p=dropout_p)
        return chosen.projection(qkv, num_heads, **options)
    q, k, v = split_heads(qkv, num_heads)
    o, _ = attention(
        q,
        k,
        v,
        backend=chosen.name,
        scale=scale,
        kv_start=kv_start,
        kv_end=kv_end,
        dropout_p=dropout_p,
        upcast=upcast,
    )
    return o.transpose(1, 2).reshape(B, T, three_C // 3)
