"""flex: torch.nn.attention.flex_attention, compiled.

On a CPU it has no backward (torch 2.13 refuses inputs that require a gradient), so it is declared for GPUs alone. It
has no dropout.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model.attention.registry import register_attention

# Compiled code is kept per head dim, dtype, kind of mask, with and without a gradient; torch stops at 8 unless told.
FLEX_COMPILATIONS = 256


@register_attention(
    "flex",
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    max_head_dim=256,
    padding=True,
    unequal_lengths=True,
    upcast=True,
)
def flex(q, k, v, *, scale, causal, kv_start, kv_end, q_start, upcast):
    """torch.nn.attention.flex_attention. Its scores are fp32 throughout, so `upcast` changes nothing.

    The block mask is built from all T_q x T_k pairs and kept for the next call with the same bounds, as the layers of a
    model make it.
    """
    bounds = (kv_start, kv_end, q_start)
    mask = None
    if causal or any(bound is not None for bound in bounds):
        mask = _block_mask(q.shape[-2], k.shape[-2], causal, q.device, *bounds)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    o = attend(q, k, v, block_mask=mask, scale=scale)
    return o.transpose(1, 2).contiguous().transpose(1, 2), None  # memory order [B, T, H, D]


@lru_cache(maxsize=1)
def _compiled_flex():
    # Set once, for the process: a patch around each call takes longer than a short kernel.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_COMPILATIONS)
    # Code for each length, as the others have it. Without fullgraph a failure to compile would go unnoticed.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


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
