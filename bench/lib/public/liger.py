"""Liger-Kernel's kernels: pip install liger-kernel."""

import torch
import torch.nn.functional as F

from bench.lib.public.cases import case

LIGER = "liger-kernel"


@case(LIGER, "RMSNorm", "7 x 770")
def rms_norm(randn):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def plain(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    inputs = {"x": randn(7, 770), "weight": randn(770)}
    return inputs, lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False), plain


@case(LIGER, "RMSNorm, a block of rows", "9000 x 96")
def rms_norm_block(randn):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def plain(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    inputs = {"x": randn(9000, 96), "weight": randn(96)}
    return inputs, lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "gemma", False), plain


@case(LIGER, "residual addition and RMSNorm", "7 x 770")
def fused_add_rms_norm(randn):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def plain(x, residual, weight):
        return F.rms_norm(x + residual, x.shape[-1:], weight, 1e-6), x + residual

    inputs = {"x": randn(7, 770), "residual": randn(7, 770), "weight": randn(770)}
    return inputs, lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6), plain


@case(LIGER, "LayerNorm", "7 x 770", torch.float32)
def layer_norm(randn):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    inputs = {"x": randn(7, 770), "weight": randn(770), "bias": randn(770)}
    return (
        inputs,
        lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5),
    )


@case(LIGER, "GroupNorm", "3 x 12 x 50, 4 groups", torch.float32)
def group_norm(randn):
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    inputs = {"x": randn(3, 12, 50), "weight": randn(12), "bias": randn(12)}
    return (
        inputs,
        lambda x, w, b: LigerGroupNormFunction.apply(x, w, b, 12, 4, 1e-5),
        lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5),
    )


@case(LIGER, "dynamic tanh", "7 x 770", torch.float32)
def dynamic_tanh(randn):
    from liger_kernel.ops.dyt import LigerDyTFunction

    inputs = {"x": randn(7, 770), "alpha": randn(1), "gamma": randn(770), "beta": randn(770)}
    return inputs, LigerDyTFunction.apply, lambda x, alpha, gamma, beta: torch.tanh(alpha * x) * gamma + beta


@case(LIGER, "rotary embedding", "B 2, H 4 and 2, T 19, D 64")
def rope(randn):
    from liger_kernel.ops.rope import LigerRopeFunction

    angles = torch.outer(torch.arange(19), 10000.0 ** -torch.linspace(0, 1, 33)[:-1])
    cos, sin = (f(torch.cat([angles, angles], -1))[None].to(torch.bfloat16) for f in (torch.cos, torch.sin))

    def plain(q, k):
        def turned(x):
            a, b = x.chunk(2, -1)
            return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)

        return turned(q), turned(k)

    return (
        {"q": randn(2, 4, 19, 64), "k": randn(2, 2, 19, 64)},
        lambda q, k: LigerRopeFunction.apply(q, k, cos, sin),
        plain,
    )


@case(LIGER, "SwiGLU", "7 x 770")
def swiglu(randn):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"a": randn(7, 770), "b": randn(7, 770)}, LigerSiLUMulFunction.apply, lambda a, b: F.silu(a) * b


@case(LIGER, "GeGLU", "7 x 770")
def geglu(randn):
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    inputs = {"a": randn(7, 770), "b": randn(7, 770)}
    return inputs, LigerGELUMulFunction.apply, lambda a, b: F.gelu(a, approximate="tanh") * b


@case(LIGER, "ReLU squared", "7 x 770")
def relu_squared(randn):
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return {"x": randn(7, 770)}, LigerReLUSquaredFunction.apply, lambda x: x.relu() ** 2


@case(LIGER, "softmax", "5 x 3001")
def softmax(randn):
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return {"x": randn(5, 3001)}, LigerSoftmaxFunction.apply, lambda x: x.softmax(-1)


@case(LIGER, "sparsemax", "5 x 301", torch.float32)
def sparsemax(randn):
    from liger_kernel.ops.sparsemax import LigerSparsemaxFunction

    def plain(x):
        z = x.sort(-1, descending=True).values
        above = (z.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1)
        support = (z > above).sum(-1, keepdim=True)
        return (x - above.gather(-1, support - 1)).relu()

    return {"x": randn(5, 301)}, lambda x: LigerSparsemaxFunction.apply(x, -1), plain


