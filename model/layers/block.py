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
seeds too. Saved are y, qkv, o, y2, x2, h, g, x3 (17 C a row) and the statistics, as the modules save them.

Under autocast x and the weights are fp32 and all else is of autocast's dtype; autograd casts the gradients of weights.

Whoever must see a module or an operation gets the modules: see Blocks and Block.operands.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from kernels.attention import MAX_HEAD_DIM
from kernels.attention.backward import _launch_packed_backward
from kernels.attention.decode import MAX_QUERIES, _launch_attention_decode
from kernels.attention.forward import _launch_attention_forward, _launch_packed_forward
from kernels.attention.ops import Options
from kernels.checks import FLOATS, check_device, check_dropout, dense, once, refuse_second_derivative
from kernels.gelu import _launch_gelu_backward, _launch_gelu_forward
from kernels.layer_norm import MAX_WIDTH, _launch_layer_norm_backward, _launch_layer_norm_forward
from kernels.library import is_plain as is_ordinary
from kernels.library import needs_graph
from kernels.rows import even_rows
from model.attention import get_attention
from model.cache import KVCache
from model.layers import onednn
from model.layers.ops import autocast_dtype, use_triton

_TRITON = get_attention("triton")
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))


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


class _Packed:
    """Attention of tokens over one another; kv_start, kv_end: [B] int32 or None."""

    def __init__(self, kv_start, kv_end):
        self.bounds = dense(kv_start), dense(kv_end)

    def __call__(self, qkv, numbers, seed):
        """o [B, T, C] and lse [B, H, T] from qkv [B, T, 3C]."""
        options = Options(*self.bounds, None, seed, numbers.scale, True, numbers.attn_p)
        return _launch_packed_forward(qkv, numbers.num_heads, options)


