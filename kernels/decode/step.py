"""A decode step: the next token's logits for B rows, from the token before and the cache. Five launches a layer.

    1  x = wte[id] + wpe[length] in the first layer;  q, k, v = LN(x) W + b;  k and v go into the cache
    2  o = attention of q over the keys, a program for each head
    3  x += o W + b
    4  h = gelu(LN(x) W + b)
    5  x += h W + b
    and at the end  logits = LN(x) W

Each program serves one row; rows share the weights through L2. (On an H100 all rows in one program cost 1.5 us a row
and kernel, and a head's keys in splits, merged by kernel 3, 0.7 us for each 128 of them.) x stays in fp32 from layer to
layer. Weights are packed as [out, in] (pack_layer), so that a warp reads whole rows of them; biases, norms and
embeddings are the model's own. Each sum has one order, which depends on the widths alone: a row's bits depend neither
on the other rows nor on how much memory its cache has.

Dependent launch (Hopper and newer, inside a CUDA graph too): a kernel starts while the one before it still runs, asks
for its weights, which nobody writes, and only then waits (_wait) for what the one before has written. Nothing that this
step writes is loaded before that, and every program waits before it ends, so that a kernel's end implies the end of all
before it. Elsewhere the kernels are launched as any others.

Bytes, least: every weight once, the keys and values held once. FLOPs: 2 B a weight; memory and latency decide.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.tiles import _activations, _layer_norm, _product, _vector, _weight_rows
from kernels.gelu import _gelu
from kernels.launch import Launcher
from kernels.library import LOG2E, active_arch

MAX_ROWS = 8  # beyond, the matrix units of the ordinary step win
BK = 256  # columns of a tile: 16 bytes a lane at two bytes an element
WARPS = 4
TILES = 12  # of weights, at most, that a program keeps: 48 registers a thread at two bytes an element
KEYS = 64  # of a head at a time
STAGES = 3  # tiles of keys and values on their way at once


@triton.jit
def _ask(PDL: tl.constexpr):
    """Lets the kernel behind this one start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until the kernel before this one has ended and its writes can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def _decode_qkv_kernel(
    wte_ptr,  # [V, C]
    wpe_ptr,  # [n_positions, C]
    ids_ptr,  # [B] int64
    lengths_ptr,  # [B] int32
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    w_ptr,  # [3C, C]
    bias_ptr,  # [3C]
    x_ptr,  # [B, C] fp32: written in the first layer, read in the others
    q_ptr,  # [B, C] fp32
    cache_ptr,  # [2, B, H, capacity, D]: a layer's
    H,
    capacity,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    _ask(PDL)
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, 3 * C, C, BK, R, GROUPS)
    bias = _vector(bias_ptr, first, 3 * C, R, GROUPS)
    norm_weight = _activations(norm_weight_ptr, C, BK, R)
    norm_bias = _activations(norm_bias_ptr, C, BK, R)
    _wait(PDL)
    b = tl.program_id(1)
    length = tl.load(lengths_ptr + b)
    if IS_FIRST:
        token = _activations(wte_ptr + tl.load(ids_ptr + b) * C, C, BK, R)
        place = _activations(wpe_ptr + length.to(tl.int64) * C, C, BK, R)
        x = ()
        for c in tl.static_range(CHUNKS):
            x += (token[c].to(tl.float32) + place[c].to(tl.float32),)
            k = c * BK + tl.arange(0, BK)[None, :]
            mine = (tl.arange(0, R)[:, None] == 0) & (k < C) & (tl.program_id(0) == 0)
            tl.store(x_ptr + b * C + tl.arange(0, R)[:, None] * 0 + k, x[c], mask=mine)
    else:
        x = _activations(x_ptr + b * C, C, BK, R)
    y = _layer_norm(x, norm_weight, norm_bias, eps, C, BK)
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        value = _product(w, y, g, CHUNKS) + bias[g]  # [R]
        tl.store(q_ptr + b * C + n, value, mask=n < C)
        m = n % C
        head = (n // C - 1).to(tl.int64) * tl.num_programs(1) * H + b * H + m // D
        slot = (head * capacity + length) * D + m % D
        tl.store(cache_ptr + slot, value.to(cache_ptr.dtype.element_ty), mask=(n >= C) & (n < 3 * C))


@triton.jit
def _decode_attention_kernel(
    q_ptr,  # [B, C] fp32
    cache_ptr,  # [2, B, H, capacity, D]
    lengths_ptr,  # [B] int32: without the new token, whose key and value the cache holds by now
    o_ptr,  # [B, C] fp32
    H,
    capacity,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's head over all of its keys: the online softmax, tiles of keys and values asked for ahead."""
    _ask(PDL)
    head = tl.program_id(0).to(tl.int64)  # of all rows'
    d = tl.arange(0, BLOCK_D)
    keys = cache_ptr + head * capacity * D
    values = keys + tl.num_programs(0).to(tl.int64) * capacity * D
    num_keys = tl.load(lengths_ptr + head // H) + 1
    _wait(PDL)
    q = tl.load(q_ptr + head * D + d, mask=d < D, other=0.0) * scale_log2  # [BLOCK_D]
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for n in tl.range(0, num_keys, KEYS, num_stages=STAGES):
        slots = n + tl.arange(0, KEYS)
        held = (slots < num_keys)[:, None] & (d < D)[None, :]
        k = tl.load(keys + slots[:, None] * D + d[None, :], mask=held, other=0.0)  # [KEYS, BLOCK_D]
        v = tl.load(values + slots[:, None] * D + d[None, :], mask=held, other=0.0)  # [KEYS, BLOCK_D]
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)  # [KEYS]
        s = tl.where(slots < num_keys, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 0))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(s - m_new)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v.to(tl.float32), 0)
        m_i = m_new
    tl.store(o_ptr + head * D + d, acc / l_i, mask=d < D)


