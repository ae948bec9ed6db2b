"""GPT-2's GELU, alone or with the bias of the projection before it, forward and backward.

    u    = x + bias                                bias where there is one
    y    = 0.5 u (1 + tanh(w)),  w = sqrt(2/pi) (u + 0.044715 u^3)
         = u s,                  s = sigmoid(2 w)
    dx   = dy (s + u s (1 - s) 2 w'),  2 w' = 2 sqrt(2/pi) (1 + 3 * 0.044715 u^2)
    dbias = sum over rows of dx

(Hendrycks and Gimpel, 2016, section 2.) The sigmoid in place of the tanh costs one exp2 and one division, and loses no
digits where the tanh is close to -1. Everything is fp32 in registers, and no infinity meets a zero for large |u|.

Bytes, least, for M rows of N columns of e bytes: forward 2 M N e, backward 3 M N e, and 2 N e for bias and dbias. Above
that the kernels read the bias once per tile and write and read P N fp32 of partial sums, P at most rows.PARTIAL_ROWS.
FLOPs: about 10 a forward element, 20 a backward one; memory decides.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_device, check_dtype, check_tensor, once, refuse_second_derivative
from kernels.configs import GELU_TILE
from kernels.launch import Launcher
from kernels.library import LOG2E, define_op, needs_graph
from kernels.reference import SQRT_2_OVER_PI
from kernels.rows import (
    PARTIAL_ROWS,
    _store_partial,
    _sum_of_rows,
    as_rows,
    check_vector,
    column_sums,
    empty_rows,
    even_rows,
    row_stride,
)

_CUBIC = tl.constexpr(0.044715)
_TWO_SQRT_2_OVER_PI = tl.constexpr(2 * SQRT_2_OVER_PI)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _exp_minus_two_w(u):
    """exp(-2 w): 0 for large u, infinity for large negative ones."""
    return tl.exp2(u * (-_TWO_SQRT_2_OVER_PI * _LOG2E - _TWO_SQRT_2_OVER_PI * _LOG2E * _CUBIC * u * u))


@triton.jit
def _gelu(u):
    """u s, with s = sigmoid(2 w)."""
    return u * (1.0 / (1.0 + _exp_minus_two_w(u)))


@triton.jit
def _gelu_gradient(u):
    """dy/du."""
    # The slope is 0 or 1 to 1e-35 beyond 10, and e below is finite within; NaN stays NaN.
    u = tl.maximum(u, -10.0, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(u, 10.0, propagate_nan=tl.PropagateNan.ALL)
    e = _exp_minus_two_w(u)
    s = 1.0 / (1.0 + e)
    return s + u * (e * s) * s * (_TWO_SQRT_2_OVER_PI + 3.0 * _TWO_SQRT_2_OVER_PI * _CUBIC * u * u)  # 1 - s = e s


@triton.jit
def _gelu_forward_kernel(
    x_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    stride_x,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_m.to(tl.int64)[:, None]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    u = tl.load(x_ptr + rows * stride_x + offs_n[None, :], mask=mask).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        u += tl.load(bias_ptr + offs_n, mask=offs_n < N)[None, :].to(tl.float32)  # [1, BLOCK_N]
    y = _gelu(u).to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptr + rows * N + offs_n[None, :], y, mask=mask)  # [BLOCK_M, BLOCK_N]


@triton.jit
def _gelu_backward_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    dx_ptr,  # [M, N]
    partial_ptr,  # [1, programs, N] fp32: dbias; or None
    stride_dy,
    stride_x,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias = tl.zeros([1, BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N)[None, :].to(tl.float32)  # [1, BLOCK_N]
    for m in tl.range(p * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        dy = tl.load(dy_ptr + rows * stride_dy + offs_n[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        u = tl.load(x_ptr + rows * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32) + bias
        dx = dy.to(tl.float32) * _gelu_gradient(u)  # [BLOCK_M, BLOCK_N]
        tl.store(dx_ptr + rows * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    if bias_ptr is not None:
        _store_partial(partial_ptr, _sum_of_rows(dbias), 0, p, tl.num_programs(0), offs_n, N)  # [BLOCK_N]


_CONSTANTS = {
    "BLOCK_M": GELU_TILE.BLOCK_M,
    "BLOCK_N": GELU_TILE.BLOCK_N,
    "num_warps": GELU_TILE.num_warps,
    "enable_fp_fusion": True,
}


def _forward_plan(M, N, stride_x):
    return (triton.cdiv(M, GELU_TILE.BLOCK_M), triton.cdiv(N, GELU_TILE.BLOCK_N)), (stride_x, M, N), _CONSTANTS, {}


def _backward_plan(M, N, stride_dy, stride_x, programs, partial_at=0):
    """partial_at: the element at which the partial sums begin."""
    grid = programs, triton.cdiv(N, GELU_TILE.BLOCK_N)
    return grid, (stride_dy, stride_x, M, N), _CONSTANTS, {4: partial_at} if partial_at else {}


_launch_forward = Launcher(_gelu_forward_kernel, _forward_plan)
_launch_backward = Launcher(_gelu_backward_kernel, _backward_plan)


def _launch_gelu_forward(x, bias):
    """y [..., N]."""
    y = empty_rows(x)
    if y.numel():
        N = x.shape[-1]
        _launch_forward((x, bias, y), y.numel() // N, N, row_stride(x))
    return y


def _launch_gelu_backward(dy, x, bias):
    """dx [..., N], and dbias [N] where there is a bias, else None."""
    N = x.shape[-1]
    M = x.numel() // N
    dx = empty_rows(x)
    programs = -(-M // GELU_TILE.BLOCK_M)
    partial = None
    if bias is not None:
        programs = min(PARTIAL_ROWS, programs)
        partial = x.new_empty((1, programs, N), dtype=torch.float32)
    if M:
        _launch_backward((dy, x, bias, dx, partial), M, N, row_stride(dy), row_stride(x), programs)
    return dx, None if bias is None else column_sums(partial, bias.dtype).view(N)


def _forward(x):
    check_device("gelu", x, "x")
    return _launch_gelu_forward(x, None)


def _forward_fake(x):
    return x.new_empty(x.shape)


def _backward(dy, x):
    return _launch_gelu_backward(dy, x, None)[0]


def _backward_fake(dy, x):
    return x.new_empty(x.shape)


def _bias_forward(x, bias):
    check_device("bias_gelu", x, "x")
    return _launch_gelu_forward(x, bias)


def _bias_forward_fake(x, bias):
    return x.new_empty(x.shape)


def _bias_backward_fake(dy, x, bias):
    return x.new_empty(x.shape), torch.empty_like(bias)


gelu_forward = define_op("gelu_forward(Tensor x) -> Tensor", _forward, _forward_fake)
gelu_backward = define_op("gelu_backward(Tensor dy, Tensor x) -> Tensor", _backward, _backward_fake)
bias_gelu_forward = define_op("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor", _bias_forward, _bias_forward_fake)
bias_gelu_backward = define_op(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    _launch_gelu_backward,
    _bias_backward_fake,
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gelu_forward(x)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("gelu")
        return gelu_backward(even_rows(dy), *ctx.saved_tensors)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x, bias)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("bias_gelu")
        return bias_gelu_backward(even_rows(dy), *ctx.saved_tensors)


@once
def _check(tensors):
    x, bias = tensors
    function = "gelu" if bias is None else "bias_gelu"
    as_rows(function, x, "x")
    check_dtype(function, x, "x")
    if bias is not None:
        check_vector(function, x, "x", bias, "bias", may_be_fp32=True)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form by a Triton kernel, differentiable once. Hendrycks and Gimpel, 2016, section 2.

    x: [..., N], fp16, bf16 or fp32, rows evenly spaced in memory and of unit stride (they are read in place).
    Returns y with x's shape and dtype, contiguous; arithmetic is fp32.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    _check((x, None))
    return _Gelu.apply(x) if needs_graph(x) else gelu_forward(x)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x + bias) in one pass, and backward dbias with dx in one pass.

    x: as for gelu; bias: [N], of x's dtype, or fp32 beside an x of two bytes, as in mixed precision.
    """
    check_tensor("bias_gelu", bias, "bias")
    _check((x, bias))
    return _BiasGelu.apply(x, bias) if needs_graph(x, bias) else bias_gelu_forward(x, bias)