class _Cached:
    """Attention of T new tokens over what a KVCache holds, whose rows are equally long, and over one another."""

    def __init__(self, cache, T):
        held, data = cache.get_seq_length(), cache.data  # data: [n_layer, 2, B, H, capacity, D]
        self.slots = data[..., held : held + T, :].unbind()  # each [2, B, H, T, D]
        self.seen = data[..., : held + T, :].flatten(0, 1).unbind()  # keys, values, keys, ...: each [B, H, T_k, D]

    @staticmethod
    def serves(cache, counts, x):
        """Whether KVCache.attend would do no more than that."""
        return (
            type(cache) is KVCache
            and cache.is_uniform
            and cache.starts is None
            and counts == [x.shape[1]] * x.shape[0]
            and (len(x) == 1 or x.device.type != "cpu")  # there rows are attended to one by one
            and not cache.one_query_at_a_time
            and cache.data.device == x.device
            and cache.data.dtype == (autocast_dtype(x) or x.dtype)
        )

    def __call__(self, qkv, numbers, seed):
        """o [B, T, C], and None, from qkv [B, T, 3C], whose keys and values are stored."""
        B, T, three_C = qkv.shape
        H = numbers.num_heads
        parts = qkv.view(B, T, 3, H, three_C // (3 * H)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, D]
        self.slots[numbers.layer].copy_(parts[1:])
        q, keys, values = parts[0], self.seen[2 * numbers.layer], self.seen[2 * numbers.layer + 1]
        options = Options(None, None, None, seed, numbers.scale, True, numbers.attn_p)
        is_decoding = seed is None and T <= MAX_QUERIES and keys.shape[2] > T
        launch = _launch_attention_decode if is_decoding else _launch_attention_forward
        return launch(q, keys, values, options)[0].transpose(1, 2).flatten(2), None


def _forward(x, y, weights, numbers, attend, saved):
    """(x3, y3) from x and y, all [B, T, C]. What backward needs is appended to `saved`, unless that is None."""
    Wa, ba, Wp, bp, w2, b2, Wf, bf, Wm, bm, w3, b3 = weights
    _, _, _, attn_p, resid_p, mlp_p, eps2, eps3 = numbers
    if Wa.dtype is not y.dtype:  # autocast
        Wa, ba, Wp, bp, Wf, Wm, bm = (w.to(y.dtype) for w in (Wa, ba, Wp, bp, Wf, Wm, bm))
    shape = B, T, C = y.shape
    y = y.view(B * T, C)

    qkv = torch.addmm(ba, y, Wa).view(B, T, 3 * C)
    seed = check_dropout("flash_attention", qkv, attn_p, None)
    o, lse = attend(qkv, numbers, seed)  # o: [B, T, C]
    o = o.view(B * T, C)
    update = torch.addmm(bp, o, Wp)
    if saved is not None:
        saved += (Wa, Wp, w2, Wf, bf, Wm, w3, *attend.bounds, y, qkv, o, lse, seed)
    del qkv, o, lse

    seed = check_dropout("add_layer_norm", update, resid_p, None)
    y, x, mean, rstd = _launch_layer_norm_forward(update, x, w2, b2, seed, eps2, resid_p)  # y: [M, C], x: [B, T, C]
    if saved is not None:
        saved += (y, x, mean, rstd, seed)
    h = torch.mm(y, Wf)  # [M, N]
    g = _launch_gelu_forward(h, bf)
    if saved is not None:
        saved += (h, g)
    del y, h
    update = torch.addmm(bm, g, Wm).view(shape)
    del g

    seed = check_dropout("add_layer_norm", update, mlp_p, None)
    y, x, mean, rstd = _launch_layer_norm_forward(update, x, w3, b3, seed, eps3, mlp_p)  # y, x: [B, T, C]
    if saved is not None:
        saved += (x, mean, rstd, seed)
    return x, y


def _linear_backward(d, x, weight, needs_x, needs_weight, needs_bias):
    """(dx, dweight, dbias) of x weight + bias, from d [M, N] and x [M, K]; None for what is not needed."""
    dx = torch.mm(d, weight.t()) if needs_x else None
    if needs_x and dx.dtype is not d.dtype:  # backward under autocast, where autograd casts what it hands on
        dx = dx.to(d.dtype)
    return dx, torch.mm(x.t(), d) if needs_weight else None, d.sum(0) if needs_bias else None


class _Block(torch.autograd.Function):
    """(x3, y3) from x and y, all [B, T, C]; the weights are _forward's."""

    @staticmethod
    def forward(ctx, x, y, numbers, attend, *weights):
        saved = []
        outputs = _forward(x, y, weights, numbers, attend, saved)
        ctx.save_for_backward(*saved)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)  # where only y3 is used, no zeros are read for x3
        return outputs

    @staticmethod
    def backward(ctx, dx, dy):
        refuse_second_derivative("GPT2's block")
        _, num_heads, scale, attn_p, resid_p, mlp_p, _, _ = ctx.numbers
        Wa, Wp, w2, Wf, bf, Wm, w3, kv_start, kv_end, *saved = ctx.saved_tensors
        y, qkv, o, lse, attn_seed, y2, x2, mean2, rstd2, resid_seed, h, g, x3, mean3, rstd3, mlp_seed = saved
        needs_x, needs_y, _, _, *needs = ctx.needs_input_grad
        needs_qkv = needs_y or True in needs[:2]
        needs_ln_2 = needs_x or needs_qkv or True in needs[2:6]  # ln_2's gradients, or some that are behind it
        needs_gelu = needs_ln_2 or True in needs[6:8]
        grads = [None] * 12  # of the weights

        dy = torch.zeros_like(x3, dtype=y.dtype) if dy is None else even_rows(dy)
        dx = None if dx is None else even_rows(dx)
        dx, d, dnorm = _launch_layer_norm_backward(dy, dx, x3, w3, mean3, rstd3, mlp_seed, mlp_p, y.dtype)
        grads[10:] = dnorm.unbind()
        d = (dx if d is None else d).view(y.shape)  # [M, C]
        d, *grads[8:10] = _linear_backward(d, g, Wm, needs_gelu, *needs[8:10])  # [M, N]
        if needs_gelu:
            d, grads[7] = _launch_gelu_backward(d, h, bf)
            d, grads[6], _ = _linear_backward(d, y2, Wf, needs_ln_2, needs[6], False)  # [M, C]
        if needs_ln_2:
            dx, d, dnorm = _launch_layer_norm_backward(d, dx, x2, w2, mean2, rstd2, resid_seed, resid_p, y.dtype)
            grads[4:6] = dnorm.unbind()
            d = (dx if d is None else d).view(y.shape)
            d, *grads[2:4] = _linear_backward(d, o, Wp, needs_qkv, *needs[2:4])
        if needs_qkv:
            options = Options(kv_start, kv_end, None, attn_seed, scale, True, attn_p)
            d, o = d.view(x3.shape), o.view(x3.shape)
            d = _launch_packed_backward(d, qkv, o, lse, num_heads, options).view(len(y), -1)  # [M, 3C]
            d, *grads[:2] = _linear_backward(d, y, Wa, needs_y, *needs[:2])
        return dx if needs_x else None, d.view(x3.shape) if needs_y else None, None, None, *grads


