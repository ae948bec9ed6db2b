"""The decode step of step.py in one launch: P programs, all resident at once, go through its phases together.

    for each layer   1 qkv   2 attention   3 out   4 fc   5 proj      and at the end   6 head, the next tokens

A phase's rows of weights are divided among the programs; a barrier of the grid, a counter in memory, ends it. It is
split in two: _arrive tells that this program's part is written; then weights are asked for, which depend on nobody, a
phase ahead of the one that the barrier leads to; then _await. So memory is read while programs wait for each other.

What makes it right (README.md derives it):
- all programs are resident: a cooperative launch, which is refused where they would not fit;
- whatever this launch writes is loaded after the _await that orders it behind the store; what is loaded before are
  weights and the keys and values of earlier tokens;
- between two phases of which one writes what the other touches there is a barrier, so that no buffer needs a twin;
- sums have the order that they have in step.py: a row gets the bits that it gets there, whatever P is.

One new token of each text. Weights, biases and norms lie layer behind layer (pack.py), for the layers are a loop here.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from kernels.decode.choose import NOTHING, _best, _say
from kernels.decode.pack import ALIGN
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
from kernels.decode.step import AT_ONCE, BK, split_keys
from kernels.decode.tiles import _activations, _layer_norm, _vector, _weight_rows
from kernels.launch import Launcher
from kernels.library import INTERPRETED, LOG2E

WARPS = 8
BYTES = 24  # of a thread's tiles of weights, about: an element of so many; with the next ones twice that
PROGRAMS = None  # of a launch; None: one for each multiprocessor
COUNTERS = tl.constexpr(64)  # int32: one of arrivals, and, a cache line on, one of programs that are done


@triton.jit
def _arrive(counter):
    """Tells the grid that this program has written its part of a phase."""
    tl.debug_barrier()  # all threads' stores before the release of one: Triton puts no barrier there
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _await(counter, target):
    """Until there were `target` arrivals: then what was written before them can be loaded."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()  # the acquire of one thread before the loads of all


