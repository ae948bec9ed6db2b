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

from kernels import cross_entropy, flash_attention, gelu, layer_norm


@dataclass(frozen=True)
class Work:
    """What a launch is for: output elements, and the bytes of its inputs and outputs, each counted once."""

    outputs: int
    least_bytes: int


CASES: dict = {}  # name -> function that makes (call, {kernel's name: Work})
ARCH_OF: dict = {}  # name of a case that one architecture alone can run -> that architecture


def case(name, arch=None):
    def register(make):
        CASES[name] = make
        if arch is not None:
            ARCH_OF[name] = arch
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
        return lambda: flash_attention(q, k, v, kernel="portable").backward(do), work

    return make


def _hopper(B, H, T, D):
    def make():
        torch.manual_seed(0)
        q, k, v = (torch.randn(B, H, T, D).bfloat16().requires_grad_() for _ in range(3))
        do = torch.randn(B, H, T, D).bfloat16()
        tensor, row = 2 * q.numel(), B * H * T * 4
        work = {
            "_attention_hopper_kernel": Work(q.numel(), 4 * tensor + row),  # q k v; o lse
            "_attention_dq_hopper_kernel": Work(q.numel(), 6 * tensor + 3 * row),  # q k v o do lse; dq, lse and delta
            "_attention_dkdv_hopper_kernel": Work(2 * q.numel(), 6 * tensor + 2 * row),  # as in the portable one
        }
        return lambda: flash_attention(q, k, v, kernel="hopper").backward(do), work

    return make


case("attention bf16 B1 H2 T1024 D64")(_attention(torch.bfloat16, 1, 2, 1024, 64))
case("Hopper attention bf16 B1 H2 T1024 D64", arch="sm_90")(_hopper(1, 2, 1024, 64))
case("attention bf16 B1 H2 T512 D128")(_attention(torch.bfloat16, 1, 2, 512, 128))
case("attention fp32 B1 H1 T256 D64")(_attention(torch.float32, 1, 1, 256, 64))


@case("layer norm bf16 M512 N768")
def _layer_norm():
    M, N = 512, 768
    x, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((M, N), (N,), (N,)))
    dy = torch.randn(M, N).bfloat16()
    rows, vectors, statistics = 2 * M * N, 2 * N, 2 * 4 * M  # mean and rstd are fp32
    work = {
        "_layer_norm_forward_kernel": Work(M * N, 2 * rows + 2 * vectors + statistics),  # x weight bias; y mean rstd
        # x dy weight mean rstd; dx. The partial sums of dweight and dbias are the kernel's own choice.
        "_layer_norm_backward_kernel": Work(M * N, 3 * rows + vectors + statistics),
    }
    return lambda: layer_norm(x, weight, bias).backward(dy), work


@case("gelu bf16 M512 N3072")
def _gelu():
    x, dy = (torch.randn(512, 3072).bfloat16() for _ in range(2))
    x.requires_grad_()
    work = {
        "_gelu_forward_kernel": Work(x.numel(), 2 * 2 * x.numel()),  # x; y
        "_gelu_backward_kernel": Work(x.numel(), 3 * 2 * x.numel()),  # x dy; dx
    }
    return lambda: gelu(x).backward(dy), work


@case("cross-entropy bf16 M32 V50257")
def _cross_entropy():
    M, V = 32, 50257
    logits, target = torch.randn(M, V).bfloat16().requires_grad_(), torch.randint(0, V, (M,))
    work = {
        "_cross_entropy_forward_kernel": Work(M, 2 * M * V + 8 * M + 3 * 4 * M),  # logits target; loss, maximum, sum
        "_cross_entropy_backward_kernel": Work(M * V, 2 * 2 * M * V + 8 * M + 2 * 4 * M),  # logits target m l; dlogits
    }
    return lambda: cross_entropy(logits, target).backward(), work
