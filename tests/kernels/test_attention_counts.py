"""What the compiled attention kernels execute and move on an H100: counts by compiler and simulator, not times."""

from unittest import mock

import pytest
import torch
import triton
from attention_cases import bounds, inputs
from compiling import SHARED_MEMORY
from triton.backends.compiler import GPUTarget

from bench.lib.compile_only import compile_only
from bench.lib.sass import inspect
from kernels import flash_attention, flash_attention_packed
from kernels.configs import ATTENTION, AttentionConfig, attention_config
from kernels.launch import forget
from kernels.simulator import simulate

B, H, T, D = 1, 2, 1024, 64
SHAPE = (B, H, T, T, D)
TENSOR = B * H * T * D * 2  # bytes of q, k, v, o in bf16
ROW = B * H * T * 4  # bytes of lse or delta
TRITON_3_6 = triton.__version__.startswith("3.6.")
FORWARD_TILES = {
    "forward 128 x 64": ATTENTION["sm_90"]["forward", 2][64],
    "forward 128 x 128": AttentionConfig(128, 128, 8, 3),
}
KERNELS = {
    "forward": "_attention_forward_kernel",
    "dq": "_attention_dq_kernel",
    "dkdv": "_attention_dkdv_kernel",
}


@pytest.fixture(scope="module")
def launches():
    """{direction: its launch on a simulated H100, and its tile shape there}: causal, bf16, T = 1024, D = 64. Forward in
    the tiles of longer sequences and in the largest, too.
    """
    torch.manual_seed(0)
    q, k, v, do = inputs(SHAPE, torch.bfloat16, "cpu")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with simulate("sm_90") as gpu:
        flash_attention(q, k, v, kernel="portable").backward(do)
        configs = {direction: attention_config(direction, q.dtype, D, T) for direction in KERNELS}
        for tile in FORWARD_TILES.values():
            with mock.patch.dict(ATTENTION["sm_90"], {("short forward", 2): {D: tile}}):
                forget()
                flash_attention(q, k, v, kernel="portable")
        forget()
    others = zip(FORWARD_TILES, zip(gpu.launches[-len(FORWARD_TILES) :], FORWARD_TILES.values()))
    return dict(others) | {
        direction: (next(launch for launch in gpu.launches if launch.kernel == name), configs[direction])
        for direction, name in KERNELS.items()
    }


# SASS instructions of the unmasked loop per score of a thread (BLOCK_M * BLOCK_N / threads of them), as compiled by
# Triton 3.7.1; 3.6 copies lse and delta in smaller pieces.
# The forward kernel's least: FMNMX, FFMA, MUFU and FADD once each, F2FP and FMUL one half, 5.0 in all. It is compiled
# at 128 x 128, too, which takes fewest; the table's 128 x 64 is faster on an H100, where two blocks run at a time.
@pytest.mark.simulate
@pytest.mark.parametrize(
    ("direction", "limit"),
    [
        ("forward 128 x 128", 7.0),
        ("forward 128 x 64", 8.6),
        ("forward", 9.0),
        ("dq", 7.8),
        ("dkdv", 12.5 if TRITON_3_6 else 11.5),
    ],
)
def test_the_unmasked_loop_is_short_and_holds_no_mask(launches, direction, limit):
    launch, config = launches[direction]
    code = inspect(launch.cubin, launch.kernel)
    scores = config.BLOCK_M * config.BLOCK_N / (32 * config.num_warps)
    assert code.spilled == 0
    assert "HGMMA" in code.loop_names
    assert "FSEL" not in code.loop_names
    assert sum(code.loop_names.values()) / scores <= limit


