"""flash_attention_2: Dao's `flash_attn` package, 2.1 or newer (older ones align the causal mask top-left).

It is imported at the first call.
"""

import torch
import torch.nn.functional as F

from model.attention.registry import register_attention


@register_attention(
    "flash_attention_2",
    package="flash_attn",
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    max_head_dim=256,
    padding=True,
    dropout=True,
    unequal_lengths=True,
    upcast=True,
)
def flash_attention_2(q, k, v, *, scale, causal, kv_start, kv_end, q_start, dropout_p, upcast):
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
