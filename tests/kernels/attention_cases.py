"""Inputs for the tests of attention, and the comparison that they share."""

from itertools import accumulate

import numerics
import torch

from kernels import flash_attention, reference
from kernels.attention.choice import PackedAttention
from kernels.checks import INTERPRETED
from kernels.launch import here


def heads(B, H, T, D, dtype, device):
    """Random q, k or v [B, H, T, D] in memory order [B, T, H, D], as the model has it."""
    return torch.randn(B, T, H, D).to(device, dtype).transpose(1, 2)


def inputs(shape, dtype, device):
    B, H, T_q, T_k, D = shape
    q, do = heads(B, H, T_q, D, dtype, device), heads(B, H, T_q, D, dtype, device)
    return q, heads(B, H, T_k, D, dtype, device), heads(B, H, T_k, D, dtype, device), do


def bounds(device, **rows):
    return {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in rows.items()}


def with_gradients(function, q, k, v, do):
    """function(q, k, v) and the gradients of q, k, v for the output gradient do."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    o = function(q, k, v)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def terms(q, k, v, do=None, **options):
    """The rounding of fp32 sums over the head dim, as scales for assert_close's beside: (o, dq, dk, dv) or (o,), fp64.

    A kernel's fp32 tl.dot is one chain of D fused multiply-adds, which errs by some sqrt(D) u of its terms (Higham and
    Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis"); libraries, and the interpreter's numpy, add
    up parts. A weight errs as its score does; dq and dk are differences dp - delta, which cancel. On an H100, and in
    the simulator just so, dq of D = 256 erred by 4.0e-6, 1.75 times the bound without these. Up to D = 64, in the
    interpreter, and in two-byte dtypes, whose products' rounding hides all this, the bound holds without them; but for
    a single key, where dq and dk are nothing but what dp - delta leaves of terms that cancel to zero: there the terms
    themselves give the scale. (Numpy's products, and with them the interpreter's, round as the processor has it.)
    """
    chained = q.shape[-1] > 64 and not INTERPRETED
    if q.dtype != torch.float32 or not (chained or k.shape[2] == 1):
        return [()] * 4
    q, k, v = q.double(), k.double(), v.double()
    p = reference.attention(q, k, v, **options)[1]  # [B, H, T_q, T_k]
    scale = options.get("scale") or q.shape[-1] ** -0.5
    scores = p * (q @ k.transpose(-2, -1) * scale).abs()
    found = [scores @ v.abs()]
    if do is not None:
        do = do.double()
        dp = (do @ v.transpose(-2, -1)).abs() if chained else do.abs() @ v.abs().transpose(-2, -1)  # or of its terms
        flow = p * dp * scale
        found += [flow @ k.abs(), flow.transpose(-2, -1) @ q.abs(), scores.transpose(-2, -1) @ do.abs()]
    chain = q.shape[-1] ** 0.5 / 4 if chained else 1.0  # sqrt(D) u, in the floor's two units of 2 u
    return [(chain * term,) for term in found]


def check_partial_sums(dtype, device, head_dim, **options):
    """What PackedAttention's backward leaves to be added up, for a ragged length: the sums over rows of dqkv."""
    B, T, H = 2, 70, 2
    C = H * head_dim
    packed = PackedAttention(B, T, C, H, dtype, head_dim**-0.5, 0.0, False)
    qkv, o, do = (torch.randn(B * T, width).to(device, dtype) for width in (3 * C, C, C))
    lse = torch.full((B * H * T,), 4.0, device=device)
    ends = list(accumulate((P * N for _, P, N in packed.partial), initial=packed.partial_at))
    scratch = torch.full((ends[-1],), torch.nan, device=device)
    dqkv = packed.backward(here(), do, qkv, o, lse, scratch, None, None, None)
    parts = [scratch[i:j].view(P, N) for i, j, (_, P, N) in zip(ends, ends[1:], packed.partial)]
    sums = torch.cat([part.double().sum(0) for part in parts])
    torch.testing.assert_close(
        sums, dqkv.double().sum(0), rtol=0.0, atol=1e-6 * float(dqkv.double().abs().sum(0).max())
    )


def check_against_oracle(q, k, v, do, **options):
    """The tolerance rule for o, dq, dk and dv: the oracle and the baseline are kernels.reference.attention."""

    def plain(q, k, v):
        return reference.attention(q, k, v, **options)[0]

    ours = with_gradients(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v, do)
    baseline = with_gradients(plain, q, k, v, do)
    oracle = with_gradients(plain, *(x.double() for x in (q, k, v, do)))
    of_o, *of_gradients = terms(q, k, v, do, **options)
    numerics.assert_close(ours[0], baseline[0], oracle[0], what="o", beside=of_o)
    for name, of, *gradients in zip(("dq", "dk", "dv"), of_gradients, ours[1:], baseline[1:], oracle[1:]):
        numerics.assert_gradient_close(*gradients, what=name, beside=(*oracle[1:], *of))
