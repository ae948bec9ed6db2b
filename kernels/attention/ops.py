"""flash_attention and flash_attention_packed: validation, torch.library ops, autograd.

Ops registered under torch.ops.gpt2: attention_forward and attention_backward for separate q, k, v; attention_decode
for a few queries against a cache; packed_attention_forward and packed_attention_backward, which read the fused
projection [B, T, 3C] in place and write its gradient as one tensor of that shape, with the same kernels. choice.py
says which kernels.
"""

import math
from typing import NamedTuple

import torch

from kernels.attention.choice import (
    KERNELS,
    launch_backward,
    launch_forward,
    launch_packed_backward,
    launch_packed_forward,
)
from kernels.attention.decode import MAX_QUERIES, _launch_attention_decode
from kernels.checks import (
    check_device,
    check_dropout,
    check_dtype,
    check_flag,
    check_last_stride,
    check_number,
    check_row_vector,
    check_same,
    check_tensor,
    dense,
    once,
    refuse_second_derivative,
    refuse_transforms,
)
from kernels.library import LN2, define_op, needs_graph
from kernels.rows import unit_stride

MAX_HEAD_DIM = 256


class Options(NamedTuple):
    """What every attention op takes beside its tensors, in its schema's order; flash_attention describes each."""

    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    q_start: torch.Tensor | None
    seed: torch.Tensor | None
    scale: float
    causal: bool
    dropout_p: float


_SCHEMA = (
    "Tensor? kv_start, Tensor? kv_end, Tensor? q_start, Tensor? seed, float scale, bool causal, float dropout_p,"
    " str kernel, bool deterministic"
)


def _options(kv_start, kv_end, q_start, *rest):
    """Options for a launch: the bounds lie densely, as kernels read them."""
    return Options(dense(kv_start), dense(kv_end), dense(q_start), *rest)


def split_heads(qkv, num_heads):
    """The fused projection [B, T, 3C] as q, k, v [B, H, T, D]: views, no copy."""
    B, T, three_C = qkv.shape
    parts = qkv.view(B, T, 3, num_heads, three_C // (3 * num_heads))
    return tuple(part.transpose(1, 2) for part in parts.unbind(2))  # each [B, H, T, D]


def _forward(q, k, v, *options):
    check_device("flash_attention", q, "q")
    *options, kernel, deterministic = options
    return launch_forward(kernel, deterministic, q, k, v, _options(*options))


def _forward_fake(q, k, v, *options):
    B, H, T_q, D = q.shape
    return q.new_empty(B, T_q, H, D).transpose(1, 2), q.new_empty(B, H, T_q, dtype=torch.float32)


def _decode(q, k, v, kv_start, kv_end, q_start, scale, causal):
    check_device("flash_attention", q, "q")
    return _launch_attention_decode(q, k, v, _options(kv_start, kv_end, q_start, None, scale, causal, 0.0))


def _backward(do, q, k, v, o, lse, *options):
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    *options, kernel, deterministic = options
    launch_backward(kernel, deterministic, do, q, k, v, o, lse, dq, dk, dv, _options(*options))
    return dq, dk, dv


def _backward_fake(do, q, k, v, o, lse, *options):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _packed_forward(qkv, num_heads, *options):
    check_device("flash_attention_packed", qkv, "qkv")
    *options, kernel, deterministic = options
    return launch_packed_forward(kernel, deterministic, qkv, num_heads, _options(*options))


def _packed_forward_fake(qkv, num_heads, *options):
    B, T, three_C = qkv.shape
    return qkv.new_empty(B, T, three_C // 3), qkv.new_empty(B, num_heads, T, dtype=torch.float32)


def _packed_backward(do, qkv, o, lse, num_heads, *options):
    *options, kernel, deterministic = options
    return launch_packed_backward(kernel, deterministic, do, qkv, o, lse, num_heads, _options(*options))


def _packed_backward_fake(do, qkv, o, lse, num_heads, *options):
    return qkv.new_empty(qkv.shape)


attention_forward = define_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)", _forward, _forward_fake
)
attention_decode = define_op(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? kv_start, Tensor? kv_end, Tensor? q_start, float scale,"
    " bool causal) -> (Tensor, Tensor)",
    _decode,
    _forward_fake,
)
attention_backward = define_op(
    f"attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
packed_attention_forward = define_op(
    f"packed_attention_forward(Tensor qkv, int num_heads, {_SCHEMA}) -> (Tensor, Tensor)",
    _packed_forward,
    _packed_forward_fake,
)
packed_attention_backward = define_op(
    f"packed_attention_backward(Tensor do, Tensor qkv, Tensor o, Tensor lse, int num_heads, {_SCHEMA}) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
)


def _save(ctx, tensors, options):
    """Keeps tensors and options, behind them the kernel's name and whether it is deterministic, for backward."""
    ctx.save_for_backward(*tensors, *options[:4])
    ctx.numbers = options[4:]


def _saved(ctx):
    """The tensors and the options that _save kept."""
    *tensors, kv_start, kv_end, q_start, seed = ctx.saved_tensors
    return tensors, (kv_start, kv_end, q_start, seed, *ctx.numbers)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *options):
        o, lse = attention_forward(q, k, v, *options)
        _save(ctx, (q, k, v, o, lse), options)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        refuse_second_derivative("flash_attention")
        tensors, options = _saved(ctx)
        return *attention_backward(unit_stride(do), *tensors, *options), *[None] * len(options)