@triton.jit
def _decode_add_kernel(
    h_ptr,  # [B, K]
    w_ptr,  # [C, K]
    bias_ptr,  # [C]
    x_ptr,  # [B, C] fp32
    C,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += h w^T + bias: what attention and the MLP add to the residual stream."""
    _ask(PDL)
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, C, K, BK, R, GROUPS)
    bias = _vector(bias_ptr, first, C, R, GROUPS)
    _wait(PDL)
    b = tl.program_id(1)
    h = _activations(h_ptr + b * K, K, BK, R)
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        before = tl.load(x_ptr + b * C + n, mask=n < C, other=0.0)
        y = _product(w, h, g, (K + BK - 1) // BK) + bias[g]
        tl.store(x_ptr + b * C + n, before + y, mask=n < C)


@triton.jit
def _decode_fc_kernel(
    x_ptr,  # [B, C] fp32
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    w_ptr,  # [N, C]
    bias_ptr,  # [N], or None
    y_ptr,  # [B, N]
    N,
    eps,
    C: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = LN(x) w^T + bias, through GELU if so: the MLP's first half, and the head."""
    _ask(PDL)
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, N, C, BK, R, GROUPS)
    norm_weight = _activations(norm_weight_ptr, C, BK, R)
    norm_bias = _activations(norm_bias_ptr, C, BK, R)
    bias = ()
    if bias_ptr is not None:
        bias = _vector(bias_ptr, first, N, R, GROUPS)
    _wait(PDL)
    b = tl.program_id(1)
    y = _layer_norm(_activations(x_ptr + b * C, C, BK, R), norm_weight, norm_bias, eps, C, BK)
    for g in tl.static_range(GROUPS):
        n = first + g * R + tl.arange(0, R)
        value = _product(w, y, g, (C + BK - 1) // BK)  # [R]
        if bias_ptr is not None:
            value += bias[g]
        if GELU:
            value = _gelu(value)
        tl.store(y_ptr + b.to(tl.int64) * N + n, value.to(y_ptr.dtype.element_ty), mask=n < N)


def pack_layer(weights, packed=None):
    """The four matrices of a layer, [in, out], as [out, in]: new, or written into what an earlier call gave."""
    if packed is None:
        packed = [weight.new_empty(weight.shape[::-1]) for weight in weights]
    for target, weight in zip(packed, weights):
        target.copy_(weight.t())
    return packed


@dataclass
class DecodeBuffers:
    """What passes from kernel to kernel, for B rows of width C and an inner width of `inner`."""

    x: torch.Tensor  # [B, C] fp32
    q: torch.Tensor  # [B, C] fp32
    o: torch.Tensor  # [B, C] fp32
    h: torch.Tensor  # [B, inner]

    @classmethod
    def make(cls, B, C, inner, dtype, device):
        x, q, o = (torch.empty(B, C, dtype=torch.float32, device=device) for _ in range(3))
        return cls(x, q, o, torch.empty(B, inner, dtype=dtype, device=device))


def _pdl():
    """Whether kernels are launched ahead of the end of the one before: from Hopper on."""
    arch = active_arch()
    return isinstance(arch, int) and arch >= 90


def _options(**rest):
    pdl = _pdl()
    options = {"PDL": pdl, "num_warps": WARPS, "enable_fp_fusion": True, **rest}
    return options | ({"launch_pdl": True} if pdl else {})


def _rows_plan(B, N, K, numbers, /, **rest):
    """For each of B rows, programs for as many of the N rows of weights [N, K] as make TILES tiles."""
    GROUPS = max(1, TILES // triton.cdiv(K, BK)) if N > K else 1
    return (triton.cdiv(N, GROUPS * WARPS), B), numbers, _options(BK=BK, R=WARPS, GROUPS=GROUPS, **rest), {}


def _qkv_plan(B, C, H, capacity, eps, is_first):
    return _rows_plan(B, 3 * C, C, (H, capacity, eps), C=C, D=C // H, IS_FIRST=is_first)


def _attention_plan(B, C, H, capacity, scale):
    D = C // H
    options = _options(D=D, BLOCK_D=triton.next_power_of_2(D), KEYS=KEYS, STAGES=STAGES)
    return (B * H,), (H, capacity, scale * LOG2E), options, {}


def _add_plan(B, C, inner):
    return _rows_plan(B, C, inner, (C,), K=inner)


def _fc_plan(B, C, N, eps, gelu):
    return _rows_plan(B, N, C, (N, eps), C=C, GELU=gelu)


_launch_qkv = Launcher(_decode_qkv_kernel, _qkv_plan)
_launch_attention = Launcher(_decode_attention_kernel, _attention_plan)
_launch_add = Launcher(_decode_add_kernel, _add_plan)
_launch_fc = Launcher(_decode_fc_kernel, _fc_plan)


def decode_step(ids, lengths, cache, layers, embeddings, final_norm, head, logits, buffers, num_heads, scales, eps):
    """Writes logits [B, V] fp32, and the new keys and values into the cache.

    ids: [B, 1] int64. lengths: [B] int32, the tokens that each row holds; they stay as they are. cache: [n_layer, 2, B,
    H, capacity, D]. layers: for each (ln_1, qkv, out, ln_2, fc, proj), pairs of a weight and a bias, matrices packed by
    pack_layer. embeddings: wte, wpe. final_norm: a pair. head: [V, C]. scales: each layer's, of its scores.
    """
    B, C = buffers.x.shape
    shape = B, C, num_heads, cache.shape[4]
    for i, (ln_1, qkv, out, ln_2, fc, proj) in enumerate(layers):
        tensors = (*embeddings, ids, lengths, *ln_1, *qkv, buffers.x, buffers.q, cache[i])
        _launch_qkv(tensors, *shape, eps, i == 0)
        _launch_attention((buffers.q, cache[i], lengths, buffers.o), *shape, scales[i])
        _launch_add((buffers.o, *out, buffers.x), B, C, C)
        _launch_fc((buffers.x, *ln_2, *fc, buffers.h), B, C, fc[0].shape[0], eps, True)
        _launch_add((buffers.h, *proj, buffers.x), B, C, proj[0].shape[1])
    _launch_fc((buffers.x, *final_norm, head, None, logits), B, C, head.shape[0], eps, False)
