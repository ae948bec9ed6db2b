"""Whole kernels, compiled for each chip, give what plain PyTorch gives."""

import math

import pytest
import torch
import triton
import triton.language as tl
from lanes import across_lanes
from numerics import assert_close

from kernels.attention import flash_attention
from kernels.simulator import simulate
from simulator import kernels

CHIPS = ("sm_80", "sm_90")


@across_lanes(torch.float32, torch.float16, torch.bfloat16, lanes=CHIPS)
@pytest.mark.parametrize("n", [1, 1000, 4096])
def test_copy_is_exact(lane, dtype, n):
    x = torch.randn(n).to(dtype)
    y = torch.full_like(x, float("nan"))
    kernels.copy[(triton.cdiv(n, 512),)](x, y, n, 512)
    assert torch.equal(x, y)


@across_lanes(torch.float32, torch.float16, torch.bfloat16, lanes=CHIPS)
@pytest.mark.parametrize(("T", "D", "BLOCK_M", "BLOCK_N", "num_warps"), [(300, 64, 64, 64, 4), (129, 32, 128, 32, 8)])
def test_attention(lane, dtype, T, D, BLOCK_M, BLOCK_N, num_warps):
    q, k, v = torch.randn(3, 1, 2, T, D).to(dtype)
    o = torch.full_like(q, float("nan"))
    scale = math.log2(math.e) / math.sqrt(D)
    kernels.attention[(triton.cdiv(T, BLOCK_M), 2)](
        q, k, v, o, scale, T, D, BLOCK_M, BLOCK_N, num_warps=num_warps, num_stages=2
    )

    def eager(q, k, v):
        s = (q @ k.mT) / math.sqrt(D)
        return s.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1) @ v

    # fp32 dots run on tf32 tensor cores here: their operands keep as many bits as fp16's.
    baseline = eager(*(x.half() if dtype is torch.float32 else x for x in (q, k, v))).to(dtype)
    assert_close(o, baseline, eager(q.double(), k.double(), v.double()))


@triton.jit
def _product(x_ptr, y_ptr, bias_ptr, o_ptr, START: tl.constexpr):
    i = tl.arange(0, 64)
    acc = tl.full([64, 64], 3.0, tl.float32)
    if START == "bias":
        acc = tl.zeros([64, 64], tl.float32) + 2.0 * tl.load(bias_ptr + i)[None, :]
    x, y = tl.load(x_ptr + i[:, None] * 64 + i[None, :]), tl.load(y_ptr + i[:, None] * 64 + i[None, :])
    tl.store(o_ptr + i[:, None] * 64 + i[None, :], tl.dot(x, y, acc))


@pytest.mark.parametrize("start", ["full", "bias"])
def test_an_accumulator_may_be_made_on_either_side_of_the_fence(start):
    """LLVM moves what makes it past wgmma.fence, and the assembler orders the two."""
    x, y, bias, o = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.randn(64), torch.empty(64, 64)
    with simulate("sm_90"):
        _product[(1,)](x, y, bias, o, START=start)
    torch.testing.assert_close(o, x.float() @ y.float() + (3.0 if start == "full" else 2 * bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_to_a_single_key_runs_on_sm_90(causal):
    q, k, v = (torch.randn(1, 1, 1, 64).bfloat16().requires_grad_() for _ in range(3))
    with simulate("sm_90"):
        o = flash_attention(q, k, v, causal=causal)
        o.sum().backward()
    assert torch.equal(o, v)
    assert torch.equal(v.grad, torch.ones_like(v))
