"""TMA copies: every swizzle against the addresses that Triton computes for ordinary loads, and zeros outside."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.hopper import _copy_tile
from kernels.simulator import AsyncHazard, SimulatorError, simulate

pytestmark = pytest.mark.simulate


@gluon.jit
def box(desc, out_ptr, first, column, WAITS: gl.constexpr):
    """A box of a [rows, columns] tensor, from row `first` and a column on, to out [32, columns of the box]."""
    shape: gl.constexpr = desc.block_type.shape
    slot = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    mbarrier.expect(full, desc.block_type.nbytes)
    _copy_tile(desc, [first, column], full, slot)
    if WAITS:
        mbarrier.wait(full, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 4], [1, 0])
    rows = gl.arange(0, shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, shape[1], layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * shape[1] + columns[None, :], slot.load(layout))


def copied(x, columns, swizzle, first=0, column=0, waits=True, seed=None):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=2)
    out = torch.full((32, columns), float("nan"), dtype=x.dtype)
    desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [32, columns], layout)
    with simulate("sm_90", seed=seed) as gpu:
        box[(1,)](desc, out, first, column, waits, num_warps=4)
    return out, gpu.launches[0].counters


@pytest.mark.parametrize(("columns", "swizzle"), [(8, 0), (16, 32), (32, 64), (64, 128), (128, 128)])
def test_a_box_lies_where_triton_expects_it(columns, swizzle):
    x = torch.randn(50, 136).half()[:, :128]
    out, counters = copied(x, columns, swizzle, first=5, seed=1)
    assert torch.equal(out, x[5:37, :columns])
    assert counters.global_read == 32 * columns * 2


def test_what_lies_outside_the_tensor_is_zero_and_not_read():
    x = torch.randn(50, 128).half()
    for first, column in ((40, 0), (-10, 0), (3, 96), (60, 0)):
        out, counters = copied(x, 64, 128, first, column)
        expected = torch.zeros(32, 64).half()
        rows, width = range(max(first, 0), min(first + 32, 50)), min(64, 128 - column)
        for row in rows:
            expected[row - first, :width] = x[row, column : column + width]
        assert torch.equal(out, expected)
        assert counters.global_read == len(rows) * width * 2


@pytest.mark.parametrize("seed", [None, 1])
def test_a_box_that_is_not_waited_for(seed):
    with pytest.raises(AsyncHazard, match=r"still fills|without having seen its mbarrier's phase end|in flight"):
        copied(torch.randn(50, 64).half(), 64, 128, waits=False, seed=seed)


def test_a_tensor_that_a_map_cannot_describe():
    x = torch.randn(50, 68).half()[:, :64]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    desc = TensorDescriptor(torch.randn(50, 64).half(), [50, 64], [64, 1], [32, 64], layout)
    desc.base, desc.strides = x, [68, 1]
    with simulate("sm_90"), pytest.raises(SimulatorError, match="positive multiples of 16 are required"):
        box[(1,)](desc, torch.empty(32, 64).half(), 0, 0, True, num_warps=4)