@triton.jit
def _norm_of(ptr, i, C: tl.constexpr, ALIGN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """Weight and bias of layer i's LayerNorm, [L, 2, C]."""
    STRIDE: tl.constexpr = (C + ALIGN - 1) // ALIGN * ALIGN
    ptr += i * (2 * STRIDE)
    return (_activations(ptr, C, BK, R), _activations(ptr + STRIDE, C, BK, R))


@triton.jit
def _rows_of(
    matrix,
    i,
    first,
    end,
    N: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """(tiles, scales, biases) of layer i's rows from `first` on, before `end`. matrix: pointers to the three."""
    w_ptr, scale_ptr, bias_ptr = matrix
    STRIDE: tl.constexpr = (N + ALIGN - 1) // ALIGN * ALIGN
    w = _weight_rows(w_ptr + i * ((N * K + ALIGN - 1) // ALIGN * ALIGN), first, end, K, BK, R, GROUPS)
    scale = ()
    if scale_ptr is not None:
        scale = _vector(scale_ptr + i * STRIDE, first, end, R, GROUPS)
    bias = ()
    if bias_ptr is not None:
        bias = _vector(bias_ptr + i * STRIDE, first, end, R, GROUPS)
    return (w, scale, bias)


@triton.jit
def _input(at, b, is_first, stores, norm, eps, C: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """Row b for the first phase of a layer, normalised: in the first layer its embedding, which one program stores."""
    wte_ptr, wpe_ptr, ids_ptr, lengths_ptr, x_ptr = at
    if is_first:
        x = _embedding(wte_ptr, wpe_ptr, tl.load(ids_ptr + b), tl.load(lengths_ptr + b), C, BK, R)
        _store_row(x_ptr + b * C, x, stores, C, BK, R)
    else:
        x = _activations(x_ptr + b * C, C, BK, R)
    return _layer_norm(x, norm[0], norm[1], eps, C, BK)


@triton.jit
def _tiles_of(cache, item, splits, lengths_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """(keys, values) that attention's item `item`, a split of a head of a row, has of earlier tokens."""
    keys, B, H, capacity = cache
    head = item // splits
    length = tl.load(lengths_ptr + head // H, mask=head < B * H, other=0)
    keys += tl.cast(head, tl.int64) * capacity * D
    values = keys + tl.cast(B, tl.int64) * H * capacity * D
    return (
        _held(keys, item % splits, length, D, BLOCK_D, SPLIT),
        _held(values, item % splits, length, D, BLOCK_D, SPLIT),
    )


@triton.jit
def _attend_to_item(
    tiles,
    cache,
    item,
    splits,
    lengths_ptr,
    to,  # q_ptr, part_ptr, lse_ptr, num_splits
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A program's part of attention: a split of a head of a row, from its tiles and the new token's key and value."""
    keys, B, H, capacity = cache
    q_ptr, part_ptr, lse_ptr, num_splits = to
    head = item // splits
    split = item % splits
    length = tl.load(lengths_ptr + head // H)
    if split * SPLIT <= length:
        keys += tl.cast(head, tl.int64) * capacity * D
        values = keys + tl.cast(B, tl.int64) * H * capacity * D
        k = _with_new(tiles[0], keys, split, length, D, BLOCK_D, SPLIT)
        v = _with_new(tiles[1], values, split, length, D, BLOCK_D, SPLIT)
        place = head * num_splits + split
        q, part, lse = q_ptr + head * D, part_ptr + place * BLOCK_D, lse_ptr + place
        _attend(k, v, q, part, lse, split, length, scale_log2, D, BLOCK_D, SPLIT)


@triton.jit
def _decode_persistent_kernel(
    wte_ptr,  # [V, C]
    wpe_ptr,  # [n_positions, C]
    ids_ptr,  # [B] int64: read, and at the end the next ones
    lengths_ptr,  # [B] int32: tokens before these; advanced at the end
    said_ptr,  # [B, capacity] int64
    ln_1_ptr,  # [L, 2, C]; of this and the next ones every matrix and every vector begins at a multiple of ALIGN
    qkv_ptr,  # [L, 3C, C]
    qkv_scale_ptr,  # [L, 3C] fp32, or None
    qkv_bias_ptr,  # [L, 3C]
    out_ptr,  # [L, C, C]
    out_scale_ptr,
    out_bias_ptr,
    ln_2_ptr,  # [L, 2, C]
    fc_ptr,  # [L, N, C]
    fc_scale_ptr,
    fc_bias_ptr,
    proj_ptr,  # [L, C, N]
    proj_scale_ptr,
    proj_bias_ptr,
    ln_f_ptr,  # [1, 2, C]
    head_ptr,  # [V, C]
    head_scale_ptr,  # [V] fp32, or None
    scores_ptr,  # [L] fp32: the scale of each layer's scores, in log2 units
    cache_ptr,  # [L, 2, B, H, capacity, D]
    logits_ptr,  # [B, V] fp32
    x_ptr,  # [B, C] fp32
    q_ptr,  # [B, C] fp32
    h_ptr,  # [B, N]
    part_ptr,  # [B, H, splits, BLOCK_D] fp32
    lse_ptr,  # [B, H, splits] fp32, log2 units
    best_ptr,  # [B, P] int64
    counters_ptr,  # [COUNTERS] int32, zero before and after
    L,
    B,
    H,
    capacity,
    num_splits,
    eps,
    V: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE: tl.constexpr,  # whether there is one row: it is then normalised once a phase
    P: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
    G_QKV: tl.constexpr,  # of each phase: how many groups of R rows a program has in registers at a time
    G_OUT: tl.constexpr,
    G_FC: tl.constexpr,
    G_PROJ: tl.constexpr,
    G_HEAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    K_C: tl.constexpr = (C + BK - 1) // BK
    K_N: tl.constexpr = (N + BK - 1) // BK
    N_QKV: tl.constexpr = (3 * C + P - 1) // P  # rows of weights of a program
    N_OUT: tl.constexpr = (C + P - 1) // P
    N_FC: tl.constexpr = (N + P - 1) // P
    N_HEAD: tl.constexpr = (V + P - 1) // P
    p = tl.program_id(0)
    end_qkv = tl.minimum((p + 1) * N_QKV, 3 * C)
    end_out = tl.minimum((p + 1) * N_OUT, C)
    end_fc = tl.minimum((p + 1) * N_FC, N)
    end_head = tl.minimum((p + 1) * N_HEAD, V)
    qkv = (qkv_ptr, qkv_scale_ptr, qkv_bias_ptr)
    out = (out_ptr, out_scale_ptr, out_bias_ptr)
    fc = (fc_ptr, fc_scale_ptr, fc_bias_ptr)
    proj = (proj_ptr, proj_scale_ptr, proj_bias_ptr)
    at = (wte_ptr, wpe_ptr, ids_ptr, lengths_ptr, x_ptr)
    longest = 0
    for b in tl.range(B):
        longest = tl.maximum(longest, tl.load(lengths_ptr + b))
    splits = longest // SPLIT + 1  # that the longest row fills
    items = B * H * splits
    arrivals = 0

    norm = _norm_of(ln_1_ptr, 0, C, ALIGN, BK, R)
    w_qkv = _rows_of(qkv, 0, p * N_QKV, end_qkv, 3 * C, C, ALIGN, BK, R, G_QKV)
    for layer in tl.range(L):
        i = tl.cast(layer, tl.int64)
        cache = (cache_ptr + i * 2 * B * H * capacity * D, B, H, capacity)
        if layer > 0:
            _await(counters_ptr, arrivals)

        # 1: q, k, v = LN(x) W + b
        if ONE:
            y = _input(at, 0, layer == 0, p == 0, norm, eps, C, BK, R)
        for step in tl.range((N_QKV + G_QKV * R - 1) // (G_QKV * R)):
            first = p * N_QKV + step * (G_QKV * R)
            for b in tl.range(B):
                if not ONE:
                    y = _input(at, b, layer == 0, (p == b % P) & (step == 0), norm, eps, C, BK, R)
                place = (q_ptr + b * C, cache[0], b, tl.load(lengths_ptr + b), B, H, capacity)
                _store_qkv(y, w_qkv[0], w_qkv[1], w_qkv[2], first, end_qkv, place, C, D, K_C, R, G_QKV)
            w_qkv = _rows_of(qkv, i, first + G_QKV * R, end_qkv, 3 * C, C, ALIGN, BK, R, G_QKV)
        _arrive(counters_ptr)
        arrivals += P
        held = _tiles_of(cache, p, splits, lengths_ptr, D, BLOCK_D, SPLIT)
        w_out = _rows_of(out, i, p * N_OUT, end_out, C, C, ALIGN, BK, R, G_OUT)
        _await(counters_ptr, arrivals)

        # 2: attention, a split of a row's head at a time
        scale_log2 = tl.load(scores_ptr + layer)
        for item in tl.range(p, items, P):
            to = (q_ptr, part_ptr, lse_ptr, num_splits)
            _attend_to_item(held, cache, item, splits, lengths_ptr, to, scale_log2, D, BLOCK_D, SPLIT)
            held = _tiles_of(cache, item + P, splits, lengths_ptr, D, BLOCK_D, SPLIT)
        _arrive(counters_ptr)
        arrivals += P
        norm = _norm_of(ln_2_ptr, i, C, ALIGN, BK, R)
        w_fc = _rows_of(fc, i, p * N_FC, end_fc, N, C, ALIGN, BK, R, G_FC)
        _await(counters_ptr, arrivals)

        # 3: x += merge(o) W + b
        for step in tl.range((N_OUT + G_OUT * R - 1) // (G_OUT * R)):
            first = p * N_OUT + step * (G_OUT * R)
            for b in tl.range(B):
                filled = tl.load(lengths_ptr + b) // SPLIT + 1
                o = _merged(part_ptr, lse_ptr, b * H, filled, num_splits, C, D, BLOCK_D, BK, AT_ONCE)
                _add_product(w_out[0], o, w_out[1], w_out[2], x_ptr + b * C, first, end_out, K_C, R, G_OUT)
            w_out = _rows_of(out, i, first + G_OUT * R, end_out, C, C, ALIGN, BK, R, G_OUT)
        _arrive(counters_ptr)
        arrivals += P
        w_proj = _rows_of(proj, i, p * N_OUT, end_out, C, N, ALIGN, BK, R, G_PROJ)
        _await(counters_ptr, arrivals)

        # 4: h = gelu(LN(x) W + b)
        if ONE:
            y = _layer_norm(_activations(x_ptr, C, BK, R), norm[0], norm[1], eps, C, BK)
        for step in tl.range((N_FC + G_FC * R - 1) // (G_FC * R)):
            first = p * N_FC + step * (G_FC * R)
            for b in tl.range(B):
                if not ONE:
                    y = _layer_norm(_activations(x_ptr + b * C, C, BK, R), norm[0], norm[1], eps, C, BK)
                _store_product(w_fc[0], y, w_fc[1], w_fc[2], h_ptr + b * N, first, end_fc, K_C, R, G_FC, True)
            w_fc = _rows_of(fc, i, first + G_FC * R, end_fc, N, C, ALIGN, BK, R, G_FC)
        _arrive(counters_ptr)
        arrivals += P
        is_last = layer + 1 == L
        norm = _norm_of(ln_1_ptr, tl.where(is_last, i, i + 1), C, ALIGN, BK, R)
        none = tl.where(is_last, 0, end_qkv)
        w_qkv = _rows_of(qkv, i + 1, p * N_QKV, none, 3 * C, C, ALIGN, BK, R, G_QKV)
        _await(counters_ptr, arrivals)

        # 5: x += h W + b
        for step in tl.range((N_OUT + G_PROJ * R - 1) // (G_PROJ * R)):
            first = p * N_OUT + step * (G_PROJ * R)
            for b in tl.range(B):
                h = _activations(h_ptr + b * N, N, BK, R)
                _add_product(w_proj[0], h, w_proj[1], w_proj[2], x_ptr + b * C, first, end_out, K_N, R, G_PROJ)
            w_proj = _rows_of(proj, i, first + G_PROJ * R, end_out, C, N, ALIGN, BK, R, G_PROJ)
        _arrive(counters_ptr)
        arrivals += P

    # 6: logits = LN(x) W, and of each program's the best one
    norm = _norm_of(ln_f_ptr, 0, C, ALIGN, BK, R)
    head = (head_ptr, head_scale_ptr, None)
    w = _rows_of(head, 0, p * N_HEAD, end_head, V, C, ALIGN, BK, R, G_HEAD)
    _await(counters_ptr, arrivals)
    if ONE:
        y = _layer_norm(_activations(x_ptr, C, BK, R), norm[0], norm[1], eps, C, BK)
    for step in tl.range((N_HEAD + G_HEAD * R - 1) // (G_HEAD * R)):
        first = p * N_HEAD + step * (G_HEAD * R)
        ahead = _rows_of(head, 0, first + G_HEAD * R, end_head, V, C, ALIGN, BK, R, G_HEAD)
        for b in tl.range(B):
            if not ONE:
                y = _layer_norm(_activations(x_ptr + b * C, C, BK, R), norm[0], norm[1], eps, C, BK)
            row = logits_ptr + tl.cast(b, tl.int64) * V
            _store_product(w[0], y, w[1], w[2], row, first, end_head, K_C, R, G_HEAD, False)
        w = ahead
    tl.debug_barrier()  # the program's own logits, stored by other threads
    for b in tl.range(B):
        tl.store(best_ptr + b * P + p, _best(logits_ptr + tl.cast(b, tl.int64) * V, p * N_HEAD, end_head, BLOCK_V))
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + COUNTERS // 2, 1, sem="acq_rel", scope="gpu") == P - 1:
        tl.debug_barrier()  # all others have left their last _await
        for b in tl.range(B):
            best = tl.load(best_ptr + b * P + tl.arange(0, BLOCK_P), mask=tl.arange(0, BLOCK_P) < P, other=NOTHING)
            _say(tl.max(best, 0), b, ids_ptr, lengths_ptr, said_ptr, capacity)
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + COUNTERS // 2, 0)


def _parts(B, C, H, N, V, splits):
    """How many programs have rows of weights, or splits of keys, to go through."""
    return max(triton.cdiv(max(3 * C, N, V), WARPS), B * H * splits)


def _programs(parts):
    """One for each multiprocessor of the chip: as many as are resident at once, whatever registers they take.

    In Triton's interpreter one: it runs them one after the other, and the first would wait for the second.
    """
    if INTERPRETED:
        return 1
    if PROGRAMS is not None:
        return PROGRAMS
    active = driver.active
    return min(parts, active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"])


def _plan(B, C, H, N, V, L, capacity, dtype, itemsize, eps):
    D = C // H
    keys = split_keys(D, dtype)
    splits = triton.cdiv(capacity, keys)
    P = _programs(_parts(B, C, H, N, V, splits))

    def groups(rows, columns):
        most = BYTES // itemsize // triton.cdiv(columns, BK)
        return max(1, min(most, triton.cdiv(triton.cdiv(rows, P), WARPS)))

    options = {
        "V": V,
        "C": C,
        "N": N,
        "D": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "SPLIT": keys,
        "ONE": B == 1,
        "P": P,
        "BK": BK,
        "R": WARPS,
        "G_QKV": groups(3 * C, C),
        "G_OUT": groups(C, C),
        "G_FC": groups(N, C),
        "G_PROJ": groups(C, N),
        "G_HEAD": groups(V, C),
        "AT_ONCE": AT_ONCE,
        "ALIGN": ALIGN,
        "BLOCK_P": triton.next_power_of_2(P),
        "BLOCK_V": triton.next_power_of_2(triton.cdiv(V, P)),
    }
    how = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True, "launch_cooperative_grid": True}
    return (P,), (L, B, H, capacity, splits, eps), options | how, {}


_launch_step = Launcher(_decode_persistent_kernel, _plan)


@dataclass
class GridBuffers:
    """What the programs of a grid have in common, beside DecodeBuffers."""

    best: torch.Tensor  # [B, >= P] int64: of each program's logits, rows P apart
    counters: torch.Tensor  # [COUNTERS] int32, zero before and after a step
    scores: torch.Tensor  # [L] fp32: the scale of each layer's scores, in log2 units

    @classmethod
    def make(cls, B, V, capacity, buffers, scales, head_dim):
        C, N, device = buffers.x.shape[1], buffers.h.shape[1], buffers.x.device
        parts = _parts(B, C, C // head_dim, N, V, buffers.part.shape[2])
        best = torch.zeros(B, parts, dtype=torch.long, device=device)
        counters = torch.zeros(COUNTERS.value, dtype=torch.int32, device=device)
        scores = torch.tensor([scale * LOG2E for scale in scales], dtype=torch.float32, device=device)
        return cls(best, counters, scores)


def persistent_step(ids, lengths, said, cache, weights, embeddings, logits, buffers, grid, eps):
    """decode_step() and choose() in one launch: writes logits [B, V], the cache, ids [B], said, lengths [B].

    weights: a `Weights`. buffers, grid: DecodeBuffers and GridBuffers. said: [B, capacity] int64. All else as those two
    have it, with one new token of each text.
    """
    L, _, B, H, capacity, D = cache.shape
    stacks = [
        tensor
        for name in ("qkv", "out", "fc", "proj")
        for tensor in (weights.stacks[name].weight, weights.stacks[name].scale, weights.biases[name])
    ]
    stacks[6:6] = [weights.ln_2]
    sizes = B, H * D, H, buffers.h.shape[1], logits.shape[1], L, capacity
    tensors = (*embeddings, ids, lengths, said, weights.ln_1, *stacks, weights.ln_f, *weights.head, grid.scores, cache)
    tensors += (logits, buffers.x, buffers.q, buffers.h, buffers.part, buffers.lse, grid.best, grid.counters)
    _launch_step(tensors, *sizes, cache.dtype, stacks[0].element_size(), eps)
