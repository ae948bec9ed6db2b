"""Whether tensors are what they were: a sum over all their bits, in which each has a factor of its place.

For elements v_i as integers the sum of v_i f(i) mod 2**32, f(i) odd: a change to one element always shows, any other
but for one chance in four billion. Sums of integers have no order, so the atomics give the same number every time.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launcher

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@triton.jit
def _fingerprint_kernel(x_ptr, sum_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.uint32)
    factor = i.to(tl.uint32) * 0x9E3779B1
    factor = (factor ^ (factor >> 15)) * 0x85EBCA77
    total = tl.sum(x * (factor | 1), 0)
    tl.atomic_add(sum_ptr, total.to(tl.int32, bitcast=True), sem="relaxed")


def _plan(N):
    return (triton.cdiv(N, 4096),), (N,), {"BLOCK": 4096, "num_warps": 4}, {}


_launch = Launcher(_fingerprint_kernel, _plan)


def fingerprints(tensors):
    """A number for each tensor, as a list; it waits for the device once. Tensors must be contiguous."""
    sums = torch.zeros(len(tensors), 4, dtype=torch.int32, device=tensors[0].device)  # each at a multiple of 16 bytes
    for tensor, total in zip(tensors, sums):
        if not tensor.is_contiguous():
            raise ValueError(f"fingerprints: a tensor has strides {tensor.stride()}; it must be contiguous")
        _launch((tensor.detach().view(_INTEGERS[tensor.element_size()]).view(-1), total), tensor.numel())
    return sums[:, 0].tolist()
