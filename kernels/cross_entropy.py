"""Cross-entropy of rows of logits against target columns, forward and backward, for any vocabulary size.

    loss   = log sum_j exp(x_j) - x_target = (m - x_target) + log l,   m = max_j x_j,  l = sum_j exp(x_j - m)
    dx_j   = (exp(x_j - m) / l - [j = target]) dloss                  0 in a row whose target is ignore_index

and with label smoothing, a softcap, z-loss and class weights as logits.py derives. One program takes one row. Each of
its threads keeps a maximum and a sum of its own over the columns that it visits, 16 bytes at a time where rows are
aligned, and the threads meet once, at the end of the row (online softmax: Milakov and Gimelshein, 2018). m and l are
kept apart for backward: their combination, log l + m, has lost the digits of log l where logits are large. Everything
is fp32 in registers.

Bytes, least, for M rows of V columns of e bytes: forward M V e, backward 2 M V e (read, and written in place if the
caller allows), and 8 M for targets (16 M for the mean), 8 M for m and l, 4 M for the losses. With the gradient taken in
the forward pass (linear_cross_entropy.py) the row is read a second time, from L2. FLOPs: about 5 an element each way,
one of them exp2.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_flag,
    check_number,
    check_tensor,
    once,
    refuse_second_derivative,
)
from kernels.configs import vocabulary_config
from kernels.launch import Launcher
from kernels.library import define_op
from kernels.logits import _capped, _row_loss, _row_statistics, _target_weight, _write_gradient, _write_zeros
from kernels.rows import as_rows, empty_aligned

REDUCTIONS = ("none", "sum", "mean")


class LossOptions(NamedTuple):
    """What shapes the loss beside the logits, in the ops' order; softcap is 0 where there is none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    lse_square_scale: float = 0.0


