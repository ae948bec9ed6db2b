"""A row of logits in a kernel: its softmax's statistics, its loss and its gradient, with every option of the loss.

With x_j = softcap tanh(z_j / softcap) for the logits z where there is a softcap, lse = log sum_j exp(x_j), class
weights w (1 unless given), label smoothing s and z-loss a, over V columns:

    loss     = (1 - s) w_t (lse - x_t) + s / V sum_j w_j (lse - x_j) + a lse^2,   t the target
    dloss/dx = whole p_j - hot [j = t] - cold w_j,    p_j = exp(x_j - lse)
               hot = (1 - s) w_t,  cold = s / V,  whole = hot + cold sum_j w_j + 2 a lse
    dx/dz    = 1 - tanh^2(z / softcap)

Where the mean over targets is taken, torch divides the first two terms by the targets' summed weights, and Liger the
third by their number n: a row's first terms are therefore multiplied by ratio = n / (summed weights), and then all by
1 / n. So class weights of any size leave gradients within the range of fp16.
"""

import triton
import triton.language as tl

from kernels.library import LN2, LOG2E

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
def _tanh(u):
    """tanh to a few units in the last place: a series where 1 - exp(-2 |u|) would cancel."""
    e = tl.exp2(tl.abs(u) * (-2.0 * _LOG2E))
    u2 = u * u
    series = 1.0 + u2 * (-1.0 / 3.0 + u2 * (2.0 / 15.0 + u2 * (-17.0 / 315.0 + u2 * (62.0 / 2835.0))))
    size = tl.where(u2 < 0.0625, tl.abs(u) * series, (1.0 - e) / (1.0 + e))
    return tl.where(u < 0.0, -size, size)


@triton.jit
def _capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits as the softmax takes them, fp32."""
    x = z.to(tl.float32)
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _accumulate(m_i, l_i, x):
    """Takes x [UNROLL, LANES, VEC] fp32 into the maximum m_i and the sum l_i of exp(x - m_i), both [LANES]."""
    m_new = tl.maximum(m_i, tl.max(tl.max(x, 2), 0))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a thread may have seen nothing but -inf
    p = tl.exp2((x - shift[None, :, None]) * _LOG2E)
    return m_new, l_i * tl.exp2((m_i - shift) * _LOG2E) + tl.sum(tl.sum(p, 2), 0)


@triton.jit
def _class_weights(class_weight_ptr, offs, inside):
    """w at the columns offs, fp32; 1 without class weights, 0 outside."""
    if class_weight_ptr is None:
        w = inside.to(tl.float32)
    else:
        w = tl.load(class_weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    return w


@triton.jit
def _weighted_sum(x, class_weight_ptr, offs, V: tl.constexpr):
    """sum_j w_j x_j of a tile over the columns that lie in the row, [LANES]."""
    inside = offs < V
    terms = tl.where(inside, x, 0.0)
    if class_weight_ptr is not None:
        terms *= _class_weights(class_weight_ptr, offs, inside)
    return tl.sum(tl.sum(terms, 2), 0)


@triton.jit
def _row_statistics(
    row_ptr,  # [V]
    class_weight_ptr,  # [V], or None
    anchor,
    softcap,
    V: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """m and l of a row of V logits and, with smoothing, sum_j w_j (x_j - anchor)."""
    BLOCK: tl.constexpr = UNROLL * LANES * VEC
    columns = _columns(UNROLL, LANES, VEC)
    m_i = tl.full([LANES], float("-inf"), tl.float32)
    l_i = tl.zeros([LANES], tl.float32)
    d_i = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V - BLOCK + 1, BLOCK):
        x = _capped(tl.load(row_ptr + start + columns), softcap, HAS_SOFTCAP)  # [UNROLL, LANES, VEC]
        m_i, l_i = _accumulate(m_i, l_i, x)
        if HAS_SMOOTHING:
            d_i += _weighted_sum(x - anchor, class_weight_ptr, start + columns, V)
    if V % BLOCK:
        offs = V // BLOCK * BLOCK + columns
        x = _capped(tl.load(row_ptr + offs, mask=offs < V, other=float("-inf")), softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            x = tl.where(offs < V, x, float("-inf"))
        m_i, l_i = _accumulate(m_i, l_i, x)
        if HAS_SMOOTHING:
            d_i += _weighted_sum(x - anchor, class_weight_ptr, offs, V)
    m = tl.max(m_i, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    return m, tl.sum(l_i * tl.exp2((m_i - m) * _LOG2E), 0), tl.sum(d_i, 0)


@triton.jit
def _target_weight(class_weight_ptr, target, V: tl.constexpr):
    """w_t, 1 without class weights; a target outside the row reads nothing."""
    w = 1.0
    if class_weight_ptr is not None:
        w = tl.load(class_weight_ptr + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    return w


@triton.jit
def _row_loss(
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
    V: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
):
    """A row's loss from its statistics: see above."""
    log_l = tl.log2(l) * _LN2
    loss = w_target * (m - x_target + log_l)
    if HAS_SMOOTHING:
        smooth = total_weight * (m - anchor + log_l) - d  # sum_j w_j (lse - x_j)
        loss = loss * (1.0 - label_smoothing) + label_smoothing / V * smooth
    loss *= ratio
    if HAS_Z_LOSS:
        lse = m + log_l
        loss += lse_square_scale * lse * lse
    return loss


@triton.jit
def _gradient_tile(
    z,
    offs,
    target,
    m,
    whole,
    hot,
    cold,
    softcap,
    class_weight_ptr,  # [V], or None
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """whole exp(x - m) - hot [offs = target] - cold w, times dx/dz."""
    x = _capped(z, softcap, HAS_SOFTCAP)
    p = tl.exp2((x - m) * _LOG2E) * whole
    if HAS_SMOOTHING:
        p -= cold * _class_weights(class_weight_ptr, offs, offs < V)
    gradient = tl.where(offs == target, p - hot, p)
    if HAS_SOFTCAP:
        e = tl.exp2(tl.abs(z.to(tl.float32) / softcap) * (-2.0 * _LOG2E))
        gradient *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    return gradient


@triton.jit
def _write_gradient(
    row_ptr,  # [V]
    gradient_ptr,  # [V]
    class_weight_ptr,  # [V], or None
    target,
    w_target,
    m,
    l,
    ratio,
    total_weight,
    scale,
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
    """Stores the row's gradient times scale; gradient_ptr may be row_ptr."""
    BLOCK: tl.constexpr = UNROLL * LANES * VEC
    columns = _columns(UNROLL, LANES, VEC)
    dtype: tl.constexpr = gradient_ptr.dtype.element_ty
    hot = w_target * ratio * scale
    whole = hot
    cold = 0.0
    if HAS_SMOOTHING:
        hot *= 1.0 - label_smoothing
        cold = label_smoothing / V * ratio * scale
        whole = hot + cold * total_weight
    if HAS_Z_LOSS:
        whole += 2.0 * lse_square_scale * (m + tl.log2(l) * _LN2) * scale
    whole /= l
    for start in tl.range(0, V - BLOCK + 1, BLOCK):
        offs = start + columns
        z = tl.load(row_ptr + offs)  # [UNROLL, LANES, VEC]
        gradient = _gradient_tile(
            z, offs, target, m, whole, hot, cold, softcap, class_weight_ptr, V, HAS_SOFTCAP, HAS_SMOOTHING
        )
        tl.store(gradient_ptr + offs, gradient.to(dtype))
    if V % BLOCK:
        offs = V // BLOCK * BLOCK + columns
        z = tl.load(row_ptr + offs, mask=offs < V, other=0.0)  # [UNROLL, LANES, VEC]
        gradient = _gradient_tile(
            z, offs, target, m, whole, hot, cold, softcap, class_weight_ptr, V, HAS_SOFTCAP, HAS_SMOOTHING
        )
        tl.store(gradient_ptr + offs, gradient.to(dtype), mask=offs < V)


@triton.jit
def _write_zeros(gradient_ptr, V: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """A row of zeros."""
    zeros = tl.zeros([UNROLL, LANES, VEC], gradient_ptr.dtype.element_ty)
    for start in tl.range(0, V, UNROLL * LANES * VEC):
        offs = start + _columns(UNROLL, LANES, VEC)
        tl.store(gradient_ptr + offs, zeros, mask=offs < V)
