"""Attention backends of other people's making, for comparison: flex and flash_attention_2.

`installed()` is what model/attention.py registers.

flex is torch.nn.attention.flex_attention, compiled. On a CPU it has no backward (torch 2.13 refuses inputs that require
a gradient), so it is declared for GPUs alone. It has no dropout.

flash_attention_2 is Dao's `flash_attn` package, 2.1 or newer (older ones align
the causal mask top-left), imported at the first call.
"""

import importlib.util
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# Compiled code is kept per head dim, dtype, kind of mask, with and without a gradient; torch stops at 8 unless told.
FLEX_COMPILATIONS = 256


def installed():
    """The backends whose package is there: {name: (forward, capabilities)}, for register_attention."""
    backends = {
        "flex": (
            flex,
            {
                "devices": ("cuda",),
                "dtypes": (torch.float16, torch.bfloat16, torch.float32),
                "max_head_dim": 256,
                "dropout": False,
            },
        )
    }
    if importlib.util.find_spec("flash_attn") is not None:
        capabilities = {"devices": ("cuda",), "dtypes": (torch.float16, torch.bfloat16), "max_head_dim": 256}
        backends["flash_attention_2"] = flash_attention_2, capabilities
    return backends


# flex


def flex(q, k, v, *, scale, causal, kv_start, kv_end, q_start, dropout_p, upcast, return_weights):
    """torch.nn.attention.flex_attention. Its scores are fp32 throughout, so `upcast` changes nothing.

    The block mask is built from all T_q x T_k pairs and kept for the next call with the same bounds, as the layers of a
    model make it.
    """
    bounds = (kv_start, kv_end, q_start)
    mask = None
    if causal or any(bound is not None for bound in bounds):
        mask = _block_mask(q.shape[-2], k.shape[-2], causal, q.device, *bounds)
    if torch.compiler.is_compiling():
        o = flex_attention(q, k, v, block_mask=mask, scale=scale)
    else:
        with torch._dynamo.config.patch(recompile_limit=FLEX_COMPILATIONS):
            o = _compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2), None  # memory order [B, T, H, D]


@lru_cache(maxsize=1)
def _compiled_flex():
    return torch.compile(flex_attention, fullgraph=True)  # without fullgraph a failure to compile would go unnoticed


def _block_mask(T_q, T_k, causal, device, *bounds):
    tensors = [bound for bound in bounds if bound is not None]
    if torch.compiler.is_compiling() or any(bound.is_inference() for bound in tensors):
        return _build_block_mask(T_q, T_k, causal, device, bounds)
    return _kept_block_mask(T_q, T_k, causal, device, bounds, tuple(bound._version for bound in tensors))


@lru_cache(maxsize=4)
def _kept_block_mask(T_q, T_k, causal, device, bounds, versions):
    """Tensors are told apart by identity, and by their version should somebody write to them."""
    return _build_block_mask(T_q, T_k, causal, device, bounds)


def _build_block_mask(T_q, T_k, causal, device, bounds):
    kv_start, kv_end, q_start = bounds
    B = next((bound.shape[0] for bound in bounds if bound is not None), None)

    def visible(b, h, i, j):
        inside = j >= 0
        if causal:
            inside = j <= i + (T_k - T_q if q_start is None else q_start[b])
        if kv_start is not None:
            inside = inside & (j >= kv_start[b])
        if kv_end is not None:
            inside = inside & (j < kv_end[b])
        return inside

    return create_block_mask(visible, B, None, T_q, T_k, device=device)


# flash_attention_2


def flash_attention_2(q, k, v, *, scale, causal, kv_start, kv_end, q_start, dropout_p, upcast, return_weights):
    """The kernels of the flash_attn package. Their scores are fp32 throughout, so `upcast` changes nothing.

    Bounds per row go through the package's form for sequences of unequal length: it costs a copy of the queries and of
    the valid keys, and the host waits for the device to know how long they are.
    """
    flash_attn = _flash_attn()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, D], views
    options = {"dropout_p": dropout_p, "softmax_scale": scale}
    if kv_start is None and kv_end is None and q_start is None:
        o = flash_attn.flash_attn_func(q, k, v, causal=causal, **options)
        return o.contiguous().transpose(1, 2), None  # memory order [B, T, H, D]

    B, T_q, T_k = q.shape[0], q.shape[1], k.shape[1]
    start = torch.zeros(B, dtype=torch.int32, device=q.device) if kv_start is None else kv_start.clamp(0, T_k)
    end = torch.full_like(start, T_k) if kv_end is None else kv_end.clamp(0, T_k)
    first = torch.full_like(start, T_k - T_q) if q_start is None else q_start
    # The package aligns the last query with the last key. Its causal mask therefore fits the queries of a row up to the
    # one that stands at the last valid key; those beyond it see every valid key.
    aligned = torch.zeros_like(start)
    if causal:
        end = torch.minimum(end, first + T_q)
        aligned = (end - first).clamp(min=0)
    keys = _between(start, end, T_k)
    o = q.new_zeros(q.shape)
    for queries, mask in (
        (_between(torch.zeros_like(aligned), aligned, T_q), True),
        (_between(aligned, torch.full_like(aligned, T_q), T_q), False),
    ):
        if queries.any() and keys.any():
            packed = (q[queries], k[keys], v[keys])  # [queries, H, D], [keys, H, D] twice
            lengths = _lengths(queries, keys)
            o = o.index_put((queries,), flash_attn.flash_attn_varlen_func(*packed, **lengths, causal=mask, **options))
    return o.transpose(1, 2), None


def _flash_attn():
    import flash_attn

    major, minor = (int(part) for part in flash_attn.__version__.split(".")[:2])
    if (major, minor) < (2, 1):
        raise ImportError(
            f"attention backend 'flash_attention_2': flash_attn {flash_attn.__version__} is installed; "
            "2.1 or newer is required, since older ones align the causal mask top-left"
        )
    return flash_attn


def _between(start, end, T):
    """bool [B, T]: the positions [start, end) of each row."""
    t = torch.arange(T, device=start.device)
    return (t >= start[:, None]) & (t < end[:, None])


def _lengths(queries, keys):
    """What flash_attn_varlen_func is told of the rows, from the masks [B, T_q] and [B, T_k] of what is packed."""
    result = {}
    for name, mask in (("q", queries), ("k", keys)):
        counts = mask.sum(1, dtype=torch.int32)
        result[f"cu_seqlens_{name}"] = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        result[f"max_seqlen_{name}"] = counts.max().item()
    return result