OPTIONS_SCHEMA = "int ignore_index, float label_smoothing, float softcap, float lse_square_scale"


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,  # [M, V]
    target_ptr,  # [M]
    class_weight_ptr,  # [V], or None
    total_weight_ptr,  # [1]: their sum
    counts_ptr,  # [2]: targets that count, and ratio; or None
    dloss_ptr,  # [M], or None
    loss_ptr,  # [M]
    m_ptr,  # [M], or None
    l_ptr,  # [M], or None
    stride_logits,
    stride_target,
    stride_dloss,
    ignore_index,
    label_smoothing,
    softcap,
    lse_square_scale,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """A row's loss, and m and l where they are asked for; with GRADIENT the row's gradient, times its dloss where there
    is one, takes the row's place."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(target_ptr + row * stride_target)
    loss = 0.0
    m = 0.0
    l = 1.0
    if target != ignore_index:
        # A target outside the row gives NaN and reads nothing.
        z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan"))
        x_target = _capped(z_target, softcap, HAS_SOFTCAP)
        anchor = tl.where(tl.abs(x_target) < float("inf"), x_target, 0.0)
        m, l, d = _row_statistics(
            row_ptr, class_weight_ptr, anchor, softcap, V, UNROLL, LANES, VEC, HAS_SOFTCAP, HAS_SMOOTHING
        )
        w_target = _target_weight(class_weight_ptr, target, V)
        ratio, total_weight = _weight_sums(class_weight_ptr, total_weight_ptr, counts_ptr, V)
        loss = _row_loss(
            x_target,
            anchor,
            w_target,
            m,
            l,
            d,
            ratio,
            total_weight,
            label_smoothing,
            lse_square_scale,
            V,
            HAS_SMOOTHING,
            HAS_Z_LOSS,
        )
        if GRADIENT:
            scale = 1.0
            if dloss_ptr is not None:
                scale = tl.load(dloss_ptr + row * stride_dloss)
            tl.debug_barrier()  # x_target is read before it is overwritten
            _write_gradient(
                row_ptr,
                row_ptr,
                class_weight_ptr,
                target,
                w_target,
                m,
                l,
                _finite(ratio),
                total_weight,
                scale,
                label_smoothing,
                softcap,
                lse_square_scale,
                V,
                UNROLL,
                LANES,
                VEC,
                HAS_SOFTCAP,
                HAS_SMOOTHING,
                HAS_Z_LOSS,
            )
    elif GRADIENT:
        _write_zeros(row_ptr, V, UNROLL, LANES, VEC)
    tl.store(loss_ptr + row, loss)
    if m_ptr is not None:
        tl.store(m_ptr + row, m)
        tl.store(l_ptr + row, l)


@triton.jit
def _weight_sums(class_weight_ptr, total_weight_ptr, counts_ptr, V: tl.constexpr):
    """ratio and sum_j w_j: see logits.py."""
    ratio = 1.0
    total_weight = 1.0 * V
    if class_weight_ptr is not None:
        total_weight = tl.load(total_weight_ptr)
        if counts_ptr is not None:
            ratio = tl.load(counts_ptr + 1)
    return ratio, total_weight


@triton.jit
def _finite(ratio):
    """Gradients are 0, not NaN, where all targets weigh nothing."""
    return tl.where(tl.abs(ratio) < float("inf"), ratio, 0.0)


@triton.jit
def _cross_entropy_backward_kernel(
    dloss_ptr,  # [M]
    counts_ptr,  # [2]: targets that count, and ratio; or None
    logits_ptr,  # [M, V]
    target_ptr,  # [M]
    class_weight_ptr,  # [V], or None
    total_weight_ptr,  # [1]: their sum
    m_ptr,  # [M]
    l_ptr,  # [M]
    dlogits_ptr,  # [M, V]
    stride_dloss,
    stride_logits,
    stride_target,
    stride_dlogits,
    ignore_index,
    label_smoothing,
    softcap,
    lse_square_scale,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row * stride_target)
    gradient_ptr = dlogits_ptr + row * stride_dlogits
    if target != ignore_index:
        scale = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        if counts_ptr is not None:
            scale /= tl.load(counts_ptr)  # not 0: this row's target counts
        ratio, total_weight = _weight_sums(class_weight_ptr, total_weight_ptr, counts_ptr, V)
        _write_gradient(
            logits_ptr + row * stride_logits,
            gradient_ptr,
            class_weight_ptr,
            target,
            _target_weight(class_weight_ptr, target, V),
            tl.load(m_ptr + row),
            tl.load(l_ptr + row),
            _finite(ratio),
            total_weight,
            scale,
            label_smoothing,
            softcap,
            lse_square_scale,
            V,
            UNROLL,
            LANES,
            VEC,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
            HAS_Z_LOSS,
        )
    else:
        _write_zeros(gradient_ptr, V, UNROLL, LANES, VEC)


@triton.jit
def _count_targets_kernel(
    target_ptr, class_weight_ptr, counts_ptr, stride_target, M, ignore_index, V, BLOCK: tl.constexpr
):
    """The number n of targets that are not ignored, and n / (their summed class weights), 1 without those."""
    count = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + rows.to(tl.int64) * stride_target, mask=rows < M, other=ignore_index)
        counts = target != ignore_index
        count += counts.to(tl.float32)
        if class_weight_ptr is not None:
            inside = counts & (target >= 0) & (target < V)
            weights += tl.load(class_weight_ptr + target, mask=inside, other=0.0).to(tl.float32)
    n = tl.sum(count, 0)
    ratio = 1.0
    if class_weight_ptr is not None:
        ratio = n / tl.sum(weights, 0)
    tl.store(counts_ptr, n)
    tl.store(counts_ptr + 1, ratio)


@triton.jit
def _reduce_losses_kernel(losses_ptr, counts_ptr, loss_ptr, M, BLOCK: tl.constexpr):
    """The sum of M losses; with counts_ptr their mean over the targets that count."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + rows, mask=rows < M, other=0.0)
    loss = tl.sum(total, 0)
    if counts_ptr is not None:
        loss /= tl.load(counts_ptr)  # no target at all: 0 / 0, NaN, as PyTorch has it
    tl.store(loss_ptr, loss)


