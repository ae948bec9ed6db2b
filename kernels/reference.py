"""The plain-PyTorch definition of every op: what the kernels must compute, written to be read.

The eager attention backend runs these functions, the tests take their baselines from them, and in float64 they are the
oracle. None of them is fast; all of them are differentiable by autograd.
"""

import math

import torch

SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def visible_keys(T_q, T_k, *, causal, kv_start=None, kv_end=None, q_start=None, device=None):
    """Which keys each query sees: bool, broadcastable to [B, 1, T_q, T_k], or None where every query sees every key.

    Query i of row b sees key j if  kv_start[b] <= j < kv_end[b]  and, when causal,  j <= q_start[b] + i.
    q_start is T_k - T_q unless given: the last query sees the last key (bottom-right alignment).
    """
    mask = None
    j = torch.arange(T_k, device=device)
    if causal:
        i = torch.arange(T_q, device=device)
        first = T_k - T_q if q_start is None else q_start[:, None, None, None]
        mask = j <= first + i[:, None]  # [T_q, T_k] or [B, 1, T_q, T_k]
    for bound, holds in ((kv_start, torch.ge), (kv_end, torch.lt)):
        if bound is not None:
            inside = holds(j, bound[:, None, None, None])  # [B, 1, 1, T_k]
            mask = inside if mask is None else mask & inside
    return mask


def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=True,
    kv_start=None,
    kv_end=None,
    q_start=None,
    dropout_p=0.0,
    keep=None,
    upcast=False,
):
    """softmax(scale * q k^T + mask) v with the probabilities in full: (o [B, H, T_q, D], p [B, H, T_q, T_k]).

    q [B, H, T_q, D], k and v [B, H, T_k, D], one floating dtype; o and p have it too. Scores accumulate as the matrix
    product does and are stored in the input's dtype, or in fp32 throughout with upcast=True; the softmax is fp32 (fp64
    for fp64). A query that sees no key gives 0. keep, bool, stands in for the random choice of dropout.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if upcast:
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    else:
        scores = (q @ k.transpose(-2, -1)) * scale  # [B, H, T_q, T_k]
    visible = visible_keys(
        q.shape[-2], k.shape[-2], causal=causal, kv_start=kv_start, kv_end=kv_end, q_start=q_start, device=q.device
    )
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    p = torch.softmax(scores, dim=-1, dtype=wide)
    if visible is not None:
        p = p.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # softmax over no key is 0 / 0
    p = p.to(v.dtype)
    if keep is not None:
        p = p * keep / (1.0 - dropout_p)
    elif dropout_p:
        p = torch.nn.functional.dropout(p, dropout_p)
    return p @ v, p


def gelu(x):
    """GPT-2's GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Hendrycks and Gimpel 2016, section 2."""
    return 0.5 * x * (1.0 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def layer_norm(x, weight, bias, eps=1e-5):
    """LayerNorm over the last dimension. Ba, Kiros and Hinton 2016."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x, residual, weight, bias, eps=1e-5, *, dropout_p=0.0, keep=None):
    """(y, total): total = residual + dropout(x), and y the LayerNorm of the total as it is stored.

    keep, bool, stands in for the random choice of dropout.
    """
    if keep is not None:
        x = x * keep / (1.0 - dropout_p)
    elif dropout_p:
        x = torch.nn.functional.dropout(x, dropout_p)
    total = residual + x
    return layer_norm(total, weight, bias, eps), total


def bias_gelu(x, bias):
    """gelu(x + bias)."""
    return gelu(x + bias)


def cross_entropy(
    logits,
    target,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    softcap=None,
    lse_square_scale=0.0,
    class_weight=None,
):
    """Cross-entropy of logits [M, V] against target [M]: softmax and loss in fp32 (fp64 for fp64).

    softcap: logits become softcap tanh(logits / softcap). lse_square_scale: times log-sum-exp squared is added to each
    row's loss; its mean is over rows, that of the rest over the targets' class weights.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    weight = None if class_weight is None else class_weight.to(wide.dtype)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    loss = torch.nn.functional.cross_entropy(wide, target, weight=weight, label_smoothing=label_smoothing, **options)
    if lse_square_scale:
        counted = target != ignore_index
        z_loss = lse_square_scale * torch.logsumexp(wide, 1).square().masked_fill(~counted, 0.0)
        loss = loss + {"none": z_loss, "sum": z_loss.sum(), "mean": z_loss.sum() / counted.sum()}[reduction]
    return loss


def linear_cross_entropy(x, weight, target, *, bias=None, **options):
    """cross_entropy of the logits x weight^T + bias, for x [M, C] and weight [V, C], with the logits in full."""
    return cross_entropy(torch.nn.functional.linear(x, weight, bias), target, **options)
