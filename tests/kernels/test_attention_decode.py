"""Split-KV decode: a few queries against a cache, by per-row lengths, whatever stands around the row."""

import compiling
import lanes
import numerics
import pytest
import torch
from attention_cases import bounds, inputs, terms
from lanes import across_lanes

from kernels import flash_attention, reference
from kernels.attention import decode, ops

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)

a_property = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))

# (B, H, T_q, T_k, D): one query and several, one split and many, a tail of one key, odd head dims.
SHAPES = [
    (2, 2, 1, 300, 64),
    (1, 3, 1, 9, 64),
    (1, 2, 1, 129, 40),
    (1, 1, 1, 1100, 64),
    (1, 2, 5, 300, 64),
    (1, 1, 16, 257, 80),
    (1, 2, 1, 130, 256),
    (1, 1, 3, 70, 160),
]


def check(q, k, v, **options):
    o = flash_attention(q, k, v, **options)
    baseline, _ = reference.attention(q, k, v, **options)
    oracle, _ = reference.attention(q.double(), k.double(), v.double(), **options)
    numerics.assert_close(o, baseline, oracle, what="o", beside=terms(q, k, v, **options)[0])


@across_lanes(*DTYPES, lanes=("interpret", "gpu"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_matches_the_oracle(lane, dtype, shape):
    q, k, v, _ = inputs(shape, dtype, lane.device)
    check(q, k, v)


@across_lanes(F32, BF16, lanes=("sm_80", "sm_90"))
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[5]], ids=str)
def test_compiled_decode_matches_the_oracle(lane, dtype, shape):
    q, k, v, _ = inputs(shape, dtype, lane.device)
    check(q, k, v)


@a_property
@pytest.mark.parametrize("T_q", [1, 4])
def test_rows_have_lengths_of_their_own(lane, dtype, T_q):
    q, k, v, _ = inputs((4, 2, T_q, 300, 64), dtype, lane.device)
    ends = [50, 297, 129, T_q]
    rows = bounds(lane.device, kv_start=[3, 0, 128, 0], kv_end=ends, q_start=[end - T_q for end in ends])
    check(q, k, v, **rows)


@a_property
def test_a_row_with_no_key_gives_zero(lane, dtype):
    q, k, v, _ = inputs((2, 1, 1, 20, 16), dtype, lane.device)
    o, lse = flash_attention(q, k, v, return_lse=True, **bounds(lane.device, kv_end=[20, 0]))
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert torch.equal(lse[1], torch.full_like(lse[1], float("-inf")))


@a_property
@pytest.mark.parametrize("T_q", [1, 3])
def test_the_result_depends_on_neither_the_batch_nor_the_buffer(lane, dtype, T_q):
    """A row alone with a short cache, and in a batch with a long one that holds NaN beyond its end: the same bits."""
    q, k, v, _ = inputs((1, 2, T_q, 140, 64), dtype, lane.device)
    alone = flash_attention(q, k, v)
    buffers = [torch.full((3, 2, 400, 64), float("nan"), dtype=dtype, device=lane.device) for _ in range(2)]
    queries = torch.randn(3, 2, T_q, 64).to(lane.device, dtype)
    queries[1] = q[0]
    for buffer, x in zip(buffers, (k, v)):
        buffer[1, :, 7:147] = x[0]
        buffer[0, :, :390] = buffer[2, :, :1] = 0.5
    rows = bounds(lane.device, kv_start=[0, 7, 0], kv_end=[390, 147, 1], q_start=[390 - T_q, 147 - T_q, 0])
    together = flash_attention(queries, *buffers, **rows)
    assert torch.equal(together[1:2], alone)


@a_property
def test_the_cache_is_read_in_place(lane, dtype, monkeypatch):
    seen = []

    class Recorder:
        pre_run_hooks = ("watching",)  # so that no launch goes past Triton

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(arguments)

    monkeypatch.setattr(decode._launch_decode, "kernel", Recorder())
    cache = torch.zeros(2, 1, 3, 1024, 16, dtype=dtype, device=lane.device)  # [k or v, B, H, T_max, D]
    q = torch.zeros(1, 3, 1, 16, dtype=dtype, device=lane.device)
    flash_attention(q, *cache[:, :, :, :500])
    _, k, v, *_ = seen[0]
    assert [k.data_ptr(), v.data_ptr()] == [cache[0].data_ptr(), cache[1].data_ptr()]
    assert k.stride() == v.stride() == cache[0].stride()


@a_property
def test_only_calls_without_gradients_take_this_path(lane, dtype, monkeypatch):
    taken = []
    monkeypatch.setattr(ops, "_launch_attention_decode", lambda *a: taken.append(a) or ops.launch_forward())
    monkeypatch.setattr(ops, "launch_forward", lambda *a: (torch.zeros(0), torch.zeros(0)))
    q, k, v, _ = inputs((1, 1, 1, 20, 16), dtype, lane.device)
    flash_attention(q.requires_grad_(), k, v)
    assert not taken
    with torch.no_grad():
        flash_attention(q, k, v)
    assert len(taken) == 1


@a_property
def test_decode_passes_opcheck(lane, dtype):
    q, k, v, _ = inputs((1, 2, 1, 40, 16), dtype, lane.device)
    torch.library.opcheck(ops.attention_decode.overload, (q, k, v, None, None, None, 0.25, True))


@pytest.mark.compile
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=lanes.short)  # fp16 takes the registers of bf16
def test_decode_compiles_fits_and_does_not_spill(arch, dtype):
    for T_q, head_dim in ((1, 64), (4, 64), (1, 256), (4, 256)):
        q, k, v, _ = inputs((1, 2, T_q, 64, head_dim), dtype, "cpu")
        with compiling.compile_only(arch) as kernels:
            flash_attention(q, k, v)
        assert [kernel.name for kernel in kernels] == ["_attention_decode_kernel", "_attention_merge_kernel"]
        for kernel in kernels:
            assert kernel.spilled == 0, (T_q, head_dim, kernel)
            assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel
