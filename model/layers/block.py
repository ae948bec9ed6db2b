"""A transformer block as one autograd function: its modules' launches in one list, those of their backward in another.

With x the residual stream [M, C] of M = B T rows, y = ln_1(x), and next the norm behind the block:

    qkv = y Wa + ba              h = y2 Wf
    o   = attention(qkv)         g = gelu(h + bf)
    x2  = x + drop(o Wp + bp)    x3 = x2 + drop(g Wm + bm)
    y2  = ln_2(x2)               y3 = next(x3)

    backward, from dx3 and dy3, each line in the opposite direction:

    dx2, dm = dnext(dy3) + dx3, and the same through dropout's mask      dWm = g^T dm,  dbm = sum dm,  dg = dm Wm^T
    dh, dbf = dgelu(dg)                                                  dWf = y2^T dh,               dy2 = dh Wf^T
    dx, dp  = dln_2(dy2) + dx2, and the same through dropout's mask      dWp = o^T dp,  dbp = sum dp,  do = dp Wp^T
    dqkv    = dattention(do)                                             dWa = y^T dqkv, dba = sum dqkv, dy = dqkv Wa^T

Module by module the host spends more on Python, the dispatcher and autograd's nodes than on launches. Here are the same
launches in the same order, on the same values, so results and gradients have the bits that the modules give, dropout's
seeds too, but for three gradients: dbp, dbm and dba are sums over the rows that a norm's or attention's backward has
just computed, and are taken there, in fp32, where modules leave them to a pass of PyTorch's over d or dqkv (27 us each
on an H100 for d, 24 a step of GPT-2 124M). The order differs; ours err no more (tests/model/test_block.py), and under
autocast less: theirs are rounded to two bytes before autograd makes fp32 of them. A module cannot do the same: its bias
is added on the other side of a boundary at which anybody may look.

Saved are y, qkv, o, y2, x2, h, g, x3 (17 C a row) and the statistics, as the modules save them.

Under autocast x and the weights are fp32 and all else is of autocast's dtype. The gradients of matrices are then the
fp32 sums of their products, which modules round to two bytes first.

Each launch is worked out once for a geometry and bound. Who must see a module or an operation gets it: blocks.py.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from kernels.attention.choice import PackedAttention
from kernels.checks import check_dropout, refuse_second_derivative
from kernels.configs import GELU_TILE
from kernels.gelu import _launch_backward as _launch_gelu_backward
from kernels.gelu import _launch_forward as _launch_gelu
from kernels.launch import Bound, here
from kernels.layer_norm import _backward_config, _programs
from kernels.layer_norm import _launch_backward_in_one as _launch_norm_backward
from kernels.layer_norm import _launch_forward_in_one as _launch_norm
from kernels.layer_norm import _launch_weight_gradients_in_one as _launch_weight_gradients
from kernels.library import without_autocast
from kernels.rows import PARTIAL_ROWS, _launch_column_sums, even_rows


class Numbers(NamedTuple):
    """What a block is beside its weights: its place, heads, attention's scale, dropout rates, both norms' eps."""

    layer: int
    num_heads: int
    scale: float
    attn_p: float
    resid_p: float
    mlp_p: float
    eps2: float
    eps3: float


class Launches:
    """A block's launches for x [B, T, C], N columns in its middle and products in `dtype`.

    The dtypes of x and of the vectors, and whether there is padding, must always be the same, too. vectors: the dtype
    that all vectors have, or fp32.

    Two tensors of fp32 hold all that is small. `stats`: attention's log-sum-exp, and from stats2_at and stats3_at on
    what the norms keep. `scratch`: what attention's backward hands from kernel to kernel, and the partial sums of which
    one launch makes the gradients of all vectors.
    """

    def __init__(self, B, T, C, N, dtype, numbers, padded, vectors):
        _, num_heads, scale, attn_p, resid_p, mlp_p, eps2, eps3 = numbers
        M = B * T
        self.vectors = vectors
        self.attention = PackedAttention(B, T, C, num_heads, dtype, scale, attn_p, padded)
        stats2_at = _aligned(num_heads * M)
        stats3_at = stats2_at + _aligned(3 * M)
        self.stats = stats3_at + 3 * M
        self.norm2 = Bound(_launch_norm, M, C, C, C, eps2, resid_p, stats2_at)
        self.norm3 = Bound(_launch_norm, M, C, C, C, eps3, mlp_p, stats3_at)
        self.gelu = Bound(_launch_gelu, M, N, N)

        programs = min(PARTIAL_ROWS, -(-M // GELU_TILE.BLOCK_M))
        norm = (3, _programs(M, C), C)
        groups = [*self.attention.partial, norm, (1, programs, N), norm]  # partial sums: [K, P, N] each
        places = list(accumulate((K * P * N for K, P, N in groups), initial=self.attention.partial_at))
        self.scratch = places[-1]
        self.dnorm3 = _NormBackward(M, C, C, mlp_p, stats3_at, places[2])
        self.dnorm3_alone = _NormBackward(M, C, 0, mlp_p, stats3_at, places[2])  # where nobody but the norm used x3
        self.dgelu = Bound(_launch_gelu_backward, M, N, N, N, programs, places[3])
        self.dnorm2 = _NormBackward(M, C, C, resid_p, stats2_at, places[4])
        # By how far backward goes: behind norm3, gelu, norm2, attention. The numbers are those of the weights.
        vectors = [(10, C), (11, C), (9, C), (7, N), (4, C), (5, C), (3, C)]  # w3, b3, bm; bf; w2, b2, bp
        self.sums = [_Sums(places[2], groups[2 : 2 + i], vectors[:n]) for i, n in ((1, 3), (2, 4), (3, 7))]
        self.sums.append(_Sums(places[0], groups, [(1, 3 * C), *vectors]))


class _Sums:
    """The gradients of vectors [(which of the weights, length)], from groups of partial sums that begin at `first`."""

    def __init__(self, first, groups, vectors):
        self.launch = Bound(_launch_column_sums, first, *groups)
        self.which, self.lengths = zip(*vectors)
        self.size = sum(self.lengths)

    def __call__(self, place, scratch, dtype, grads):
        """Writes them into the list grads."""
        sums = scratch.new_empty(self.size, dtype=dtype)
        self.launch(place, scratch, sums)
        for i, part in zip(self.which, sums.split_with_sizes(self.lengths)):
            grads[i] = part


def _aligned(size):
    """The next multiple of 16 bytes, in numbers of fp32."""
    return -(-size // 4) * 4


class _NormBackward:
    """add_layer_norm's backward for rows [M, C]; stats_at, partial_at: where its numbers begin in stats and scratch."""

    def __init__(self, M, C, stride_dtotal, dropout_p, stats_at, partial_at):
        places = stats_at, partial_at
        self.rows = Bound(_launch_norm_backward, M, C, C, stride_dtotal, C, dropout_p, True, *places)
        wide = not _backward_config(C).SUMS
        self.weights = Bound(_launch_weight_gradients, M, C, C, C, *places) if wide else None

    def __call__(self, place, dy, dtotal, total, weight, stats, seed, dresidual, scratch):
        """Fills dresidual [M, C], and returns d [M, C], which is that through dropout's mask and in dy's dtype."""
        d = None
        if seed is not None or dy.dtype is not total.dtype:
            d = torch.empty_like(dresidual, dtype=dy.dtype)
        self.rows(place, dy, dtotal, total, weight, stats, stats, seed, dresidual, d, scratch)
        d = dresidual if d is None else d
        if self.weights is not None:
            self.weights(place, dy, total, stats, stats, d, scratch)
        return d


def forward(x, y, weights, numbers, launches, attend, saved):
    """(x3, y3) from x and y, all [B, T, C]. What backward needs is appended to `saved`, unless that is None."""
    Wa, ba, Wp, bp, w2, b2, Wf, bf, Wm, bm, w3, b3 = weights
    _, _, _, attn_p, resid_p, mlp_p, _, _ = numbers
    if Wa.dtype is not y.dtype:  # autocast
        Wa, ba, Wp, bp, Wf, Wm, bm = _cast((Wa, ba, Wp, bp, Wf, Wm, bm), y.dtype)
    place = here()
    rows = y.view(-1, y.shape[-1])  # [M, C]
    stats = rows.new_empty(launches.stats, dtype=torch.float32)

    qkv = torch.addmm(ba, rows, Wa)  # [M, 3C]
    seed = check_dropout("flash_attention", qkv, attn_p, None)
    o = attend(place, rows, qkv, stats, numbers, launches, seed)  # [M, C]
    update = torch.addmm(bp, o, Wp)
    if saved is not None:
        saved += (Wa, Wp, w2, Wf, bf, Wm, w3, *attend.bounds, rows, stats, qkv, o, seed)
    del rows, qkv, o

    seed = check_dropout("add_layer_norm", update, resid_p, None)
    x2, y2 = torch.empty_like(update, dtype=x.dtype), torch.empty_like(update)
    launches.norm2(place, update, x, w2, b2, seed, x2, y2, stats, stats)
    h = torch.mm(y2, Wf)  # [M, N]
    g = torch.empty_like(h)
    launches.gelu(place, h, bf, g)
    if saved is not None:
        saved += (y2, x2, seed, h, g)
    del y2, h
    update = torch.addmm(bm, g, Wm)
    del g

    seed = check_dropout("add_layer_norm", update, mlp_p, None)
    x3, y3 = torch.empty_like(x), torch.empty_like(y)
    launches.norm3(place, update, x2, w3, b3, seed, x3, y3, stats, stats)
    if saved is not None:
        saved += (x3, seed)
    return x3, y3


def _cast(weights, dtype):
    """The weights in dtype, in one launch."""
    results = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(results, weights)
    return results


def _linear_backward(d, x, weight, dtype, needs_x, needs_weight):
    """(dx, dweight) of x weight + bias, from d [M, N] and x [M, K]; None for what is not needed. dtype: of dweight."""
    dx = linear(d, weight) if needs_x else None
    if needs_x and dx.dtype is not d.dtype:  # backward under autocast, where autograd casts what it hands on
        dx = dx.to(d.dtype)
    return dx, _weight_gradient(d, x, dtype) if needs_weight else None


def _weight_gradient(d, x, dtype):
    """x^T d in the weight's own dtype: under autocast the product's fp32 sums, which no rounding to two bytes and no
    pass that undoes it come between."""
    if dtype is d.dtype:
        return torch.mm(x.t(), d)
    if x.is_cuda:
        return torch.mm(x.t(), d, out_dtype=dtype)
    with without_autocast(x):
        return torch.mm(x.t().to(dtype), d.to(dtype))


class BlockFunction(torch.autograd.Function):
    """(x3, y3) from x and y, all [B, T, C]; the rest is forward's."""

    @staticmethod
    def forward(ctx, x, y, numbers, launches, attend, *weights):
        saved = []
        outputs = forward(x, y, weights, numbers, launches, attend, saved)
        ctx.save_for_backward(*saved)
        ctx.launches, ctx.dtypes = launches, [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)  # where only y3 is used, no zeros are read for x3
        return outputs

    @staticmethod
    def backward(ctx, dx, dy):
        refuse_second_derivative("GPT2's block")
        launches, dtypes, place = ctx.launches, ctx.dtypes, here()
        Wa, Wp, w2, Wf, bf, Wm, w3, kv_start, kv_end, *saved = ctx.saved_tensors
        y, stats, qkv, o, attn_seed, y2, x2, resid_seed, h, g, x3, mlp_seed = saved
        needs_x, needs_y, _, _, _, *needs = ctx.needs_input_grad
        needs_qkv = needs_y or True in needs[:2]
        needs_ln_2 = needs_x or needs_qkv or True in needs[2:6]  # ln_2's gradients, or some that are behind it
        needs_gelu = needs_ln_2 or True in needs[6:8]
        grads = [None] * 12  # of the weights
        scratch = stats.new_empty(launches.scratch)

        dy = torch.zeros_like(x3, dtype=y.dtype) if dy is None else even_rows(dy)
        dx = None if dx is None else even_rows(dx)
        launch = launches.dnorm3_alone if dx is None else launches.dnorm3
        dx2 = torch.empty_like(x2)
        d = launch(place, dy, dx, x3, w3, stats, mlp_seed, dx2, scratch)
        d, grads[8] = _linear_backward(d, g, Wm, dtypes[8], needs_gelu, needs[8])  # [M, N]
        if needs_gelu:
            dh = torch.empty_like(h)
            launches.dgelu(place, d, h, bf, dh, scratch)
            d, grads[6] = _linear_backward(dh, y2, Wf, dtypes[6], needs_ln_2, needs[6])  # [M, C]
        if needs_ln_2:
            dx = torch.empty_like(x2)
            d = launches.dnorm2(place, d, dx2, x2, w2, stats, resid_seed, dx, scratch)
            d, grads[2] = _linear_backward(d, o, Wp, dtypes[2], needs_qkv, needs[2])
        if needs_qkv:
            dqkv = launches.attention.backward(place, d, qkv, o, stats, scratch, kv_start, kv_end, attn_seed)
            d, grads[0] = _linear_backward(dqkv, y, Wa, dtypes[0], needs_y, needs[0])
        launches.sums[needs_gelu + needs_ln_2 + needs_qkv](place, scratch, launches.vectors, grads)
        return dx.view(x3.shape) if needs_x else None, d.view(x3.shape) if needs_y else None, None, None, None, *grads