@pytest.mark.compile
@pytest.mark.parametrize("head_dim", [24, 40, 80])
def test_rows_of_any_head_dim_that_is_a_multiple_of_8_are_copied_16_bytes_at_a_time(head_dim):
    with compile_only(GPUTarget("cuda", 90, 32), SHARED_MEMORY["sm_90"]) as binaries, torch.enable_grad():
        qkv = torch.empty(1, T, 3 * 3 * head_dim, dtype=torch.bfloat16, requires_grad=True)
        o = flash_attention_packed(qkv, 3, kernel="portable")
        o.backward(torch.empty_like(o))
    assert len(binaries) == 3
    for binary in binaries:
        names = inspect(binary.binary, binary.name).loop_names
        assert "LDGSTS" in names, binary.name
        assert "LDG" not in names, binary.name  # an element at a time, and waited for


@pytest.mark.compile
def test_dropout_is_drawn_where_it_is_used():
    """Each thread draws for its own scores: the loop reaches shared memory and barriers as often as without dropout."""
    loops, scores = [], {}
    for dropout_p in (0.0, 0.1):
        with compile_only(GPUTarget("cuda", 90, 32), SHARED_MEMORY["sm_90"]) as binaries, torch.enable_grad():
            qkv = torch.empty(1, T, 3 * H * D, dtype=torch.bfloat16, requires_grad=True)
            o = flash_attention_packed(qkv, H, dropout_p=dropout_p, kernel="portable")
            o.backward(torch.empty_like(o))
            for direction in KERNELS:
                config = attention_config(direction, qkv.dtype, D, T, dropout_p > 0)
                scores[direction] = config.BLOCK_M * config.BLOCK_N / (32 * config.num_warps)
        loops.append({binary.name: inspect(binary.binary, binary.name) for binary in binaries})
    for direction, limit in (("forward", 17.5), ("dq", 15.5), ("dkdv", 24.0 if TRITON_3_6 else 22.5)):
        without, code = (loop[KERNELS[direction]] for loop in loops)
        assert (code.loop["shared"], code.loop["barrier"]) == (without.loop["shared"], without.loop["barrier"])
        assert sum(code.loop_names.values()) / scores[direction] <= limit


def walked(T, own, other):
    """Rows that causal tiles of `own` rows walk over on the other side, in tiles of `other`, all heads together."""
    ends = [min(start + own, T) for start in range(0, T, own)]
    return B * H * sum(-(-end // other) * other for end in ends)


@pytest.mark.simulate
@pytest.mark.parametrize("direction", KERNELS)
def test_global_bytes_are_what_the_tiles_require(launches, direction):
    """Each program reads its own rows once and the tiles that it walks over once; nothing is read for being masked."""
    launch, config = launches[direction]
    row = D * 2
    if direction == "dkdv":
        # A tile of keys sees the queries from its first key on: the same staircase, from the other end.
        required = 4 * TENSOR + walked(T, config.BLOCK_N, config.BLOCK_M) * (2 * row + 8)
    else:
        rows = 2 * TENSOR + ROW if direction == "forward" else 4 * TENSOR + 2 * ROW
        required = rows + walked(T, config.BLOCK_M, config.BLOCK_N) * 2 * row
    counters = launch.counters
    assert counters.global_read + counters.global_written <= 1.05 * required


@pytest.mark.simulate
@pytest.mark.parametrize("direction", KERNELS)
def test_shared_memory_has_no_bank_conflicts(launches, direction):
    launch, _ = launches[direction]
    assert launch.counters.bank_conflicts == 0


@pytest.mark.simulate
def test_padded_tiles_are_skipped_not_masked():
    """Half of the keys padded away: half of the key and value bytes of full attention are read."""
    q, k, v, _ = inputs((1, 1, 256, 1024, 64), torch.bfloat16, "cpu")
    read = []
    for rows in ({}, {"kv_end": [512]}, {"kv_start": [512]}):
        with simulate("sm_90") as gpu:
            flash_attention(q, k, v, causal=False, kernel="portable", **bounds("cpu", **rows))
        read.append(gpu.launches[-1].counters.global_read)
    keys_and_values = read[0] - 256 * 64 * 2
    for padded in read[1:]:
        assert padded - 256 * 64 * 2 <= 0.51 * keys_and_values
