"""What `kernel_report.py` reports: one call of an op at a representative size, and what its kernels must at least move.

To add a kernel, write a function that makes inputs and returns the call and, for each kernel that the call launches,
its output elements and the fewest bytes that it could read and write:

    @case("layer norm bf16 N=768")
    def layer_norm():
        x = ...
        return lambda: ops.layer_norm(x, ...), {"_layer_norm_forward_kernel": Work(outputs=x.numel(), least_bytes=...)}
"""

from dataclasses import dataclass

import torch

from kernels import flash_attention


@dataclass(frozen=True)
class Work:
    """What a launch is for: output elements, and the bytes of its inputs and outputs, each counted once."""

    outputs: int
    least_bytes: int


CASES = {}  # name -> function that makes (call, {kernel's name: Work})


def case(name):
    def register(make):
        CASES[name] = make
        return make

    return register


def _attention(dtype, B, H, T, D):
    def make():
        torch.manual_seed(0)
        q, k, v = (torch.randn(B, H, T, D).to(dtype).requires_grad_() for _ in range(3))
        do = torch.randn(B, H, T, D).to(dtype)
        tensor, row = B * H * T * D * dtype.itemsize, B * H * T * 4  # lse and delta are fp32 rows
        work = {
            "_attention_forward_kernel": Work(B * H * T * D, 4 * tensor + row),  # q k v; o lse
            "_attention_dq_kernel": Work(B * H * T * D, 6 * tensor + 2 * row),  # q k v o do lse; dq delta
            "_attention_dkdv_kernel": Work(2 * B * H * T * D, 6 * tensor + 2 * row),  # q k v do lse delta; dk dv
        }
        return lambda: flash_attention(q, k, v).backward(do), work

    return make


case("attention bf16 B1 H2 T1024 D64")(_attention(torch.bfloat16, 1, 2, 1024, 64))
case("attention bf16 B1 H2 T512 D128")(_attention(torch.bfloat16, 1, 2, 512, 128))
case("attention fp32 B1 H1 T256 D64")(_attention(torch.float32, 1, 1, 256, 64))
