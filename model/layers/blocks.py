"""Which blocks go by block.py's launches, and how tokens attend in them: to one another, or over a KV cache."""

import math
from functools import partial

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from kernels.attention import MAX_HEAD_DIM
from kernels.attention.choice import launch_forward
from kernels.attention.decode import MAX_QUERIES, _launch_attention_decode
from kernels.attention.ops import Options
from kernels.checks import FLOATS, check_device, dense
from kernels.launch import MOST, forgotten
from kernels.layer_norm import MAX_WIDTH
from kernels.library import is_plain as is_ordinary
from kernels.library import needs_graph
from model.attention import get_attention
from model.cache import KVCache
from model.layers import onednn
from model.layers.block import BlockFunction, Launches, forward
from model.layers.ops import autocast_dtype, use_triton

_TRITON = get_attention("triton")
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_FOURTEEN = [_TENSORS] * 14
_known = forgotten({})  # Launches by geometry
# BlockFunction.apply without what it does for torch.func, whose tensors Blocks does not take: 17 arguments to look at.
_apply = super(torch.autograd.Function, BlockFunction).apply
# What of tensors it holds, as functions in C: Python's own x.shape takes twice as long.
_GEOMETRY = (
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device")),
    torch.Tensor.is_contiguous,
    torch.Tensor.is_neg,
)


class _Packed:
    """Attention of tokens over one another; kv_start, kv_end: [B] int32 or None."""

    def __init__(self, kv_start, kv_end):
        self.bounds = dense(kv_start), dense(kv_end)

    def __call__(self, place, rows, qkv, lse, numbers, launches, seed):
        """o [M, C] from qkv [M, 3C], and lse [H M] written; rows: any [M, C] of qkv's dtype."""
        o = torch.empty_like(rows)
        launches.attention.forward(place, qkv, o, lse, *self.bounds, seed)
        return o


class _Cached:
    """Attention of T new tokens over what a KVCache holds, whose rows are equally long, and over one another."""

    def __init__(self, cache, T):
        self.size = cache.batch_size, T
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

    def __call__(self, place, rows, qkv, lse, numbers, launches, seed):
        """o [M, C] from qkv [M, 3C], whose keys and values are stored; lse is left as it is."""
        B, T = self.size
        parts = qkv.view(B, T, 3, numbers.num_heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, T, D]
        self.slots[numbers.layer].copy_(parts[1:])
        q, keys, values = parts[0], self.seen[2 * numbers.layer], self.seen[2 * numbers.layer + 1]
        options = Options(None, None, None, seed, numbers.scale, True, numbers.attn_p)
        is_decoding = seed is None and T <= MAX_QUERIES and keys.shape[2] > T
        launch = _launch_attention_decode if is_decoding else partial(launch_forward, "auto", True)
        return launch(q, keys, values, options)[0].transpose(1, 2).view(rows.shape)


def _fits(tensors, numbers, autocast):
    """Whether x, y and the weights are what the launches take as they lie; where not, the modules say what is wrong."""
    x, y, *weights = tensors
    _, num_heads, scale, _, _, _, eps2, eps3 = numbers
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
        and autocast in (None, D)
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
    """The blocks of one forward pass that nobody observes, launch by launch.

    Blocks.of says whether the pass is one for them at all, serves whether a block is.
    """

    def __init__(self, x, attend):
        kind = x.device.type
        self.attend = attend
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.kernels = {name for name in ("auto", "triton") if use_triton(name, x)}
        bounds = attend.bounds if isinstance(attend, _Packed) else ()
        self.padded = any(bound is not None for bound in bounds)
        self.kind = self.autocast, *[bound is None for bound in bounds]
        self.last = None, None  # the geometry of the block before, and its launches

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
        """The Launches of a block, or None where it must go module by module.

        kernels: the names of what its parts' owner wants them computed by. Blocks are alike: where one is as the one
        before, what that one was found to be holds for it.
        """
        tensors = (x, y, *weights)
        if not self.kernels.issuperset(kernels) or not _TENSORS.issuperset(map(type, tensors)):
            return None
        geometry = numbers[1:], self.kind, *(each for of in _GEOMETRY for each in map(of, tensors))
        if geometry == self.last[0]:
            return self.last[1]
        launches = _known.get(geometry)
        if launches is None:
            if not is_ordinary(tensors, _FOURTEEN) or not _fits(tensors, numbers, self.autocast):
                return None
            if len(_known) >= MOST:
                _known.clear()
            vectors = {w.dtype for w in weights if w.dim() == 1}
            dtype = vectors.pop() if len(vectors) == 1 else torch.float32
            launches = Launches(*x.shape, weights[7].shape[0], y.dtype, numbers, self.padded, dtype)
            _known[geometry] = launches
        self.last = geometry, launches
        return launches

    def __call__(self, x, y, weights, numbers, launches):
        """(x3, y3, None) from x and y = ln_1(x), differentiable once; None: no attention weights.

        weights: Wa [C, 3C], ba, Wp [C, C], bp, ln_2's two, Wf [C, N], bf, Wm [N, C], bm, the next norm's two.
        """
        if needs_graph(x, y, *weights):
            return *_apply(x, y, numbers, launches, self.attend, *weights), None
        return *forward(x, y, weights, numbers, launches, self.attend, None), None
