"""The backends that need nothing beside torch and this project: eager, sdpa, triton."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention import MAX_HEAD_DIM
from kernels.checks import check_device
from kernels.configs import HOPPER, HOPPER_HEAD_DIMS
from kernels.library import INTERPRETED, active_arch
from model.attention.registry import register_attention


@register_attention(
    "eager",
    padding=True,
    dropout=True,
    unequal_lengths=True,
    upcast=True,
    weights=True,
    capturable=True,
)
def eager(q, k, v, *, return_weights, **options):
    o, p = reference.attention(q, k, v, **options)
    o = o.transpose(1, 2).contiguous().transpose(1, 2)  # memory order [B, T, H, D]
    return o, p if return_weights else None


@register_attention("sdpa", padding=True, dropout=True, unequal_lengths=True, upcast=True, capturable=True)
def sdpa(q, k, v, *, scale, causal, kv_start, kv_end, q_start, dropout_p, upcast):
    """torch.nn.functional.scaled_dot_product_attention. Padding costs it a boolean [B, 1, T_q, T_k] mask.

    Its scores are fp32 throughout, so `upcast` changes nothing.
    """
    T_q, T_k = q.shape[-2], k.shape[-2]
    padded = kv_start is not None or kv_end is not None or q_start is not None
    # torch aligns is_causal top-left, which agrees with the contract only where the lengths are equal.
    if not padded and causal and T_q == T_k:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale), None
    if not padded and (not causal or T_q == 1):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale), None
    visible = reference.visible_keys(
        T_q, T_k, causal=causal, kv_start=kv_start, kv_end=kv_end, q_start=q_start, device=q.device
    )
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    return o.masked_fill(~visible.any(-1, keepdim=True), 0.0), None


def triton_runs_on(device):
    """Whether our kernels run on `device`: a GPU that they support, or a CPU that is interpreting or simulating one."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        check_device("attention", torch.empty(0, device=device), "q")
    except ValueError:
        return False
    return True


_EVERY_CHIPS: dict[str, Any] = {  # what the portable kernels do, and so these two
    "dtypes": (torch.float16, torch.bfloat16, torch.float32),
    "max_head_dim": MAX_HEAD_DIM,
    "padding": True,
    "dropout": True,
    "unequal_lengths": True,
    "upcast": True,
    "capturable": True,
    "runs_on": triton_runs_on,
}


@register_attention(
    "triton",
    projection=flash_attention_packed,
    **_EVERY_CHIPS,
)
def triton(q, k, v, *, upcast, **options):
    """The kernels of this project, the fastest known. Their scores are fp32 throughout, so `upcast` changes nothing."""
    return flash_attention(q, k, v, **options), None


@register_attention(
    "triton-portable",
    projection=partial(flash_attention_packed, kernel="portable"),
    **_EVERY_CHIPS,
)
def triton_portable(q, k, v, *, upcast, **options):
    """Those of them that every chip runs, on Hopper too."""
    return flash_attention(q, k, v, kernel="portable", **options), None


def hopper_runs_on(device):
    """Whether kernels/attention/hopper.py runs on `device`: compute capability 9.0, or a simulation of it."""
    if device.type == "cuda":
        is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
        return is_hopper and not INTERPRETED
    return triton_runs_on(device) and active_arch() == 90


@register_attention(
    "triton-hopper",
    projection=partial(flash_attention_packed, kernel="hopper"),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=HOPPER_HEAD_DIMS,
    unequal_lengths=True,
    upcast=True,
    capturable=True,
    runs_on=hopper_runs_on,
)
def triton_hopper(q, k, v, *, upcast, **options):
    """Those in Gluon, kernels/attention/hopper.py and hopper_backward.py, or an error."""
    return flash_attention(q, k, v, kernel="hopper", **options), None


@register_attention(
    "triton-one-pass",
    projection=partial(flash_attention_packed, kernel="hopper", deterministic=False),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=tuple(HOPPER["one pass"]),
    unequal_lengths=True,
    upcast=True,
    capturable=True,
    runs_on=hopper_runs_on,
)
def triton_one_pass(q, k, v, *, upcast, **options):
    """The same, but hopper_one_pass.py's backward from 2048 queries on: dq's last bits differ from run to run."""
    return flash_attention(q, k, v, kernel="hopper", deterministic=False, **options), None