def _constants(V, config, options):
    """What is compiled in."""
    return {
        "V": V,
        "UNROLL": config.UNROLL,
        "LANES": config.LANES,
        "VEC": config.VEC,
        "HAS_SOFTCAP": options.softcap != 0.0,
        "HAS_SMOOTHING": options.label_smoothing != 0.0,
        "HAS_Z_LOSS": options.lse_square_scale != 0.0,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _forward_plan(M, V, config, strides, options, gradient):
    return (M,), (*strides, *options), {**_constants(V, config, options), "GRADIENT": gradient}, {}


def _backward_plan(M, V, config, strides, options):
    return (M,), (*strides, *options), _constants(V, config, options), {}


def _counts_plan(M, V, stride_target, ignore_index):
    return (1,), (stride_target, M, ignore_index, V), {"BLOCK": 4096, "num_warps": 16}, {}


def _reduction_plan(M):
    return (1,), (M,), {"BLOCK": 4096, "num_warps": 16}, {}


_launch_forward_rows = Launcher(_cross_entropy_forward_kernel, _forward_plan)
_launch_backward_rows = Launcher(_cross_entropy_backward_kernel, _backward_plan)
_launch_count = Launcher(_count_targets_kernel, _counts_plan)
_launch_reduce = Launcher(_reduce_losses_kernel, _reduction_plan)


def _total_weight(class_weight):
    return None if class_weight is None else class_weight.sum(dtype=torch.float32)


def _or_none(counts):
    """counts is empty where no mean is taken."""
    return counts if counts.numel() else None


def launch_counts(target, class_weight, V, ignore_index, reduction):
    """For "mean" fp32 [2], n and n / (summed weights), on the device; else empty."""
    counts = torch.empty(2 if reduction == "mean" else 0, dtype=torch.float32, device=target.device)
    if reduction == "mean":
        _launch_count((target, class_weight, counts), target.shape[0], V, target.stride(0), ignore_index)
    return counts


def launch_rows(logits, target, class_weight, counts, options, losses, *, dloss=None, statistics=None, gradient=False):
    """Writes losses [M] fp32 and, where given, the statistics m and l; with gradient the logits [M, V] are overwritten
    by their gradient, times dloss [M] fp32 where that is given."""
    M, V = logits.shape
    if M:
        m, l = statistics or (None, None)
        sides = target, class_weight, _total_weight(class_weight), _or_none(counts), dloss
        strides = logits.stride(0), target.stride(0), 0 if dloss is None else dloss.stride(0)
        config = vocabulary_config(V, options.softcap != 0.0, logits)
        _launch_forward_rows((logits, *sides, losses, m, l), M, V, config, strides, options, gradient)


def launch_reduction(losses, counts):
    """The losses' mean where there are counts, else their sum: fp32 []."""
    loss = torch.empty((), dtype=torch.float32, device=losses.device)
    _launch_reduce((losses, _or_none(counts), loss), losses.shape[0])
    return loss


def _launch_backward(dloss, counts, logits, target, class_weight, m, l, options, dlogits):
    """Writes dlogits [M, V], which may be logits."""
    M, V = logits.shape
    if M:
        sides = target, class_weight, _total_weight(class_weight)
        strides = dloss.stride(0) if dloss.dim() else 0, logits.stride(0), target.stride(0), dlogits.stride(0)
        tensors = (dloss, _or_none(counts), logits, *sides, m, l, dlogits)
        options = LossOptions(*options)
        config = vocabulary_config(V, options.softcap != 0.0, logits, dlogits)
        _launch_backward_rows(tensors, M, V, config, strides, options)


def _forward(logits, target, class_weight, reduction, *options):
    check_device("cross_entropy", logits, "logits")
    losses, m, l = (torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(3))
    options = LossOptions(*options)
    counts = launch_counts(target, class_weight, logits.shape[1], options.ignore_index, reduction)
    launch_rows(logits, target, class_weight, counts, options, losses, statistics=(m, l))
    return losses if reduction == "none" else launch_reduction(losses, counts), counts, m, l


def _forward_fake(logits, target, class_weight, reduction, *options):
    m = logits.new_empty(logits.shape[0], dtype=torch.float32)
    loss = torch.empty_like(m) if reduction == "none" else m.new_empty(())
    return loss, m.new_empty(2 if reduction == "mean" else 0), m, torch.empty_like(m)


def _backward(dloss, counts, logits, target, class_weight, m, l, *options):
    dlogits = empty_aligned(*logits.shape, logits)
    _launch_backward(dloss, counts, logits, target, class_weight, m, l, options, dlogits)
    return dlogits


def _backward_fake(dloss, counts, logits, target, class_weight, m, l, *options):
    return empty_aligned(*logits.shape, logits)


def _backward_in_place(dloss, counts, logits, target, class_weight, m, l, *options):
    _launch_backward(dloss, counts, logits, target, class_weight, m, l, options, logits)
    # An op registered through torch.library.Library leaves the version to us: without it autograd would go on to use
    # the gradient where it saved the logits (a tanh before them, a second backward).
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


def _backward_in_place_fake(dloss, counts, logits, target, class_weight, m, l, *options):
    return None


_BACKWARD = (
    "(Tensor dloss, Tensor counts, Tensor{} logits, Tensor target, Tensor? class_weight, Tensor m, Tensor l, "
    f"{OPTIONS_SCHEMA})"
)
cross_entropy_forward = define_op(
    f"cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, str reduction, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
cross_entropy_backward = define_op(f"cross_entropy_backward{_BACKWARD.format('')} -> Tensor", _backward, _backward_fake)
cross_entropy_backward_ = define_op(
    f"cross_entropy_backward_{_BACKWARD.format('(a!)')} -> ()", _backward_in_place, _backward_in_place_fake
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, class_weight, reduction, inplace, *options):
        loss, counts, m, l = cross_entropy_forward(logits, target, class_weight, reduction, *options)
        ctx.save_for_backward(counts, logits, target, class_weight, m, l)
        ctx.options, ctx.inplace = options, inplace
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_second_derivative("cross_entropy")
        counts, logits, *saved = ctx.saved_tensors
        if not ctx.inplace:
            return cross_entropy_backward(dloss, counts, logits, *saved, *ctx.options), *[None] * 8
        cross_entropy_backward_(dloss, counts, logits, *saved, *ctx.options)
        return logits, *[None] * 8


def check_loss(function, rows, V, target, class_weight, ignore_index, reduction, label_smoothing, softcap, z_loss):
    """Checks what both losses share, and returns the LossOptions."""
    check_tensor(function, target, "target")
    if target.shape != rows.shape[:1] or target.dtype != torch.int64 or target.device != rows.device:
        raise ValueError(
            f"{function}: target is {target.dtype} {tuple(target.shape)} on {target.device}; "
            f"it must be torch.int64 ({rows.shape[0]},) on {rows.device}"
        )
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    int64 = "in the range of int64"
    check_number(function, ignore_index, "ignore_index", int64, lambda i: -(2**63) <= i < 2**63, integer=True)
    check_number(function, label_smoothing, "label_smoothing", "from 0 to 1", lambda p: 0.0 <= p <= 1.0)
    if softcap is not None:
        check_number(function, softcap, "softcap", "positive and finite, or None", lambda cap: 0.0 < cap < math.inf)
    check_number(function, z_loss, "lse_square_scale", "finite", math.isfinite)
    if class_weight is not None:
        check_tensor(function, class_weight, "class_weight")
        wanted = class_weight.shape == (V,) and class_weight.dtype in FLOATS and class_weight.device == rows.device
        if not wanted or not class_weight.is_contiguous():
            raise ValueError(
                f"{function}: class_weight is {class_weight.dtype} {tuple(class_weight.shape)} with strides "
                f"{class_weight.stride()} on {class_weight.device}; it must be floating, contiguous and ({V},) on "
                f"{rows.device}"
            )
    return LossOptions(int(ignore_index), float(label_smoothing), float(softcap or 0.0), float(z_loss))


def refuse_class_weight_gradient(function, class_weight):
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(f"{function}: class_weight requires a gradient, which is not implemented; detach it")


@once
def _check(tensors, inplace, *options):
    """cross_entropy's checks; the LossOptions."""
    function = "cross_entropy"
    logits, target, class_weight = tensors
    check_tensor(function, logits, "logits", "MV")
    check_flag(function, inplace, "inplace")
    check_dtype(function, logits, "logits")
    rows = as_rows(function, logits, "logits")
    options = check_loss(function, rows, logits.shape[1], target, class_weight, *options)
    if inplace and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"{function}: inplace is set, and logits has shape {tuple(logits.shape)} and strides "
            f"{tuple(logits.stride())}; its rows must not overlap where the gradient is written over them"
        )
    return options


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy by Triton kernels, differentiable once; the semantics of torch's with class indices.

    logits: [M, V], fp16, bf16 or fp32, rows of unit stride, any V; read in place. target: int64 [M], in [0, V) or
        ignore_index. A target outside both gives NaN in its row (a GPU kernel cannot raise), and reads nothing.
    reduction: "mean" over targets that are not ignored (NaN, with gradients of 0, if there are none), "sum" or "none".
    inplace: lets backward write the gradient over the logits, which saves the memory of one [M, V]; the logits are lost
        then, as autograd knows: whatever else needs them in backward raises its error. Rows must not overlap.
    label_smoothing, class_weight ([V], floating; weight in torch): as torch.nn.functional.cross_entropy has them.
    softcap: logits become softcap tanh(logits / softcap) first. lse_square_scale: times log-sum-exp squared is added to
        each row's loss (z-loss: PaLM, Chowdhery et al., 2022); its mean is over rows, whatever the class weights. Both
        as Liger has them.
    Returns the loss in fp32, whatever the logits' dtype: [] or, for "none", [M]. Softmax and sums are fp32.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    shared = ignore_index, reduction, label_smoothing, softcap, lse_square_scale
    options = _check((logits, target, class_weight), inplace, *shared)
    refuse_class_weight_gradient("cross_entropy", class_weight)
    return _CrossEntropy.apply(logits, target, class_weight, reduction, bool(inplace), *options)
