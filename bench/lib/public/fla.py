"""flash-linear-attention's kernels: pip install --no-deps fla-core, and einops."""

import torch
import torch.nn.functional as F

from bench.lib.public.cases import case

FLA = "fla-core"
SIZES = "B 1, H 2, T 100, D 32"


def recurrence(q, k, v, decay=None, beta=None, scale=None, bonus=None):
    """Linear attention as its state goes, token by token: what every kernel of this family must compute.

    q, k: [B, T, H, K]; v: [B, T, H, V]; decay: the log of what remains of the state, [B, T, H] or [B, T, H, K];
    beta [B, T, H]: the delta rule's rate; bonus [H, K]: RWKV-6's weight of the present token.
    """
    B, T, H, K = q.shape
    state, rows = q.new_zeros(B, H, K, v.shape[-1]), []
    for t in range(T):
        key, value, query = k[:, t], v[:, t], q[:, t] * (K**-0.5 if scale is None else scale)
        remains = 1 if decay is None else decay[:, t].exp().reshape(B, H, -1, 1)
        if bonus is not None:
            new = key[..., None] * value[..., None, :]
            rows.append(torch.einsum("bhk,bhkv->bhv", query, state + bonus[..., None] * new))
            state = state * remains + new
            continue
        state = state * remains
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", key, state))
        state = state + key[..., None] * value[..., None, :]
        rows.append(torch.einsum("bhk,bhkv->bhv", query, state))
    return torch.stack(rows, 1)


def qkv(randn, T=100, D=32, H=2):
    return {name: randn(1, T, H, D) for name in "qkv"}


def decays(randn, *shape):
    """Logs of numbers between 0.5 and 1, most of them near 1."""
    return F.logsigmoid(randn(*shape).float() + 3).to(randn(1).dtype)


@case(FLA, "linear attention, chunks", SIZES)
def linear_attention(randn):
    from fla.ops.linear_attn import chunk_linear_attn

    return qkv(randn), lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0], recurrence


@case(FLA, "retention, chunks", SIZES)
def retention(randn):
    from fla.ops.retention import chunk_retention

    def plain(q, k, v):
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(2).double()))).to(q.dtype)
        return recurrence(q, k, v, decay=decay.expand(1, 100, 2))

    return qkv(randn), lambda q, k, v: chunk_retention(q, k, v)[0], plain


@case(FLA, "simple GLA, chunks", SIZES)
def simple_gla(randn):
    from fla.ops.simple_gla import chunk_simple_gla

    inputs = qkv(randn) | {"g": decays(randn, 1, 100, 2)}
    return inputs, lambda q, k, v, g: chunk_simple_gla(q, k, v, g.float())[0], recurrence


@case(FLA, "GLA, chunks", SIZES)
def gla(randn):
    from fla.ops.gla import chunk_gla

    inputs = qkv(randn) | {"g": decays(randn, 1, 100, 2, 32)}
    return inputs, lambda q, k, v, g: chunk_gla(q, k, v, g.float())[0], recurrence


@case(FLA, "GLA, recurrent", "B 1, H 2, T 19, D 32")
def gla_recurrent(randn):
    from fla.ops.gla import fused_recurrent_gla

    inputs = qkv(randn, T=19) | {"g": decays(randn, 1, 19, 2, 32)}
    return inputs, lambda q, k, v, g: fused_recurrent_gla(q, k, v, gk=g.float())[0], recurrence


@case(FLA, "delta rule, chunks", SIZES)
def delta_rule(randn):
    from fla.ops.delta_rule import chunk_delta_rule

    def plain(q, k, v, beta):
        return recurrence(q, F.normalize(k, dim=-1), v, beta=beta.sigmoid())

    def theirs(q, k, v, beta):
        return chunk_delta_rule(q, F.normalize(k, dim=-1), v, beta.sigmoid())[0]

    return qkv(randn) | {"beta": randn(1, 100, 2)}, theirs, plain


@case(FLA, "gated delta rule, chunks", SIZES)
def gated_delta_rule(randn):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def plain(q, k, v, g, beta):
        return recurrence(q, F.normalize(k, dim=-1), v, decay=g, beta=beta.sigmoid())

    def theirs(q, k, v, g, beta):
        return chunk_gated_delta_rule(q, F.normalize(k, dim=-1), v, g.float(), beta.sigmoid())[0]

    return qkv(randn) | {"g": decays(randn, 1, 100, 2), "beta": randn(1, 100, 2)}, theirs, plain