class _FlashAttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, *options):
        o, lse = packed_attention_forward(qkv, num_heads, *options)
        _save(ctx, (qkv, o, lse), options)
        ctx.num_heads = num_heads
        return o

    @staticmethod
    def backward(ctx, do):
        refuse_second_derivative("flash_attention_packed")
        tensors, options = _saved(ctx)
        dqkv = packed_attention_backward(unit_stride(do), *tensors, ctx.num_heads, *options)
        return dqkv, None, *[None] * len(options)


def _check_shared(function, tensor, B, D, scale, *bounds):
    """Checks what both public functions take; the scale to use."""
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"{function}: head_dim is {D}; it must be from 1 to {MAX_HEAD_DIM}")
    if scale is not None:
        check_number(function, scale, "scale", "positive and finite", lambda scale: 0 < scale < math.inf)
    scale = D**-0.5 if scale is None else float(scale)
    for bound, name in zip(bounds, ("kv_start", "kv_end", "q_start")):
        check_row_vector(function, bound, name, B, tensor.device)
    return scale


@once
def _check(tensors, scale):
    """flash_attention's checks; the scale to use."""
    function = "flash_attention"
    q, k, v, *bounds = tensors
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        check_tensor(function, tensor, name, "BHTD")
    check_dtype(function, q, "q")
    for tensor, name in ((k, "k"), (v, "v")):
        check_same(function, q, "q", tensor, name)
        for axis, what in ((0, "batch size"), (1, "heads"), (3, "head_dim")):
            if tensor.shape[axis] != q.shape[axis]:
                raise ValueError(
                    f"{function}: {name} has {what} {tensor.shape[axis]}, q has {q.shape[axis]}; they must match"
                )
    if k.shape[2] != v.shape[2] or k.shape[2] == 0:
        raise ValueError(
            f"{function}: k has {k.shape[2]} keys, v has {v.shape[2]}; they must match and there must be at least one"
        )
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        check_last_stride(function, tensor, name)
    return _check_shared(function, q, q.shape[0], q.shape[3], scale, *bounds)


