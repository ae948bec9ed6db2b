"""LayerNorm, alone or with the residual addition before it, forward and backward.

    total  = residual + dropout(x)                   x itself where there is no residual
    y_j  = (sum_j - mean) rstd weight_j + bias_j   mean over the N columns, rstd = 1 / sqrt(variance + eps)

and with  x_hat = (total - mean) rstd,  g = weight dy,  both [N]:

    dtotal    = rstd (g - mean(g) - x_hat mean(g x_hat)) + what flows into total from elsewhere
    dweight = sum over rows of dy x_hat,  dbias = sum over rows of dy

and, where x is a projection's result and its bias wants a gradient, the sum over rows of dx, too: the kernel has just
computed dx. It is summed in fp32 as it is stored, rounded, so that it is what a pass over dx would find, with one
rounding in place of a whole sum's.

(Ba, Kiros and Hinton, 2016.) Rows stay in registers between their statistics and their use, so each tensor crosses
memory once. Statistics are fp32 and the variance is a second pass over centred values. The mean of the centred values,
zero but for rounding, is subtracted and stored as well (mean is a pair: [2, M]), so that a row of mean 1e4 and spread
1e-2 loses nothing to its mean, forward or backward.

Bytes, least, for M rows of e bytes an element: forward 2 M N e (add: 4 M N e), weight, bias 2 N e, mean, rstd 12 M;
backward 3 M N e (4 with a second gradient into total, one more with dropout), weight, dweight, dbias 3 N e, mean, rstd
12 M. Above that the kernels read weight and bias once per program, and write and read 2 P N fp32 of partial sums, P at
most PARTIAL_ROWS. FLOPs: about 8 a forward element, 12 a backward one; memory decides.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from kernels.checks import (
    FLOATS,
    check_device,
    check_dropout,
    check_dtype,
    check_number,
    check_same,
    check_tensor,
    once,
    refuse_second_derivative,
)
from kernels.configs import row_config
from kernels.dropout import dropout_mask, dropout_numbers
from kernels.launch import Launcher
from kernels.library import define_op, needs_graph
from kernels.rows import (
    _load_tile,
    _load_vector_tile,
    _store_partial,
    _store_tile,
    _sum_of_rows,
    as_rows,
    check_vector,
    column_sums,
    empty_rows,
    even_rows,
    row_stride,
)

MAX_WIDTH = 16384
PARTIAL_ROWS = 264  # programs that share the rows in backward: two for each multiprocessor of an H100


@triton.jit
def _dropout(
    x, seed_ptr, offs_m, keep_scale, drop_below, i: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Column tile i of rows offs_m after dropout, whose mask depends on the seed, the row and the column alone."""
    keep = dropout_mask(tl.load(seed_ptr), offs_m, i * BLOCK_N, drop_below, BLOCK_M, BLOCK_N)
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit
def _layer_norm_forward_kernel(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    seed_ptr,  # [1] int64 or None
    total_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    mean_ptr,  # [2, M] fp32: the mean, and what rounding left in it
    rstd_ptr,  # [M] fp32
    stride_x,
    stride_residual,
    M,
    eps,
    keep_scale,
    drop_below,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles = ()
    weight = ()
    bias = ()
    for i in tl.static_range(COLUMN_TILES):
        x = _load_tile(x_ptr, offs_m, stride_x, M, i, N, BLOCK_N).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if residual_ptr is not None:
            residual = _load_tile(residual_ptr, offs_m, stride_residual, M, i, N, BLOCK_N)  # [BLOCK_M, BLOCK_N]
            if seed_ptr is not None:
                x = _dropout(x, seed_ptr, offs_m, keep_scale, drop_below, i, BLOCK_M, BLOCK_N)
            # y is the norm of the stored total, which backward reads.
            x = (residual.to(tl.float32) + x).to(total_ptr.dtype.element_ty)
            _store_tile(total_ptr, x, offs_m, N, M, i, N, BLOCK_N)  # [BLOCK_M, BLOCK_N]
            x = x.to(tl.float32)
        tiles += (x,)
        weight += (_load_vector_tile(weight_ptr, i, N, BLOCK_N),)  # [1, BLOCK_N]
        bias += (_load_vector_tile(bias_ptr, i, N, BLOCK_N),)  # [1, BLOCK_N]

    acc = tiles[0]
    for i in tl.static_range(1, COLUMN_TILES):
        acc += tiles[i]
    mean = tl.sum(acc, 1) / N  # [BLOCK_M]

    centred = ()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(COLUMN_TILES):
        x = tiles[i] - mean[:, None]
        if (i + 1) * BLOCK_N > N:
            x = tl.where((i * BLOCK_N + tl.arange(0, BLOCK_N) < N)[None, :], x, 0.0)
        centred += (x,)
        acc += x
        squares += x * x
    rest = tl.sum(acc, 1) / N  # [BLOCK_M], what rounding left in the mean
    rstd = tl.rsqrt(tl.sum(squares, 1) / N - rest * rest + eps)  # [BLOCK_M]

    for i in tl.static_range(COLUMN_TILES):
        x_hat = (centred[i] - rest[:, None]) * rstd[:, None]
        y = x_hat * weight[i].to(tl.float32) + bias[i].to(tl.float32)
        _store_tile(y_ptr, y, offs_m, N, M, i, N, BLOCK_N)  # [BLOCK_M, BLOCK_N]
    tl.store(mean_ptr + offs_m, mean, mask=offs_m < M)
    tl.store(mean_ptr + M + offs_m, rest, mask=offs_m < M)
    tl.store(rstd_ptr + offs_m, rstd, mask=offs_m < M)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr,  # [M, N]
    dtotal_ptr,  # [M, N] or None
    x_ptr,  # [M, N]: total, or x where there is no residual
    weight_ptr,  # [N]
    mean_ptr,  # [2, M] fp32
    rstd_ptr,  # [M] fp32
    seed_ptr,  # [1] int64 or None
    dresidual_ptr,  # [M, N]
    dx_ptr,  # [M, N] or None
    partial_ptr,  # [2, programs, N] fp32: dweight, dbias; with SUM_D [3, programs, N], the sums of dx behind them
    stride_dy,
    stride_dtotal,
    stride_x,
    M,
    keep_scale,
    drop_below,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    SUMS: tl.constexpr,
    SUM_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    weight = ()
    dweight = ()
    dbias = ()
    sum_d = ()
    for i in tl.static_range(COLUMN_TILES):
        weight += (_load_vector_tile(weight_ptr, i, N, BLOCK_N),)  # [1, BLOCK_N]
        if SUMS:
            dweight += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
            dbias += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
            if SUM_D:
                sum_d += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)

    for m in tl.range(pid * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        offs_m = m + tl.arange(0, BLOCK_M)
        mean = tl.load(mean_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        rest = tl.load(mean_ptr + M + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]

        x_hat = ()
        g = ()
        dweight_before = dweight
        dbias_before = dbias
        sum_d_before = sum_d
        dweight = ()
        dbias = ()
        sum_d = ()
        total_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total_gx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(COLUMN_TILES):
            dy = _load_tile(dy_ptr, offs_m, stride_dy, M, i, N, BLOCK_N).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            x = _load_tile(x_ptr, offs_m, stride_x, M, i, N, BLOCK_N).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            x_hat += ((x - mean - rest) * rstd,)
            g += (dy * weight[i].to(tl.float32),)  # zero outside [M, N], as dy is
            total_g += g[i]
            total_gx += g[i] * x_hat[i]
            if SUMS:
                dweight += (dweight_before[i] + dy * x_hat[i],)
                dbias += (dbias_before[i] + dy,)
        mean_g = tl.sum(total_g, 1)[:, None] / N  # [BLOCK_M, 1]
        mean_gx = tl.sum(total_gx, 1)[:, None] / N  # [BLOCK_M, 1]

        for i in tl.static_range(COLUMN_TILES):
            d = (g[i] - mean_g - x_hat[i] * mean_gx) * rstd
            if dtotal_ptr is not None:
                d += _load_tile(dtotal_ptr, offs_m, stride_dtotal, M, i, N, BLOCK_N).to(
                    tl.float32
                )  # [BLOCK_M, BLOCK_N]
            _store_tile(dresidual_ptr, d, offs_m, N, M, i, N, BLOCK_N)  # [BLOCK_M, BLOCK_N]
            if dx_ptr is not None:
                if seed_ptr is not None:
                    d = _dropout(d, seed_ptr, offs_m, keep_scale, drop_below, i, BLOCK_M, BLOCK_N)
                _store_tile(dx_ptr, d, offs_m, N, M, i, N, BLOCK_N)  # [BLOCK_M, BLOCK_N]
            if SUMS and SUM_D:  # what is summed is what is stored
                stored = dresidual_ptr.dtype.element_ty if dx_ptr is None else dx_ptr.dtype.element_ty
                sum_d += (sum_d_before[i] + d.to(stored).to(tl.float32),)

    if SUMS:
        for i in tl.static_range(COLUMN_TILES):
            offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            _store_partial(partial_ptr, _sum_of_rows(dweight[i]), 0, pid, tl.num_programs(0), offs_n, N)
            _store_partial(partial_ptr, _sum_of_rows(dbias[i]), 1, pid, tl.num_programs(0), offs_n, N)
            if SUM_D:
                _store_partial(partial_ptr, _sum_of_rows(sum_d[i]), 2, pid, tl.num_programs(0), offs_n, N)


@triton.jit
def _weight_gradients_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    mean_ptr,  # [2, M] fp32
    rstd_ptr,  # [M] fp32
    d_ptr,  # [M, N], dense, or None
    partial_ptr,  # [2, programs, N] fp32: dweight, dbias; or [3, programs, N], the sums of d behind them
    stride_dy,
    stride_x,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums over rows of BLOCK_N columns alone, where rows are too wide to be kept beside them."""
    p = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in tl.range(p * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        dy = tl.load(dy_ptr + rows * stride_dy + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_M, BLOCK_N]
        x = tl.load(x_ptr + rows * stride_x + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_M, BLOCK_N]
        mean = tl.load(mean_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        rest = tl.load(mean_ptr + M + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        dweight += dy * (x - mean - rest) * rstd
        dbias += dy
        if d_ptr is not None:
            d = tl.load(d_ptr + rows * N + offs_n[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            sum_d += d.to(tl.float32)
    _store_partial(partial_ptr, tl.sum(dweight, 0), 0, p, tl.num_programs(1), offs_n, N)
    _store_partial(partial_ptr, tl.sum(dbias, 0), 1, p, tl.num_programs(1), offs_n, N)
    if d_ptr is not None:
        _store_partial(partial_ptr, tl.sum(sum_d, 0), 2, p, tl.num_programs(1), offs_n, N)


def _constants(config, N):
    return {
        "N": N,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "COLUMN_TILES": config.COLUMN_TILES,
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }


def _forward_plan(M, N, stride_x, stride_residual, eps, dropout_p):
    config = row_config("forward", N)
    numbers = (stride_x, stride_residual, M, eps, *dropout_numbers(dropout_p))
    return (triton.cdiv(M, config.BLOCK_M),), numbers, _constants(config, N), {}


def _backward_plan(M, N, stride_dy, stride_dtotal, stride_x, dropout_p, sum_d):
    config = row_config("backward", N)
    numbers = (stride_dy, stride_dtotal, stride_x, M, *dropout_numbers(dropout_p))
    options = {**_constants(config, N), "SUMS": config.SUMS, "SUM_D": sum_d, "STAGES": config.STAGES}
    return (_programs(M, N),), numbers, options, {}


def _weight_gradients_plan(M, N, stride_dy, stride_x):
    options = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 8, "enable_fp_fusion": True}
    return (triton.cdiv(N, 256), _programs(M, N)), (stride_dy, stride_x, M, N), options, {}


_launch_forward = Launcher(_layer_norm_forward_kernel, _forward_plan)
_launch_backward = Launcher(_layer_norm_backward_kernel, _backward_plan)
_launch_weight_gradients = Launcher(_weight_gradients_kernel, _weight_gradients_plan)


def _in_one(plan, mean, partial=None):
    """The plan where mean and rstd, one behind the other, lie in one tensor, given twice, from an element on that comes
    last in the key; so do the partial sums, from another element on behind that. mean, partial: indices of pointers."""

    def in_one(M, *rest):
        *rest, at, partial_at = (*rest, 0) if partial is None else rest
        offsets = {mean: at, mean + 1: at + 2 * M} | ({} if partial is None else {partial: partial_at})
        return *plan(M, *rest)[:3], offsets

    return in_one


_launch_forward_in_one = Launcher(_layer_norm_forward_kernel, _in_one(_forward_plan, 7))
_launch_backward_in_one = Launcher(_layer_norm_backward_kernel, _in_one(_backward_plan, 4, 9))
_launch_weight_gradients_in_one = Launcher(_weight_gradients_kernel, _in_one(_weight_gradients_plan, 2, 5))
_backward_config = functools.lru_cache(functools.partial(row_config, "backward"))


def _programs(M, N):
    """How many programs share M rows in backward."""
    return min(PARTIAL_ROWS, -(-M // _backward_config(N).BLOCK_M))  # triton.cdiv takes longer than a launch


def _launch_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p, dtype=None):
    """y, and total or None without a residual, [..., N]; mean [2, M] (itself and the rest) and rstd [M], both fp32.

    y is of dtype, or of x's; total of the residual's.
    """
    N = x.shape[-1]
    M = x.numel() // N
    y = empty_rows(x, dtype)
    total = None if residual is None else empty_rows(residual)
    mean, rstd = x.new_empty((2, M), dtype=torch.float32), x.new_empty((M,), dtype=torch.float32)
    if M:
        strides = row_stride(x), 0 if residual is None else row_stride(residual)
        _launch_forward((x, residual, weight, bias, seed, total, y, mean, rstd), M, N, *strides, eps, dropout_p)
    return y, total, mean, rstd


def _launch_layer_norm_backward(dy, dtotal, x, weight, mean, rstd, seed, dropout_p, dx_dtype=None, sum_d=False):
    """dresidual [..., N], dx [..., N], and dweight and dbias as one [2, N]; with sum_d [3, N], behind them the sums of
    dx, as it is stored, over its rows.

    dx, of dx_dtype, is None where it would be dresidual: without a seed, and where dx_dtype is x's or None.
    """
    N = x.shape[-1]
    M = x.numel() // N
    dresidual = empty_rows(x)
    dx = None if seed is None and dx_dtype in (None, x.dtype) else empty_rows(x, dx_dtype)
    partial = x.new_empty((2 + sum_d, _programs(M, N), N), dtype=torch.float32)
    if M:
        stride_dy, stride_x = row_stride(dy), row_stride(x)
        stride_dtotal = 0 if dtotal is None else row_stride(dtotal)
        tensors = (dy, dtotal, x, weight, mean, rstd, seed, dresidual, dx, partial)
        _launch_backward(tensors, M, N, stride_dy, stride_dtotal, stride_x, dropout_p, sum_d)
        if not _backward_config(N).SUMS:
            d = None if not sum_d else dresidual if dx is None else dx
            _launch_weight_gradients((dy, x, mean, rstd, d, partial), M, N, stride_dy, stride_x)
    return dresidual, dx, column_sums(partial, weight.dtype)


def _forward(x, weight, bias, eps, dtype):
    check_device("layer_norm", x, "x")
    y, _, mean, rstd = _launch_layer_norm_forward(x, None, weight, bias, None, eps, 0.0, dtype)
    return y, mean, rstd


def _forward_fake(x, weight, bias, eps, dtype):
    M = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, M), (M,)))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


def _backward(dy, x, weight, mean, rstd):
    dx, _, dparameters = _launch_layer_norm_backward(dy, None, x, weight, mean, rstd, None, 0.0)
    return dx, dparameters


def _backward_fake(dy, x, weight, mean, rstd):
    return x.new_empty(x.shape), weight.new_empty(2, *weight.shape)


def _add_forward(x, residual, weight, bias, seed, eps, dropout_p):
    check_device("add_layer_norm", x, "x")
    return _launch_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p)


def _add_forward_fake(x, residual, weight, bias, seed, eps, dropout_p):
    y, mean, rstd = _forward_fake(x, weight, bias, eps, None)
    return y, residual.new_empty(residual.shape), mean, rstd


def _add_backward(dy, dtotal, total, weight, mean, rstd, seed, dropout_p):
    tensors = dy, dtotal, total, weight, mean, rstd, seed
    dresidual, dx, dparameters = _launch_layer_norm_backward(*tensors, dropout_p, dy.dtype)
    return dresidual, dy.new_empty(0) if dx is None else dx, dparameters


def _add_backward_fake(dy, dtotal, total, weight, mean, rstd, seed, dropout_p):
    dx = dy.new_empty(0 if seed is None and dy.dtype == total.dtype else total.shape)
    return torch.empty_like(total), dx, weight.new_empty(2, *weight.shape)


layer_norm_forward = define_op(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
layer_norm_backward = define_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
add_layer_norm_forward = define_op(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float eps, "
    "float dropout_p) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
)
add_layer_norm_backward = define_op(
    "add_layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor mean, Tensor rstd, "
    "Tensor? seed, float dropout_p) -> (Tensor, Tensor, Tensor)",
    _add_backward,
    _add_backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("layer_norm")
        dx, dparameters = layer_norm_backward(even_rows(dy), *ctx.saved_tensors)
        return dx, *dparameters.unbind(), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p):
        y, total, mean, rstd = add_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p)
        ctx.save_for_backward(total, weight, mean, rstd, seed)
        ctx.dropout_p, ctx.dtype = dropout_p, y.dtype
        ctx.set_materialize_grads(False)  # where only y is used, no zeros are read for total
        return y, total

    @staticmethod
    def backward(ctx, dy, dtotal):
        refuse_second_derivative("add_layer_norm")
        total, *saved, seed = ctx.saved_tensors
        dy = torch.zeros_like(total, dtype=ctx.dtype) if dy is None else even_rows(dy)
        dtotal = None if dtotal is None else even_rows(dtotal)
        dresidual, dx, dparameters = add_layer_norm_backward(dy, dtotal, total, *saved, seed, ctx.dropout_p)
        return dx if dx.numel() else dresidual, dresidual, *dparameters.unbind(), None, None, None


@once
def _check(tensors, eps):
    x, residual, weight, bias = tensors
    function = "layer_norm" if residual is None else "add_layer_norm"
    as_rows(function, x, "x")
    if residual is not None:
        as_rows(function, residual, "residual")
        check_same(function, x, "x", residual, "residual", may_be_fp32=True)
        if x.shape != residual.shape:
            raise ValueError(
                f"{function}: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; they must match"
            )
    check_dtype(function, x, "x")
    N = x.shape[-1]
    if N > MAX_WIDTH:
        raise ValueError(f"{function}: x has width {N}; it must be at most {MAX_WIDTH}")
    check_vector(function, x, "x", weight, "weight", may_be_fp32=True)
    check_vector(function, x, "x", bias, "bias", may_be_fp32=True)
    check_same(function, weight, "weight", bias, "bias")
    check_number(function, eps, "eps", "at least 0 and finite", lambda eps: 0 <= eps < math.inf)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension by a Triton kernel, differentiable once. Ba, Kiros and Hinton, 2016.

    x: [..., N], rows evenly spaced in memory and of unit stride (they are read in place), N from 1 to 16384.
    weight, bias: [N]. fp16, bf16 or fp32, all the same; or weight and bias fp32 beside rows of two bytes, as in mixed
        precision; statistics and arithmetic are fp32.
    dtype: of y: x's unless given, or one of two bytes beside fp32 rows, as mixed precision wants it.
    Returns y with x's shape, contiguous. Its bits depend on the row alone, not on the others.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    _check((x, None, weight, bias), eps)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"layer_norm: dtype is {type(dtype).__name__}; it must be a torch.dtype or None")
    if dtype is not None and (dtype not in FLOATS or x.dtype not in (dtype, torch.float32)):
        raise ValueError(
            f"layer_norm: dtype is {dtype} and x has {x.dtype}; it must be x's, or float16 or bfloat16 beside fp32"
        )
    options = float(eps), dtype
    if needs_graph(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, *options)
    return layer_norm_forward(x, weight, bias, *options)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, total): total = residual + dropout(x), and y its LayerNorm, in one pass; differentiable once.

    x, residual: [..., N] of one shape; otherwise as layer_norm's x. The residual may be fp32 beside an x of two bytes,
        as in mixed precision. total is rounded to the residual's dtype, and y, of x's dtype, is its norm.
    dropout_p: probability that dropout zeroes an element of x, in [0, 1), rounded to a multiple of 1 / 65536.
    dropout_seed: int64 [1] on x's device; drawn from torch's generator there unless given.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    check_tensor("add_layer_norm", residual, "residual")
    _check((x, residual, weight, bias), eps)
    seed = check_dropout("add_layer_norm", x, dropout_p, dropout_seed)
    options = seed, float(eps), float(dropout_p)
    if needs_graph(x, residual, weight, bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, *options)
    return add_layer_norm_forward(x, residual, weight, bias, *options)[:2]