@case(FLA, "gated delta rule, recurrent", "B 1, H 2, T 19, D 32", gradients=False)
def gated_delta_rule_recurrent(randn):
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    def plain(q, k, v, g, beta):
        return recurrence(q, F.normalize(k, dim=-1), v, decay=g, beta=beta.sigmoid())

    def theirs(q, k, v, g, beta):
        return fused_recurrent_gated_delta_rule(q, F.normalize(k, dim=-1), v, g.float(), beta=beta.sigmoid())[0]

    return qkv(randn, T=19) | {"g": decays(randn, 1, 19, 2), "beta": randn(1, 19, 2)}, theirs, plain


@case(FLA, "Kimi delta attention, chunks", SIZES)
def kda(randn):
    from fla.ops.kda import chunk_kda

    def plain(q, k, v, g, beta):
        return recurrence(q, F.normalize(k, dim=-1), v, decay=g, beta=beta.sigmoid())

    def theirs(q, k, v, g, beta):
        return chunk_kda(q, F.normalize(k, dim=-1), v, g.float(), beta.sigmoid())[0]

    return qkv(randn) | {"g": decays(randn, 1, 100, 2, 32), "beta": randn(1, 100, 2)}, theirs, plain


@case(FLA, "RWKV-6, chunks", SIZES)
def rwkv6(randn):
    from fla.ops.rwkv6 import chunk_rwkv6

    inputs = qkv(randn) | {"w": decays(randn, 1, 100, 2, 32), "u": randn(2, 32)}
    return (
        inputs,
        lambda r, k, v, w, u: chunk_rwkv6(r, k, v, w.float(), u)[0],
        lambda r, k, v, w, u: recurrence(r, k, v, decay=w, bonus=u),
    )


@case(FLA, "HGRN, recurrent", "B 2, T 35, D 96", torch.float32)
def hgrn(randn):
    from fla.ops.hgrn import fused_recurrent_hgrn

    def plain(x, g):
        state, rows = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = g[:, t].exp() * state + x[:, t]
            rows.append(state)
        return torch.stack(rows, 1)

    return {"x": randn(2, 35, 96), "g": decays(randn, 2, 35, 96)}, lambda x, g: fused_recurrent_hgrn(x, g)[0], plain


@case(FLA, "RWKV-7, chunks", SIZES)
def rwkv7(randn):
    from fla.ops.rwkv7 import chunk_rwkv7

    def plain(r, w, k, v, a):
        at, state, rows = F.normalize(a, dim=-1), k.new_zeros(1, 2, 32, 32), []
        for t in range(100):
            erased = torch.einsum("bhk,bhkv->bhv", -at[:, t], state)
            state = state * w[:, t].exp()[..., None] + (at[:, t] / 2)[..., None] * erased[..., None, :]
            state = state + k[:, t, ..., None] * v[:, t, ..., None, :]
            rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
        return torch.stack(rows, 1)

    def theirs(r, w, k, v, a):
        at = F.normalize(a, dim=-1)
        return chunk_rwkv7(r, w, k, v, -at, at / 2)[0]

    inputs = {"r": randn(1, 100, 2, 32), "w": decays(randn, 1, 100, 2, 32)}
    return inputs | {name: randn(1, 100, 2, 32) for name in ("k", "v", "a")}, theirs, plain


def _attention(q, k, v, bias=0.0):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@case(FLA, "softmax attention", SIZES)
def attention(randn):
    from fla.ops.attn import parallel_attn

    return qkv(randn), lambda q, k, v: parallel_attn(q, k, v), _attention


@case(FLA, "forgetting attention", SIZES)
def forgetting_attention(randn):
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    def plain(q, k, v, g):
        total = g.cumsum(1).transpose(1, 2)
        return _attention(q, k, v, bias=total[..., None] - total[..., None, :])

    inputs = qkv(randn) | {"g": decays(randn, 1, 100, 2)}
    return inputs, lambda q, k, v, g: parallel_forgetting_attn(q, k, v, g.float()), plain


@case(FLA, "stick-breaking attention", SIZES, gradients=False)
def stickbreaking_attention(randn):
    from fla.ops.stickbreaking_attn.parallel import parallel_stickbreaking_attn

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = q @ k.mT / q.shape[-1] ** 0.5
        past = torch.ones(100, 100, dtype=torch.bool).tril(-1)
        rest = F.logsigmoid(-z).masked_fill(~past, 0)  # what token j leaves of the stick
        left = rest.flip(-1).cumsum(-1).flip(-1) - rest
        return ((F.logsigmoid(z) + left).exp().masked_fill(~past, 0) @ v).transpose(1, 2)

    return qkv(randn), lambda q, k, v: parallel_stickbreaking_attn(q, k, v, 32**-0.5)[0], plain


@case(FLA, "short convolution with SiLU", "B 2, T 65, C 96, width 4")
def short_convolution(randn):
    from fla.modules.causal_conv1d import causal_conv1d

    def plain(x, weight, bias):
        padded = F.pad(x.transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=96)).transpose(1, 2)

    inputs = {"x": randn(2, 65, 96), "weight": randn(96, 4), "bias": randn(96)}
    return inputs, lambda x, w, b: causal_conv1d(x, w, b, activation="silu")[0], plain