@once
def _check_packed(tensors, num_heads, scale):
    """flash_attention_packed's checks; the scale to use."""
    function = "flash_attention_packed"
    qkv, *bounds = tensors
    check_tensor(function, qkv, "qkv", ("B", "T", "3C"))
    check_dtype(function, qkv, "qkv")
    check_number(function, num_heads, "num_heads", "at least 1", lambda heads: heads >= 1, integer=True)
    if qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"{function}: qkv has shape {tuple(qkv.shape)} for {num_heads} heads; "
            "it must be [B, T, 3 * heads * head_dim]"
        )
    check_last_stride(function, qkv, "qkv")
    return _check_shared(function, qkv, qkv.shape[0], qkv.shape[2] // (3 * num_heads), scale, *bounds)


def _check_kernel(function, kernel):
    if not isinstance(kernel, str):
        raise TypeError(f"{function}: kernel is {kernel!r}; it must be a string: {', '.join(KERNELS)}")
    if kernel not in KERNELS:
        raise ValueError(f"{function}: kernel is {kernel!r}; it must be one of {', '.join(KERNELS)}")


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    q_start: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    deterministic: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v by the Triton kernels, differentiable once. FlashAttention-2 (Dao, 2023).

    q: [B, H, T_q, D]; k, v: [B, H, T_k, D]. fp16, bf16 or fp32, all the same; D from 1 to 256; any strides whose last
        is 1: they are read in place. On a GPU, or on the CPU in Triton's interpreter or the simulator.
    causal: query i sees key j if j <= q_start[b] + i, where q_start is T_k - T_q unless given (bottom-right alignment).
    scale: multiplies the scores; 1 / sqrt(D) unless given; positive.
    kv_start, kv_end: int32 [B], the valid keys [start, end) of each row, cut to [0, T_k); no other key is ever read.
    q_start: int32 [B], the position among the keys at which each row's first query stands.
    dropout_p: probability that dropout zeroes a weight, in [0, 1), rounded to a multiple of 1 / 65536.
    dropout_seed: int64 [1] on the inputs' device; drawn from torch's generator there unless given.
    kernel: "portable"; "hopper" (hopper.py, hopper_backward.py), which needs compute capability 9.0, fp16 or bf16, a D
        of 64 or 128, no padding, no dropout, and tensors and strides at multiples of 16 bytes; or "auto": that where it
        can be and was measured to be faster (README.md has the table), else "portable".
    deterministic: False takes the one-pass backward of hopper_one_pass.py from 2048 queries on, whose dq has other last
        bits in each run, and below what `kernel` says. It needs what "hopper" needs, and a D of 64; a ValueError says
        what is missing.

    Up to 16 queries against more keys, where no gradient is asked for, go through the split-KV kernels of decode.py.

    Returns o [B, H, T_q, D] in the inputs' dtype, in memory order [B, T_q, H, D]; with return_lse also the log-sum-exp
    of each query's scaled scores, [B, H, T_q] fp32, not differentiable. A query that sees no key gives 0, and
    lse = -inf. Scores and softmax are fp32; fp32 inputs are multiplied in fp32, never TF32. Scaled scores may reach
    4e8 in magnitude, and 1e5 where gradients are taken; beyond, results are wrong (see README.md).
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    refuse_transforms("flash_attention")
    check_flag("flash_attention", causal, "causal")
    check_flag("flash_attention", return_lse, "return_lse")
    check_flag("flash_attention", deterministic, "deterministic")
    _check_kernel("flash_attention", kernel)
    scale = _check((q, k, v, kv_start, kv_end, q_start), scale)
    seed = check_dropout("flash_attention", q, dropout_p, dropout_seed)
    options = kv_start, kv_end, q_start, seed, scale, bool(causal), float(dropout_p), kernel, bool(deterministic)
    if needs_graph(q, k, v):
        o, lse = _FlashAttention.apply(q, k, v, *options)
    elif deterministic and seed is None and q.shape[2] <= MAX_QUERIES and q.shape[2] < k.shape[2]:
        o, lse = attention_decode(q, k, v, kv_start, kv_end, q_start, scale, bool(causal))
    else:
        o, lse = attention_forward(q, k, v, *options)
    return (o, lse * LN2) if return_lse else o


def flash_attention_packed(
    qkv: torch.Tensor,
    num_heads: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = True,
) -> torch.Tensor:
    """Self-attention straight from the fused projection: qkv [B, T, 3C] to [B, T, C], with nothing copied on the way.

    qkv holds q, k and v side by side, each as num_heads heads of D = C / num_heads. Its gradient is one [B, T, 3C]
    tensor that the kernels write in place. The other arguments, the numerics and the errors are flash_attention's.
    """
    refuse_transforms("flash_attention_packed")
    check_flag("flash_attention_packed", causal, "causal")
    check_flag("flash_attention_packed", deterministic, "deterministic")
    _check_kernel("flash_attention_packed", kernel)
    scale = _check_packed((qkv, kv_start, kv_end), num_heads, scale)
    seed = check_dropout("flash_attention_packed", qkv, dropout_p, dropout_seed)
    options = kv_start, kv_end, None, seed, scale, bool(causal), float(dropout_p), kernel, bool(deterministic)
    if needs_graph(qkv):
        return _FlashAttentionPacked.apply(qkv, num_heads, *options)
    return packed_attention_forward(qkv, num_heads, *options)[0]
