"""Counts that can be derived by hand."""

import torch
import triton
import triton.language as tl

from kernels.simulator import simulate
from simulator import kernels
from simulator.snippets import launch, tensor

THREAD = "mov.u32 %r1, %tid.x;\nld.param.u64 %rd1, [p0];\nmov.u32 %r9, global_smem;\n"


@triton.jit
def strided_copy(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride))


def counted(kernel, grid, *arguments, arch="sm_90", **options):
    with simulate(arch) as gpu:
        kernel[grid](*arguments, **options)
    return gpu.launches[-1].counters


def test_a_copy_reads_and_writes_each_byte_once():
    x, y = torch.randn(4096), torch.empty(4096)
    c = counted(kernels.copy, (4,), x, y, 4096, 1024)
    assert (c.global_read, c.global_written) == (4 * 4096, 4 * 4096)
    assert c.sectors_read == c.sectors_written == 4 * 4096 // 32
    # 16 bytes a thread: 512 bytes a request.
    assert c.requests_read == c.requests_written == 4 * 4096 // 512
    assert c.shared_requests == c.tensor_flops == 0


def test_a_masked_copy_counts_only_what_is_touched():
    x, y = torch.randn(1008), torch.empty(1008)
    c = counted(kernels.copy, (1,), x, y, 1008, 1024)
    assert (c.global_read, c.global_written) == (4032, 4032)
    assert c.sectors_read == c.sectors_written == 126


def test_a_strided_copy_touches_eight_times_the_sectors():
    x, y = torch.randn(8 * 1024), torch.empty(1024)
    c = counted(strided_copy, (1,), x, y, 8, 1024)
    assert c.global_read == 4 * 1024
    assert c.sectors_read == 8 * c.sectors_written == 1024


def test_counts_are_the_same_in_each_run_and_each_schedule():
    x, y = torch.randn(4096), torch.empty(4096)
    first = counted(kernels.copy, (4,), x, y, 4096, 1024).as_dict()
    assert counted(kernels.copy, (4,), x, y, 4096, 1024).as_dict() == first
    q = torch.randn(3, 2, 130, 32).half()
    o = torch.empty(2, 130, 32).half()
    counts = []
    for seed in (None, 1, 2):
        with simulate("sm_90", seed=seed) as gpu:
            kernels.attention[(3, 2)](q[0], q[1], q[2], o, 0.2, 130, 32, 64, 32)
        counts.append(gpu.launches[-1].counters.as_dict())
    assert counts[0] == counts[1] == counts[2]


def conflicts(stride, size=4, threads=32):
    vector = {4: "ld.shared.b32 %r4", 16: "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}"}[size]
    run = launch(
        THREAD + f"mad.lo.u32 %r2, %r1, {stride}, %r9;\n{vector}, [%r2];", [tensor([0])], threads=threads, shared=65536
    )
    return run.counters.shared_requests, run.counters.shared_wavefronts, run.counters.bank_conflicts


def test_bank_conflicts():
    assert conflicts(4) == (1, 1, 0)  # each lane its own bank
    assert conflicts(8) == (1, 2, 1)  # two lanes a bank
    assert conflicts(128) == (1, 32, 31)  # all lanes one bank
    assert conflicts(132) == (1, 1, 0)  # padded by a word
    assert conflicts(0) == (1, 1, 0)  # all lanes one word
    assert conflicts(16, 16) == (1, 4, 0)  # 512 bytes need four passes
    assert conflicts(128, 16) == (1, 32, 28)  # eight rows of 128 bytes: the quarters conflict eightfold
    assert conflicts(8, threads=64) == (2, 4, 2)


def test_instructions_by_class():
    body = (
        THREAD
        + "add.f32 %r2, %r1, %r1;\nex2.approx.f32 %r2, %r2;\nadd.s32 %r3, %r1, 1;\nst.shared.b32 [%r9], 1;\nbar.sync 0;"
    )
    counts = launch(body, [tensor([0])], threads=96, blocks=2).counters.instructions
    per_warp = {
        "move": 2,
        "param_ld": 1,
        "float": 1,
        "special": 1,
        "integer": 1,
        "shared_st": 1,
        "barrier": 1,
        "branch": 1,
    }
    assert counts == {name: 6 * n for name, n in per_warp.items()}


def test_attention_flops():
    T, D, tile = 256, 64, 64
    q = torch.randn(3, 1, T, D).bfloat16()
    o = torch.empty(1, T, D).bfloat16()
    tiles = sum(range(1, T // tile + 1))
    for arch in ("sm_80", "sm_90"):
        c = counted(kernels.attention, (T // tile, 1), q[0], q[1], q[2], o, 0.2, T, D, tile, tile, arch=arch)
        assert c.tensor_flops == tiles * 2 * (2 * tile * tile * D)
        # Each q tile and o tile once; each k and v tile once per q tile at or below it.
        assert c.global_written == 2 * T * D
        assert c.global_read == 2 * T * D + tiles * 2 * (2 * tile * D)
