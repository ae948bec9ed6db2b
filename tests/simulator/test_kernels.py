"""Whole kernels, compiled for each chip, give what plain PyTorch gives."""

import math

import pytest
import torch
import triton
from lanes import across_lanes
from numerics import assert_close

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
