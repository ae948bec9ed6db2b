"""Inputs for the tests of attention, and the comparison that they share."""

import numerics
import torch

from kernels import flash_attention, reference


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


def check_against_oracle(q, k, v, do, **options):
    """The tolerance rule for o, dq, dk and dv: the oracle and the baseline are kernels.reference.attention."""

    def plain(q, k, v):
        return reference.attention(q, k, v, **options)[0]

    ours = with_gradients(lambda q, k, v: flash_attention(q, k, v, **options), q, k, v, do)
    baseline = with_gradients(plain, q, k, v, do)
    oracle = with_gradients(plain, *(x.double() for x in (q, k, v, do)))
    numerics.assert_close(ours[0], baseline[0], oracle[0], what="o")
    for name, *gradients in zip(("dq", "dk", "dv"), ours[1:], baseline[1:], oracle[1:]):
        numerics.assert_gradient_close(*gradients, what=name, beside=oracle[1:])