@case(FLA, "rotary embedding", "B 2, T 19, H 3, D 64")
def rotary(randn):
    from fla.modules.rotary import rotary_embedding

    angles = torch.outer(torch.arange(19), 10000.0 ** -torch.linspace(0, 1, 33)[:-1])
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)

    def plain(x):
        (a, b), c, s = x.chunk(2, -1), cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        return torch.cat([a * c - b * s, a * s + b * c], -1)

    return {"x": randn(2, 19, 3, 64)}, lambda x: rotary_embedding(x, cos, sin), plain


def _rms_norm_gated(N):
    def make(randn):
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        def plain(x, gate, weight):
            return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(gate)

        inputs = {"x": randn(7, N), "gate": randn(7, N), "weight": randn(N)}
        return inputs, lambda x, gate, weight: rms_norm_gated(x, gate, weight, None), plain

    return make


for N in (96, 770):  # up to 512 columns several rows at once, beyond one by one
    case(FLA, "RMSNorm with a gate", f"7 x {N}")(_rms_norm_gated(N))


@case(FLA, "residual addition and LayerNorm", "7 x 96", torch.float32)
def add_layer_norm(randn):
    from fla.modules.norm.layernorm import layer_norm

    inputs = {"x": randn(7, 96), "residual": randn(7, 96), "weight": randn(96), "bias": randn(96)}
    return (
        inputs,
        lambda x, residual, w, b: layer_norm(x, w, b, residual=residual),
        lambda x, residual, w, b: F.layer_norm(x + residual, (96,), w, b, 1e-5),
    )


@case(FLA, "SwiGLU and a projection", "7 x 96 by 96 x 50")
def swiglu_linear(randn):
    from fla.modules.activations import swiglu_linear

    inputs = {"x": randn(7, 96), "y": randn(7, 96), "weight": randn(50, 96)}
    return inputs, lambda x, y, w: swiglu_linear(x, y, w, None), lambda x, y, w: (F.silu(x) * y) @ w.T


@case(FLA, "cumulative sum", "B 1, T 100, H 2, D 32", torch.float32, gradients=False)
def cumulative_sum(randn):
    from fla.ops.utils import chunk_global_cumsum

    return {"x": randn(1, 100, 2, 32)}, lambda x: chunk_global_cumsum(x), lambda x: x.cumsum(1)


@case(FLA, "mean pooling", "B 1, T 100, H 2, D 32, 16 at once")
def mean_pooling(randn):
    from fla.ops.utils.pooling import mean_pooling

    def plain(x):
        return torch.stack([piece.mean(1) for piece in x.split(16, 1)], 1)

    return {"x": randn(1, 100, 2, 32)}, lambda x: mean_pooling(x, 16), plain


@case(FLA, "token shift", "B 2, T 35, D 96")
def token_shift(randn):
    from fla.modules.token_shift import token_shift

    return {"x": randn(2, 35, 96)}, lambda x: token_shift(x), lambda x: F.pad(x, (0, 0, 1, -1)) - x


@case(FLA, "L2 norm", "7 x 96")
def l2_norm(randn):
    from fla.modules.norm.l2norm import l2norm

    return {"x": randn(7, 96)}, lambda x: l2norm(x), lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@case(FLA, "output head and cross-entropy", "20 x 64, vocabulary 1003")
def linear_cross_entropy(randn):
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    target = torch.randint(0, 1003, (20,))
    return (
        {"x": randn(20, 64), "weight": randn(1003, 64) / 8},
        lambda x, weight: fused_linear_cross_entropy_loss(x, target, weight),
        lambda x, weight: F.cross_entropy(x @ weight.T, target),
    )


@case(FLA, "product of matrices", "130 x 70 by 70 x 50", gradients=False)
def product(randn):
    from fla.ops.utils.matmul import matmul

    return {"a": randn(130, 70), "b": randn(70, 50)}, lambda a, b: matmul(a, b), lambda a, b: a @ b


@case(FLA, "inverses of triangles", "B 1, T 128, H 2, 64 x 64", torch.float32, gradients=False)
def inverse(randn):
    from fla.ops.utils import solve_tril

    def plain(a):
        blocks = a.reshape(1, 2, 64, 2, 64).transpose(2, 3).tril(-1)
        return (torch.eye(64, dtype=a.dtype) + blocks).inverse().transpose(2, 3).reshape(a.shape)

    a = (randn(1, 2, 64, 2, 64).transpose(2, 3).tril(-1) / 8).transpose(2, 3).reshape(1, 128, 2, 64)
    return {"a": a}, lambda a: solve_tril(a), plain
