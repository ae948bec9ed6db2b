"""tl.sin and tl.cos, whose reduction of large arguments takes tables of the module, local memory and carries."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.simulator import simulate

pytestmark = pytest.mark.simulate


@triton.jit
def _both(x_ptr, s_ptr, c_ptr, n, B: tl.constexpr):
    offs = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(s_ptr + offs, tl.sin(x), mask=offs < n)
    tl.store(c_ptr + offs, tl.cos(x), mask=offs < n)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sine_and_cosine_of_any_size(arch, seed):
    """Within two units in the last place of 1 from the exact value, from 1e-8 to 1e30."""
    x = torch.cat((torch.linspace(-20, 20, 401), torch.logspace(-8, 30, 300), torch.tensor([0.0, 105615.0, 1e5])))
    s, c = torch.empty_like(x), torch.empty_like(x)
    with simulate(arch, seed=seed):
        _both[(triton.cdiv(len(x), 256),)](x, s, c, len(x), B=256)
    exact = x.numpy().astype(np.float64)
    for found, expected in ((s, np.sin(exact)), (c, np.cos(exact))):
        assert np.abs(found.numpy() - expected).max() < 2 * 2**-23


def test_what_is_not_finite_is_nan():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    s, c = torch.empty_like(x), torch.empty_like(x)
    with simulate("sm_90"):
        _both[(1,)](x, s, c, 4, B=32)
    assert s.isnan().tolist() == c.isnan().tolist() == [True, True, True, False]