@once
def _fits(tensors, autocast, num_heads, scale, eps2, eps3):
    """Whether x, y and the weights are what the launches take as they lie; where not, the modules say what is wrong."""
    x, y, *weights = tensors
    C, N = x.shape[-1], weights[7].shape[-1]
    D = y.dtype
    shapes = (C, 3 * C), (3 * C,), (C, C), (C,), (C,), (C,), (C, N), (N,), (N, C), (C,), (C,), (C,)
    may_be_fp32 = 4, 5, 7, 10, 11  # the norms', and the bias that GELU adds
    return (
        x.dim() == 3
        and x.numel() > 0
        and x.shape == y.shape
        and C <= MAX_WIDTH
        and C % num_heads == 0
        and 0 < scale < math.inf
        and 0 <= eps2 < math.inf
        and 0 <= eps3 < math.inf
        and C // num_heads <= MAX_HEAD_DIM
        and D in FLOATS
        and x.dtype in (D, torch.float32)
        and (x.dtype is D or autocast)
        and all(t.device == x.device and t.is_contiguous() for t in tensors)
        and all(w.shape == shape for w, shape in zip(weights, shapes))
        and all(
            w.dtype is D or (w.dtype is torch.float32 and (autocast or i in may_be_fp32)) for i, w in enumerate(weights)
        )
        and weights[4].dtype is weights[5].dtype
        and weights[10].dtype is weights[11].dtype
    )


class Blocks:
    """The blocks of one forward pass by the launches above, for those that nobody observes.

    Blocks.of says whether the pass is one for them at all, operands whether a block is.
    """

    def __init__(self, x, attend):
        kind = x.device.type
        self.attend = attend
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.kernels = {name for name in ("auto", "triton") if use_triton(name, x)}

    @classmethod
    def of(cls, x, head_dim, backend, padding, cache, *, plain):
        """Blocks for a forward pass of x [B, T, C], or None where modules do what no launch here does, or a mode, a
        transform, a compiler or a profiler must see operations. cache: a KVCache with room for T tokens, or None."""
        if (
            plain
            or torch.compiler.is_compiling()
            or forward_ad._current_level >= 0
            or torch_module._has_any_global_hook()
            or not is_ordinary((x,), (_TENSORS,))
            or onednn.serves(x, x)
        ):
            return None
        dtype = autocast_dtype(x) or x.dtype
        if get_attention(backend, device=x.device, dtype=dtype, head_dim=head_dim) is not _TRITON:
            return None
        if cache is not None and not _Cached.serves(cache, padding.counts, x):
            return None
        if padding.kv_start is not None and padding.kv_start.device != x.device:
            return None
        check_device("GPT2Model", x, "x")
        return cls(x, _Packed(padding.kv_start, padding.kv_end) if cache is None else _Cached(cache, x.shape[1]))

    def serves(self, x, y, weights, numbers, kernels):
        """Whether __call__ may take these: kernels are the names of what the parts' owner wants them computed by."""
        tensors = (x, y, *weights)
        return (
            self.kernels.issuperset(kernels)
            and is_ordinary(tensors, _FOURTEEN)
            and self.autocast in (None, y.dtype)
            and _fits(tensors, self.autocast is not None, *numbers[1:3], *numbers[6:])
        )

    def __call__(self, x, y, weights, numbers, kernels):
        """(x3, y3, None) from x and y = ln_1(x), differentiable once; None: no attention weights.

        weights: Wa [C, 3C], ba, Wp [C, C], bp, ln_2's two, Wf [C, N], bf, Wm [N, C], bm, the next norm's two.
        """
        if needs_graph(x, y, *weights):
            return *_Block.apply(x, y, numbers, self.attend, *weights), None
        return *_forward(x, y, weights, numbers, self.attend, None), None


_FOURTEEN = [_TENSORS] * 14
