"""Cross-entropy of rows of logits against target columns, forward and backward, for any vocabulary size.

    loss   = log sum_j exp(x_j) - x_target = (m - x_target) + log l,   m = max_j x_j,  l = sum_j exp(x_j - m)
    dx_j   = (exp(x_j - m) / l - [j = target]) dloss                  0 in a row whose target is ignore_index

One program takes one row. Each of its threads keeps a maximum and a sum of its own over the columns that it visits, 16
bytes at a time where rows are aligned, and the threads meet once, at the end of the row (online softmax: Milakov and
Gimelshein, 2018). m and l are kept apart for backward: their combination, log l + m, has lost the digits of log l where
logits are large. Everything is fp32 in registers.

Bytes, least, for M rows of V columns of e bytes: forward M V e, backward 2 M V e (read, and written in place if the
caller allows), and 8 M for targets, 8 M for m and l, 4 M for the losses. With the gradient taken in the forward pass
(linear_cross_entropy.py) the row is read a second time, from L2. FLOPs: about 5 an element each way, one of them exp2.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_device, check_dtype, refuse_second_derivative
from kernels.configs import vocabulary_config
from kernels.library import LN2, LOG2E, define_op, device_of
from kernels.rows import as_rows

REDUCTIONS = ("none", "sum", "mean")

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _columns(UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of one tile, [UNROLL, LANES, VEC]: VEC neighbours for each thread, UNROLL times; reductions over the
    first and the last axis stay inside a thread."""
    u = tl.arange(0, UNROLL)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (u * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def _accumulate(m_i, l_i, x):
    """Takes x [UNROLL, LANES, VEC] fp32 into the maximum m_i and the sum l_i of exp(x - m_i), both [LANES]."""
    m_new = tl.maximum(m_i, tl.max(tl.max(x, 2), 0))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a thread may have seen nothing but -inf
    p = tl.exp2((x - shift[None, :, None]) * _LOG2E)
    return m_new, l_i * tl.exp2((m_i - shift) * _LOG2E) + tl.sum(tl.sum(p, 2), 0)


@triton.jit
def _row_statistics(row_ptr, V: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """m and l of a row of V logits."""
    BLOCK: tl.constexpr = UNROLL * LANES * VEC
    columns = _columns(UNROLL, LANES, VEC)
    m_i = tl.full([LANES], float("-inf"), tl.float32)
    l_i = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V - BLOCK + 1, BLOCK):
        x = tl.load(row_ptr + start + columns)  # [UNROLL, LANES, VEC]
        m_i, l_i = _accumulate(m_i, l_i, x.to(tl.float32))
    if V % BLOCK:
        offs = V // BLOCK * BLOCK + columns
        x = tl.load(row_ptr + offs, mask=offs < V, other=float("-inf"))  # [UNROLL, LANES, VEC]
        m_i, l_i = _accumulate(m_i, l_i, x.to(tl.float32))
    m = tl.max(m_i, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    return m, tl.sum(l_i * tl.exp2((m_i - m) * _LOG2E), 0)


@triton.jit
def _gradient_tile(x, offs, target, m, factor, scale):
    """(exp(x - m) factor - [offs = target] scale), for factor = scale / l."""
    p = tl.exp2((x.to(tl.float32) - m) * _LOG2E) * factor
    return tl.where(offs == target, p - scale, p)


@triton.jit
def _write_gradient(
    row_ptr,
    gradient_ptr,
    target,
    m,
    l,
    scale,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Stores the row's gradient times scale; gradient_ptr may be row_ptr."""
    BLOCK: tl.constexpr = UNROLL * LANES * VEC
    columns = _columns(UNROLL, LANES, VEC)
    dtype: tl.constexpr = gradient_ptr.dtype.element_ty
    factor = scale / l
    for start in tl.range(0, V - BLOCK + 1, BLOCK):
        offs = start + columns
        x = tl.load(row_ptr + offs)  # [UNROLL, LANES, VEC]
        tl.store(gradient_ptr + offs, _gradient_tile(x, offs, target, m, factor, scale).to(dtype))
    if V % BLOCK:
        offs = V // BLOCK * BLOCK + columns
        x = tl.load(row_ptr + offs, mask=offs < V, other=0.0)  # [UNROLL, LANES, VEC]
        tl.store(gradient_ptr + offs, _gradient_tile(x, offs, target, m, factor, scale).to(dtype), mask=offs < V)


@triton.jit
def _write_zeros(gradient_ptr, V: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """A row of zeros."""
    zeros = tl.zeros([UNROLL, LANES, VEC], gradient_ptr.dtype.element_ty)
    for start in tl.range(0, V, UNROLL * LANES * VEC):
        offs = start + _columns(UNROLL, LANES, VEC)
        tl.store(gradient_ptr + offs, zeros, mask=offs < V)


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    m_ptr,
    l_ptr,
    stride_logits,
    stride_target,
    ignore_index,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """A row's loss, m and l; with GRADIENT its gradient takes the place of the row, and m and l are not stored."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(target_ptr + row * stride_target)
    loss = 0.0
    m = 0.0
    l = 1.0
    if target != ignore_index:
        # A target outside the row gives NaN and reads nothing.
        x_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        m, l = _row_statistics(row_ptr, V, UNROLL, LANES, VEC)
        loss = m - x_target + tl.log2(l) * _LN2
        if GRADIENT:
            tl.debug_barrier()  # x_target is read before it is overwritten
            _write_gradient(row_ptr, row_ptr, target, m, l, 1.0, V, UNROLL, LANES, VEC)
    elif GRADIENT:
        _write_zeros(row_ptr, V, UNROLL, LANES, VEC)
    tl.store(loss_ptr + row, loss)
    if not GRADIENT:
        tl.store(m_ptr + row, m)
        tl.store(l_ptr + row, l)


@triton.jit
def _cross_entropy_backward_kernel(
    dloss_ptr,
    scale_ptr,
    logits_ptr,
    target_ptr,
    m_ptr,
    l_ptr,
    dlogits_ptr,
    stride_dloss,
    stride_logits,
    stride_target,
    stride_dlogits,
    ignore_index,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row * stride_target)
    gradient_ptr = dlogits_ptr + row * stride_dlogits
    if target != ignore_index:
        scale = tl.load(dloss_ptr + row * stride_dloss).to(tl.float32)
        if scale_ptr is not None:
            scale *= tl.load(scale_ptr)
        m, l = tl.load(m_ptr + row), tl.load(l_ptr + row)
        row_ptr = logits_ptr + row * stride_logits
        _write_gradient(row_ptr, gradient_ptr, target, m, l, scale, V, UNROLL, LANES, VEC)
    else:
        _write_zeros(gradient_ptr, V, UNROLL, LANES, VEC)


@triton.jit
def _reduce_losses_kernel(
    losses_ptr, target_ptr, loss_ptr, scale_ptr, stride_target, M, ignore_index, BLOCK: tl.constexpr
):
    """The sum of M losses; with scale_ptr their mean over targets not ignored, and there 1 / the number of those."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + rows, mask=rows < M, other=0.0)
        if scale_ptr is not None:
            target = tl.load(target_ptr + rows.to(tl.int64) * stride_target, mask=rows < M, other=ignore_index)
            count += (target != ignore_index).to(tl.float32)
    loss = tl.sum(total, 0)
    if scale_ptr is not None:
        scale = 1.0 / tl.sum(count, 0)
        loss *= scale  # no target at all: 0 times infinity, NaN, as PyTorch has it
        tl.store(scale_ptr, scale)
    tl.store(loss_ptr, loss)


def launch_rows(logits, target, ignore_index, *, gradient):
    """losses, m and l, each [M] fp32; with gradient the logits [M, V] are overwritten by theirs, and m, l are None."""
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    m, l = (None, None) if gradient else (torch.empty_like(losses) for _ in range(2))
    config = vocabulary_config(V, logits)
    if M:
        with device_of(logits):
            _cross_entropy_forward_kernel[(M,)](
                logits,
                target,
                losses,
                m,
                l,
                logits.stride(0),
                target.stride(0),
                ignore_index,
                V=V,
                UNROLL=config.UNROLL,
                LANES=config.LANES,
                VEC=config.VEC,
                GRADIENT=gradient,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
            )
    return losses, m, l


def launch_reduction(losses, target, ignore_index, reduction):
    """The reduced loss, fp32 [], and for "mean" the fp32 [] by which each row's gradient is multiplied, else None."""
    loss = torch.empty((), dtype=torch.float32, device=losses.device)
    scale = torch.empty_like(loss) if reduction == "mean" else None
    with device_of(losses):
        _reduce_losses_kernel[(1,)](
            losses, target, loss, scale, target.stride(0), losses.shape[0], ignore_index, BLOCK=4096, num_warps=16
        )
    return loss, scale


def _launch_backward(dloss, scale, logits, target, m, l, ignore_index, dlogits):
    """Writes dlogits [M, V], which may be logits."""
    M, V = logits.shape
    config = vocabulary_config(V, logits, dlogits)
    if M:
        with device_of(logits):
            _cross_entropy_backward_kernel[(M,)](
                dloss,
                scale,
                logits,
                target,
                m,
                l,
                dlogits,
                dloss.stride(0) if dloss.dim() else 0,
                logits.stride(0),
                target.stride(0),
                dlogits.stride(0),
                ignore_index,
                V=V,
                UNROLL=config.UNROLL,
                LANES=config.LANES,
                VEC=config.VEC,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
            )


def _forward(logits, target, ignore_index, reduction):
    check_device("cross_entropy", logits, "logits")
    loss, m, l = launch_rows(logits, target, ignore_index, gradient=False)
    scale = None
    if reduction != "none":
        loss, scale = launch_reduction(loss, target, ignore_index, reduction)
    return loss, m.new_empty(0) if scale is None else scale, m, l


def _forward_fake(logits, target, ignore_index, reduction):
    m = logits.new_empty(logits.shape[0], dtype=torch.float32)
    loss = torch.empty_like(m) if reduction == "none" else m.new_empty(())
    return loss, m.new_empty(() if reduction == "mean" else 0), m, torch.empty_like(m)


def _backward(dloss, scale, logits, target, m, l, ignore_index):
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch_backward(dloss, scale if scale.dim() == 0 else None, logits, target, m, l, ignore_index, dlogits)
    return dlogits


def _backward_fake(dloss, scale, logits, target, m, l, ignore_index):
    return logits.new_empty(logits.shape)


def _backward_in_place(dloss, scale, logits, target, m, l, ignore_index):
    _launch_backward(dloss, scale if scale.dim() == 0 else None, logits, target, m, l, ignore_index, logits)


def _backward_in_place_fake(dloss, scale, logits, target, m, l, ignore_index):
    return None


_BACKWARD = "(Tensor dloss, Tensor scale, Tensor{} logits, Tensor target, Tensor m, Tensor l, int ignore_index)"
cross_entropy_forward = define_op(
    "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, str reduction) "
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
    def forward(ctx, logits, target, ignore_index, reduction, inplace):
        loss, scale, m, l = cross_entropy_forward(logits, target, ignore_index, reduction)
        ctx.save_for_backward(scale, logits, target, m, l)
        ctx.ignore_index, ctx.inplace = ignore_index, inplace
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_second_derivative("cross_entropy")
        scale, logits, *saved = ctx.saved_tensors
        if not ctx.inplace:
            return cross_entropy_backward(dloss, scale, logits, *saved, ctx.ignore_index), *[None] * 4
        cross_entropy_backward_(dloss, scale, logits, *saved, ctx.ignore_index)
        return logits, *[None] * 4


def check_target(function, rows, target, reduction):
    """target must be int64 of one dimension, one for each row, and reduction one of REDUCTIONS."""
    if target.shape != rows.shape[:1] or target.dtype != torch.int64 or target.device != rows.device:
        raise ValueError(
            f"{function}: target is {target.dtype} {tuple(target.shape)} on {target.device}; "
            f"it must be torch.int64 ({rows.shape[0]},) on {rows.device}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def cross_entropy(logits, target, *, ignore_index=-100, reduction="mean", inplace=False):
    """Cross-entropy by Triton kernels, differentiable once; the semantics of torch's with class indices.

    logits: [M, V], fp16, bf16 or fp32, rows of unit stride, any V; read in place. target: int64 [M], in [0, V) or
        ignore_index. A target outside both gives NaN in its row (a GPU kernel cannot raise), and reads nothing.
    reduction: "mean" over targets that are not ignored (NaN if there are none), "sum" or "none".
    inplace: allows backward to write the gradient over the logits, which saves the memory of one [M, V]; the logits
        are lost then.
    Returns the loss in fp32, whatever the logits' dtype: [] or, for "none", [M]. Softmax and sums are fp32.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    function = "cross_entropy"
    if logits.dim() != 2:
        raise ValueError(f"{function}: logits has shape {tuple(logits.shape)}; it must be [M, V]")
    check_dtype(function, logits, "logits")
    check_target(function, as_rows(function, logits, "logits"), target, reduction)
    return _CrossEntropy.apply(logits, target, ignore_index, reduction, inplace)
