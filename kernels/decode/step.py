"""A decode step: the next token's logits for B texts, from the tokens before and the cache. Five launches a layer.

    1  x = wte[id] + wpe[length] in the first layer;  q, k, v = LN(x) W + b;  k and v go into the cache
    2  attention of q over the keys, SPLIT of them a program: o of each split and its log-sum-exp
    3  x += merge(o) W + b
    4  h = gelu(LN(x) W + b)
    5  x += h W + b
    and at the end  logits = LN(x) W

Each program serves one row; rows share the weights through L2. A row is a new token: one of each text, or, where drafts
are verified, several of one, of which each attends to those before it. x stays in fp32 from layer to layer. Weights are
packed as [out, in] (pack.py), in the model's dtype or in int8 with a scale for each output, so that a warp reads whole
rows of them; biases, norms and embeddings are the model's own. Each sum has one order, which depends on the widths
alone: a row's bits depend neither on the other rows nor on how much memory its cache has, and those of a verified draft
are those of the step that would have said it.

A kernel is launched ahead of the end of the one before it, where the chip can (DEPENDENT): it asks for its weights,
which nobody writes, and only then waits (_wait) for what the kernel before has written. On an H100 (GPT-2 124M, fp16,
one row, 511 keys) 203 us a step with it and 277 without; the forward pass's own kernels take 573. README.md has more.

Bytes, least: every weight once, the keys and values held once. FLOPs: 2 B a weight; memory and latency decide.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.decode.phases import (
    _add_product,
    _attend,
    _embedding,
    _held,
    _merged,
    _store_product,
    _store_qkv,
    _store_row,
    _with_new,
)
from kernels.decode.tiles import _activations, _layer_norm, _scales, _vector, _weight_rows
from kernels.launch import Launcher
from kernels.library import LOG2E, active_arch

MAX_ROWS = 17  # texts, or the last token of one and 16 drafts
BK = 256  # columns of a tile: 16 bytes a lane at two bytes an element
WARPS = 4
TILES = 6  # of weights, about, that a program keeps: 24 registers a thread at two bytes an element
SPLIT = 256  # keys of a program of attention, at most: fewer where a tile of them would not fit its registers
AT_ONCE = 4  # splits whose results are asked for together
DEPENDENT = True  # programmatic dependent launch, which Hopper and newer have


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
    ids_ptr,  # [B, T] int64
    lengths_ptr,  # [B] int32
    counts_ptr,  # [B] int32, or None
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    w_ptr,  # [3C, C]
    scale_ptr,  # [3C] fp32, or None
    bias_ptr,  # [3C]
    x_ptr,  # [B, T, C] fp32: written in the first layer, read in the others
    q_ptr,  # [B, T, C] fp32
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
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    _ask(PDL)
    row = tl.program_id(1)
    if counts_ptr is not None:
        is_idle = row % T >= tl.load(counts_ptr + row // T)  # the text has no such token
        if is_idle:
            _wait(PDL)
            return
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, 3 * C, C, BK, R, GROUPS)
    scale = _scales(scale_ptr, first, 3 * C, R, GROUPS)
    bias = _vector(bias_ptr, first, 3 * C, R, GROUPS)
    norm_weight = _activations(norm_weight_ptr, C, BK, R)
    norm_bias = _activations(norm_bias_ptr, C, BK, R)
    _wait(PDL)
    b = row // T
    length = tl.load(lengths_ptr + b) + row % T  # tokens before this one
    if IS_FIRST:
        x = _embedding(wte_ptr, wpe_ptr, tl.load(ids_ptr + row), length, C, BK, R)
        _store_row(x_ptr + row * C, x, tl.program_id(0) == 0, C, BK, R)
    else:
        x = _activations(x_ptr + row * C, C, BK, R)
    y = _layer_norm(x, norm_weight, norm_bias, eps, C, BK)
    B = tl.num_programs(1) // T
    place = (q_ptr + row * C, cache_ptr, b, length, B, H, capacity)
    _store_qkv(y, w, scale, bias, first, 3 * C, place, C, D, CHUNKS, R, GROUPS)


@triton.jit
def _decode_attention_kernel(
    q_ptr,  # [B, T, C] fp32
    cache_ptr,  # [2, B, H, capacity, D]
    lengths_ptr,  # [B] int32: without the new tokens
    counts_ptr,  # [B] int32, or None
    part_ptr,  # [B, T, H, splits, BLOCK_D] fp32
    lse_ptr,  # [B, T, H, splits] fp32, log2 units
    B,
    H,
    capacity,
    num_splits,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's head against one split of its keys; new tokens' are in the cache, but are loaded after the wait."""
    _ask(PDL)
    split = tl.program_id(0) % num_splits
    head = (tl.program_id(0) // num_splits).to(tl.int64)  # of all rows'
    row = head // H
    b = row // T
    if counts_ptr is not None:
        is_idle = row % T >= tl.load(counts_ptr + row // T)  # the text has no such token
        if is_idle:
            _wait(PDL)
            return
    length = tl.load(lengths_ptr + b) + (row % T).to(tl.int32)  # tokens before this one
    keys = cache_ptr + (b * H + head % H) * capacity * D
    values = keys + tl.cast(B, tl.int64) * H * capacity * D
    if T == 1:
        k = _held(keys, split, length, D, BLOCK_D, SPLIT)
        v = _held(values, split, length, D, BLOCK_D, SPLIT)
    _wait(PDL)
    if split * SPLIT <= length:
        if T == 1:
            k = _with_new(k, keys, split, length, D, BLOCK_D, SPLIT)
            v = _with_new(v, values, split, length, D, BLOCK_D, SPLIT)
        else:
            k = _held(keys, split, length + 1, D, BLOCK_D, SPLIT)
            v = _held(values, split, length + 1, D, BLOCK_D, SPLIT)
        to = head * num_splits + split
        q, part, lse = q_ptr + head * D, part_ptr + to * BLOCK_D, lse_ptr + to
        _attend(k, v, q, part, lse, split, length, scale_log2, D, BLOCK_D, SPLIT)


@triton.jit
def _decode_out_kernel(
    part_ptr,  # [B, T, H, splits, BLOCK_D] fp32
    lse_ptr,  # [B, T, H, splits] fp32, log2 units
    lengths_ptr,  # [B] int32
    counts_ptr,  # [B] int32, or None
    w_ptr,  # [C, C]
    scale_ptr,  # [C] fp32, or None
    bias_ptr,  # [C]
    x_ptr,  # [B, T, C] fp32
    H,
    num_splits,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    _ask(PDL)
    row = tl.program_id(1)
    if counts_ptr is not None:
        is_idle = row % T >= tl.load(counts_ptr + row // T)  # the text has no such token
        if is_idle:
            _wait(PDL)
            return
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, C, C, BK, R, GROUPS)
    scale = _scales(scale_ptr, first, C, R, GROUPS)
    bias = _vector(bias_ptr, first, C, R, GROUPS)
    filled = (tl.load(lengths_ptr + row // T) + row % T) // SPLIT + 1
    _wait(PDL)
    o = _merged(part_ptr, lse_ptr, row * H, filled, num_splits, C, D, BLOCK_D, BK, AT_ONCE)
    _add_product(w, o, scale, bias, x_ptr + row * C, first, C, (C + BK - 1) // BK, R, GROUPS)


@triton.jit
def _decode_proj_kernel(
    h_ptr,  # [B, T, K]
    counts_ptr,  # [B] int32, or None
    w_ptr,  # [C, K]
    scale_ptr,  # [C] fp32, or None
    bias_ptr,  # [C]
    x_ptr,  # [B, T, C] fp32
    C,
    K: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    _ask(PDL)
    row = tl.program_id(1)
    if counts_ptr is not None:
        is_idle = row % T >= tl.load(counts_ptr + row // T)  # the text has no such token
        if is_idle:
            _wait(PDL)
            return
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, C, K, BK, R, GROUPS)
    scale = _scales(scale_ptr, first, C, R, GROUPS)
    bias = _vector(bias_ptr, first, C, R, GROUPS)
    _wait(PDL)
    h = _activations(h_ptr + row * K, K, BK, R)
    _add_product(w, h, scale, bias, x_ptr + row * C, first, C, (K + BK - 1) // BK, R, GROUPS)


@triton.jit
def _decode_fc_kernel(
    x_ptr,  # [B, T, C] fp32
    counts_ptr,  # [B] int32, or None
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    w_ptr,  # [N, C]
    scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [N], or None
    y_ptr,  # [B, T, N]
    N,
    eps,
    C: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    GELU: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = LN(x) w^T + bias, through GELU if so: the MLP's first half, and the head."""
    _ask(PDL)
    row = tl.program_id(1)
    if counts_ptr is not None:
        is_idle = row % T >= tl.load(counts_ptr + row // T)  # the text has no such token
        if is_idle:
            _wait(PDL)
            return
    first = tl.program_id(0) * (GROUPS * R)
    w = _weight_rows(w_ptr, first, N, C, BK, R, GROUPS)
    scale = _scales(scale_ptr, first, N, R, GROUPS)
    norm_weight = _activations(norm_weight_ptr, C, BK, R)
    norm_bias = _activations(norm_bias_ptr, C, BK, R)
    bias = ()
    if bias_ptr is not None:
        bias = _vector(bias_ptr, first, N, R, GROUPS)
    _wait(PDL)
    y = _layer_norm(_activations(x_ptr + row * C, C, BK, R), norm_weight, norm_bias, eps, C, BK)
    _store_product(w, y, scale, bias, y_ptr + row.to(tl.int64) * N, first, N, (C + BK - 1) // BK, R, GROUPS, GELU)


@dataclass
class DecodeBuffers:
    """What passes from kernel to kernel, for `rows` new tokens of width C, H heads, and an inner width of `inner`."""

    x: torch.Tensor  # [rows, C] fp32
    q: torch.Tensor  # [rows, C] fp32
    h: torch.Tensor  # [rows, inner]
    part: torch.Tensor  # [rows, H, splits, BLOCK_D] fp32
    lse: torch.Tensor  # [rows, H, splits] fp32

    @classmethod
    def make(cls, rows, C, H, inner, capacity, dtype, device):
        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=device)

        D = C // H
        splits, BLOCK_D = triton.cdiv(capacity, split_keys(D, dtype)), triton.next_power_of_2(D)
        h = empty(rows, inner, dtype=dtype)
        return cls(empty(rows, C), empty(rows, C), h, empty(rows, H, splits, BLOCK_D), empty(rows, H, splits))


def _pdl():
    """Whether kernels are launched ahead of the end of the one before."""
    arch = active_arch()
    return DEPENDENT and isinstance(arch, int) and arch >= 90


def _options(**rest):
    pdl = _pdl()
    options = {"PDL": pdl, "num_warps": WARPS, "enable_fp_fusion": True, **rest}
    return options | ({"launch_pdl": True} if pdl else {})


def _rows_plan(B, T, N, K, numbers, /, **rest):
    """For each of B T rows, programs for as many of the N rows of weights [N, K] as make TILES tiles."""
    GROUPS = max(1, TILES // triton.cdiv(K, BK)) if N > K else 1
    options = _options(BK=BK, R=WARPS, GROUPS=GROUPS, T=T, **rest)
    return (triton.cdiv(N, GROUPS * WARPS), B * T), numbers, options, {}


def _qkv_plan(B, T, C, H, capacity, eps, is_first):
    grid, numbers, options, offsets = _rows_plan(B, T, 3 * C, C, (H, capacity, eps), C=C, D=C // H, IS_FIRST=is_first)
    if is_first:
        options.pop("launch_pdl", None)  # attention reads the lengths ahead, which the step before has written
    return grid, numbers, options, offsets


def split_keys(head_dim, dtype):
    """Keys of a split: a tile of at most 32 KB, 32 registers a thread of 8 warps, for any head dim and dtype."""
    return max(16, min(SPLIT, 2**15 // (triton.next_power_of_2(head_dim) * dtype.itemsize)))


def _attention_plan(B, T, C, H, capacity, dtype, scale):
    D = C // H
    keys = split_keys(D, dtype)
    splits = triton.cdiv(capacity, keys)
    options = _options(D=D, BLOCK_D=triton.next_power_of_2(D), SPLIT=keys, T=T, num_warps=2 * WARPS)
    return (B * T * H * splits,), (B, H, capacity, splits, scale * LOG2E), options, {}


def _out_plan(B, T, C, H, capacity, dtype):
    D = C // H
    keys = split_keys(D, dtype)
    shape = {"C": C, "D": D, "BLOCK_D": triton.next_power_of_2(D), "SPLIT": keys, "AT_ONCE": AT_ONCE}
    return _rows_plan(B, T, C, C, (H, triton.cdiv(capacity, keys)), **shape)


def _proj_plan(B, T, C, inner):
    return _rows_plan(B, T, C, inner, (C,), K=inner)


def _fc_plan(B, T, C, N, eps, gelu):
    return _rows_plan(B, T, N, C, (N, eps), C=C, GELU=gelu)


_launch_qkv = Launcher(_decode_qkv_kernel, _qkv_plan)
_launch_attention = Launcher(_decode_attention_kernel, _attention_plan)
_launch_out = Launcher(_decode_out_kernel, _out_plan)
_launch_proj = Launcher(_decode_proj_kernel, _proj_plan)
_launch_fc = Launcher(_decode_fc_kernel, _fc_plan)


def decode_step(
    ids, lengths, cache, layers, embeddings, final_norm, head, logits, buffers, num_heads, scales, eps, counts=None
):
    """Writes logits [B T, V] fp32, and the new keys and values into the cache.

    ids: [B, T] int64, contiguous, at most MAX_ROWS of them. lengths: [B] int32, the tokens that each text holds; they
    stay as they are. counts: [B] int32, how many of its T ids are new tokens; logits and slots of the others stay as
    they are. None: all. cache: [n_layer, 2, B, H, capacity, D]. layers: for each (ln_1, qkv, out, ln_2, fc, proj): the
    norms pairs of a weight and a bias, the others a `Packed` matrix and a bias. embeddings: wte, wpe. final_norm: a
    pair. head: a `Packed` [V, C]. scales: each layer's, of its scores.
    """
    B, T = ids.shape
    C = buffers.x.shape[1]
    shape = B, T, C, num_heads, cache.shape[4]
    part, lse = buffers.part, buffers.lse
    for i, (ln_1, qkv, out, ln_2, fc, proj) in enumerate(layers):
        matrix, bias = qkv
        tensors = (*embeddings, ids, lengths, counts, *ln_1, *matrix, bias, buffers.x, buffers.q, cache[i])
        _launch_qkv(tensors, *shape, eps, i == 0)
        _launch_attention((buffers.q, cache[i], lengths, counts, part, lse), *shape, cache.dtype, scales[i])
        matrix, bias = out
        _launch_out((part, lse, lengths, counts, *matrix, bias, buffers.x), *shape, cache.dtype)
        matrix, bias = fc
        _launch_fc((buffers.x, counts, *ln_2, *matrix, bias, buffers.h), B, T, C, matrix.weight.shape[0], eps, True)
        matrix, bias = proj
        _launch_proj((buffers.h, counts, *matrix, bias, buffers.x), B, T, C, matrix.weight.shape[1])
    _launch_fc((buffers.x, counts, *final_norm, *head, None, logits), B, T, C, head.weight.shape[0], eps, False)