@case(LIGER, "cross-entropy", "6 x 5003", torch.float32)
def cross_entropy(randn):
    from liger_kernel.transformers.functional import liger_cross_entropy

    target = torch.randint(0, 5003, (6,))
    target[2] = -100
    return (
        {"logits": 3 * randn(6, 5003)},
        lambda logits: liger_cross_entropy(logits * 1, target),  # it writes the gradient over its input
        lambda logits: F.cross_entropy(logits, target),
    )


@case(LIGER, "output head and cross-entropy", "20 x 64, vocabulary 1003", torch.float32)
def fused_linear_cross_entropy(randn):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    target = torch.randint(0, 1003, (20,))
    return (
        {"x": randn(20, 64), "weight": randn(1003, 64) / 8},
        lambda x, weight: liger_fused_linear_cross_entropy(x, weight, target),
        lambda x, weight: F.cross_entropy(x @ weight.T, target),
    )


@case(LIGER, "KL divergence", "6 x 1003", torch.float32)
def kl_divergence(randn):
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    target = torch.randn(6, 1003).softmax(-1)
    return (
        {"logits": randn(6, 1003)},
        lambda logits: LigerKLDivLossFunction.apply(logits.log_softmax(-1), target, "batchmean"),
        lambda logits: F.kl_div(logits.log_softmax(-1), target.to(logits.dtype), reduction="batchmean"),
    )


@case(LIGER, "Jensen-Shannon divergence", "6 x 1003", torch.float32)
def js_divergence(randn):
    from liger_kernel.ops.jsd import LigerJSDFunction

    target = torch.randn(6, 1003).log_softmax(-1)

    def plain(logits):
        p, q = target.to(logits.dtype), logits.log_softmax(-1)
        m = ((p.exp() + q.exp()) / 2).log()
        return ((p.exp() * (p - m) + q.exp() * (q - m)) / 2).sum() / len(q)

    return {"logits": randn(6, 1003)}, lambda x: LigerJSDFunction.apply(x.log_softmax(-1), target), plain


@case(LIGER, "total variation distance", "6 x 1003", torch.float32)
def tv_distance(randn):
    from liger_kernel.ops.tvd import LigerTVDLossFunction

    target = torch.randn(6, 1003).softmax(-1)

    def plain(logits):
        return (logits.softmax(-1) - target.to(logits.dtype)).abs().sum() / (2 * len(logits))

    return {"logits": randn(6, 1003)}, lambda x: LigerTVDLossFunction.apply(x.softmax(-1), target), plain


@case(LIGER, "neighbourhood attention", "B 1, H 2, T 65, D 32, 7 neighbours")
def neighbourhood_attention(randn):
    from liger_kernel.ops.fused_neighborhood_attention import LigerFusedNeighborhoodAttentionFunction

    def plain(q, k, v):
        i = torch.arange(q.shape[-2])
        far = (i[:, None] - i).abs() > 3
        scores = (q @ k.mT / 32**0.5).masked_fill(far, float("-inf"))
        return scores.softmax(-1) @ v

    inputs = {name: randn(1, 2, 65, 32) for name in "qkv"}
    return inputs, lambda q, k, v: LigerFusedNeighborhoodAttentionFunction.apply(q, k, v, 7, 1, None), plain


@case(LIGER, "multi-token attention's mask and softmax", "B 1, C 2, 65 x 65", torch.float32)
def multi_token_attention(randn):
    from liger_kernel.ops.multi_token_attention import LigerMultiTokenAttentionFunction

    future = torch.ones(65, 65, dtype=torch.bool).triu(1)

    def plain(scores, weight):
        made = scores.masked_fill(future, float("-inf")).softmax(-1)
        return F.conv2d(made, weight, padding=(1, 1)).masked_fill(future, 0)

    inputs = {"scores": randn(1, 2, 65, 65), "weight": randn(2, 2, 3, 3)}
    return inputs, lambda s, w: LigerMultiTokenAttentionFunction.apply(s, w, None, 1, (1, 1), 1, 1, False), plain
