"""The Gluon kernel of attention/hopper.py: compiled without spills, in the order that it claims, right on an H100."""

import re

import compiling
import lanes
import numerics
import pytest
import torch
from attention_cases import inputs
from hopper import kept_binaries, long_rows, on_hopper

from bench.lib.sass import _loops, _tool, inspect
from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention import choice, hopper, ops
from kernels.attention.ops import split_heads
from kernels.configs import hopper_config
from kernels.simulator import simulate

F16, BF16 = torch.float16, torch.bfloat16
NAME = "_attention_hopper_kernel"

# (B, H, T_q, T_k, D): below, at and beyond a tile of 64 queries and of 128 keys; fewer and more keys than queries.
SHAPES = [
    (1, 2, 1, 1, 64),
    (2, 1, 17, 17, 64),
    (1, 3, 64, 64, 64),
    (2, 2, 65, 65, 64),
    (1, 2, 129, 129, 128),
    (2, 3, 300, 300, 64),
    (1, 2, 1000, 1000, 64),
    (1, 1, 70, 17, 64),
    (2, 2, 100, 333, 64),
    (1, 1, 33, 500, 128),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-Tq{}-Tk{}-D{}".format(*s))
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=lanes.short)
causal_or_full = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Tensors that PyTorch leaves uninitialised hold NaN, so that an element no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Compiled


@pytest.fixture(scope="module")
def binaries():
    """{(dtype, D, causal): (what the compiler made, its cubin)}, through the real host code."""
    found = {}
    for dtype, D, causal in [
        (BF16, 64, True),
        (BF16, 64, False),
        (F16, 64, True),
        (BF16, 128, True),
        (F16, 128, False),
    ]:
        q, k, v, _ = inputs((2, 3, 300, 300, D), dtype, "cpu")
        with long_rows(), compiling.compile_only("sm_90") as kernels, kept_binaries() as cubins:
            hopper._launch_hopper_forward(q, k, v, ops.Options(None, None, None, None, 0.125, causal, 0.0))
        found[dtype, D, causal] = kernels[0], cubins[0]
    return found


@pytest.mark.compile
def test_it_spills_nothing_and_several_programs_share_a_multiprocessor(binaries):
    for (_, D, _), (kernel, _) in binaries.items():
        programs = {64: 3, 128: 2}[D]
        assert kernel.spilled == 0
        assert kernel.registers <= 65536 // (programs * 128) // 8 * 8
        assert programs * (kernel.shared + 1024) <= 228 * 1024


@pytest.mark.compile
def test_the_tile_of_short_rows_spills_nothing_and_four_programs_share_a_multiprocessor():
    q, k, v, _ = inputs((2, 3, 300, 300, 64), BF16, "cpu")
    with compiling.compile_only("sm_90") as (kernel):
        hopper._launch_hopper_forward(q, k, v, ops.Options(None, None, None, None, 0.125, True, 0.0))
    assert kernel[0].spilled == 0
    assert kernel[0].registers <= 128
    assert 4 * (kernel[0].shared + 1024) <= 228 * 1024


@pytest.mark.compile
def test_the_loop_holds_no_mask_and_few_instructions(binaries):
    for (_, D, _), (_, cubin) in binaries.items():
        code, config = inspect(cubin, NAME), hopper_config("forward", D, 2048)
        assert "FSEL" not in code.loop_names
        assert sum(code.loop_names.values()) <= {64: 7.1, 128: 10.6}[D] * config.BLOCK_M * config.BLOCK_N / 128


@pytest.mark.compile
def test_the_softmax_runs_while_the_product_with_v_is_computed(binaries, tmp_path):
    """In the machine code: both products queued, one wait that leaves one of them, exponentials, the other wait."""
    _, cubin = binaries[BF16, 64, True]
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    lines = [line for line in _tool("nvdisasm", "-c", file).split("\n") if re.search("HGMMA|DEPBAR|MUFU.EX2", line)]
    events = "".join("M" if "HGMMA" in x else "E" if "EX2" in x else "1" if ", 0x1" in x else "0" for x in lines)
    assert "M" * 12 + "1" + "E" * 66 + "0" in events


@pytest.mark.compile
def test_a_barrier_stands_between_the_expected_bytes_and_each_refill(binaries):
    """One thread starts a copy into a slot that all four warps have read: Triton's barrier makes it wait for them."""
    for _, cubin in binaries.values():
        order = _loop_names(cubin, ("SYNCS.ARRIVE", "UTMALDG", "BAR.SYNC"))
        for refill in re.findall(r"A([^AU]*)U", order):
            assert "B" in refill
        assert order.count("U") == 2


def _loop_names(cubin, stems):
    """The main loop's instructions of these names, in order, as the letters A, U and B."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        names, loops = _loops(_tool("nvdisasm", "-c", file.name), NAME)
    start, end = min(
        (loop for loop in loops if any("HGMMA" in n for n in names[slice(*loop)])), key=lambda loop: loop[1] - loop[0]
    )
    letters = dict(zip(stems, "AUB"))
    return "".join(letters[s] for n in names[start:end] for s in stems if n.startswith(s))


# What it refuses


@pytest.mark.simulate
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "torch.float32: fp16 or bf16 is required"),
        ({"D": 80}, "head_dim 80: 64 or 128 is required"),
        ({"kv_end": torch.tensor([3], dtype=torch.int32)}, "padding: no kv_start and no kv_end is required"),
        ({"dropout_p": 0.1}, "dropout: dropout_p of 0 is required"),
        ({"arch": "sm_80"}, "architecture 80: compute capability 9.0 is required"),
        ({"skip": 4}, "16-byte alignment"),
    ],
    ids=["fp32", "head-dim", "padding", "dropout", "A100", "alignment"],
)
def test_a_request_that_it_cannot_serve_is_an_error(change, message):
    change = {"dtype": F16, "D": 64, "arch": "sm_90", "skip": 0} | change
    D, dtype, arch, skip = (change.pop(key) for key in ("D", "dtype", "arch", "skip"))
    qkv = torch.zeros(skip + 20 * 3 * D, dtype=dtype)[skip:].view(1, 20, 3 * D)
    with simulate(arch):
        with pytest.raises(ValueError, match=re.escape(message)):
            flash_attention_packed(qkv, 1, kernel="hopper", **change)
        with pytest.raises(ValueError, match="kernel='hopper' does not support"):
            flash_attention(*split_heads(qkv, 1), kernel="hopper", **change)


def test_an_unknown_kernel_is_an_error():
    q = torch.zeros(1, 1, 4, 64)
    for call in (lambda kernel: flash_attention(q, q, q, kernel=kernel), lambda kernel: _packed(kernel)):
        with pytest.raises(ValueError, match="kernel is 'fastest'; it must be one of auto, portable, hopper"):
            call("fastest")
        with pytest.raises(TypeError, match="kernel is 1; it must be a string"):
            call(1)


def _packed(kernel):
    return flash_attention_packed(torch.zeros(1, 4, 192), 1, kernel=kernel)


# On a Hopper GPU, and what differs most on a simulated one


def check(q, k, v, **options):
    """The tolerance rule for o, and lse against the oracle's scores."""
    o, lse = flash_attention(q, k, v, kernel="hopper", return_lse=True, **options)
    baseline, oracle = (
        reference.attention(*(x.to(dtype) for x in (q, k, v)), **options)[0] for dtype in (q.dtype, torch.float64)
    )
    numerics.assert_close(o, baseline, oracle, what="o")
    _, expected = flash_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(lse, expected, atol=2e-5, rtol=1e-6)
    return o


@on_hopper
@both_dtypes
@every_shape
@causal_or_full
def test_output_matches_the_oracle(shape, dtype, causal):
    q, k, v, _ = inputs(shape, dtype, "cuda")
    check(q, k, v, causal=causal)


@on_hopper
@both_dtypes
def test_packed_and_separate_tensors_give_the_same_bits_in_every_run(dtype):
    qkv = torch.randn(3, 777, 3 * 4 * 64, device="cuda", dtype=dtype)
    expected = check(*split_heads(qkv, 4))
    for _ in range(3):
        assert torch.equal(
            flash_attention_packed(qkv, 4, kernel="hopper").unflatten(2, (4, 64)).transpose(1, 2), expected
        )
    one = flash_attention_packed(qkv[1:2].clone(), 4, kernel="hopper")
    assert torch.equal(one.unflatten(2, (4, 64)).transpose(1, 2), expected[1:2])


@pytest.mark.simulate
@pytest.mark.parametrize(
    ("shape", "causal", "dtype", "seed"),
    [
        ((2, 2, 65, 65, 64), True, F16, 1),
        ((1, 2, 300, 300, 64), True, BF16, 2),
        ((1, 2, 100, 333, 64), True, BF16, None),
        ((1, 1, 150, 270, 64), False, F16, 3),
        ((1, 1, 70, 17, 64), True, BF16, None),
        ((1, 1, 200, 200, 128), True, BF16, 4),
    ],
    ids=str,
)
def test_simulated_output_matches_the_oracle_in_any_order(shape, causal, dtype, seed):
    q, k, v, _ = inputs(shape, dtype, "cpu")
    with simulate("sm_90", seed=seed):
        check(q, k, v, causal=causal)
    with long_rows(), simulate("sm_90", seed=seed):
        check(q, k, v, causal=causal)


@pytest.mark.simulate
def test_simulated_packed_and_separate_tensors_give_the_same_bits_and_read_each_tile_once():
    qkv = torch.randn(2, 150, 3 * 2 * 64).bfloat16()
    with long_rows(), simulate("sm_90") as gpu:
        y = flash_attention_packed(qkv, 2, kernel="hopper")
        again = flash_attention_packed(qkv.clone(), 2, kernel="hopper")
        o = flash_attention(*split_heads(qkv, 2), kernel="hopper")
    assert torch.equal(y, again)
    assert torch.equal(y.unflatten(2, (2, 64)).transpose(1, 2), o)
    # Tiles of 64 queries walk over 128, 128 and 256 keys, of which 150 are there; 128 bytes a row.
    rows = 150 + 2 * (128 + 128 + 150)
    assert gpu.launches[0].counters.global_read == 2 * 2 * rows * 128
    assert gpu.launches[0].counters.bank_conflicts == 0
    # Outputs are stored in whole sectors: a row of o is four, eight rows of lse are one or two.
    assert gpu.launches[0].counters.sectors_written <= 2 * 2 * (150 * 4 + 2 * 19)
    # The last of them computes one half of its last tile of keys; four FLOPs per score and head dim.
    assert gpu.launches[0].counters.tensor_flops == 2 * 2 * 64 * (128 + 128 + 192) * 4 * 64


@on_hopper
def test_first_queries_that_stand_anywhere_match_the_oracle():
    q, k, v, _ = inputs((3, 2, 90, 200, 64), BF16, "cuda")
    check(q, k, v, q_start=torch.tensor([0, 17, 150], dtype=torch.int32, device="cuda"))


@on_hopper
def test_changing_a_token_leaves_the_outputs_before_it_alone():
    qkv = torch.randn(1, 400, 3 * 2 * 64, device="cuda", dtype=BF16)
    before = flash_attention_packed(qkv, 2, kernel="hopper")
    qkv[:, 250] = 3
    after = flash_attention_packed(qkv, 2, kernel="hopper")
    assert torch.equal(before[:, :250], after[:, :250])
    assert not torch.equal(before[:, 250:], after[:, 250:])


# Which kernels a call takes


@pytest.mark.simulate
@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        ({}, True, True),
        ({"T": 2000}, True, True),
        ({"dtype": torch.float32}, False, False),
        ({"D": 80}, False, False),
        ({"D": 128}, False, False),  # served, but not known to be faster
        ({"kv_end": torch.tensor([3], dtype=torch.int32)}, False, False),
        ({"dropout_p": 0.1}, False, False),
        ({"arch": "sm_80"}, False, False),
        ({"arch": "sm_89"}, False, False),
        ({"skip": 4}, False, False),
    ],
    ids=["served", "long", "fp32", "head-dim", "not-measured", "padding", "dropout", "A100", "Ada", "alignment"],
)
def test_auto_takes_them_where_the_table_says_so(monkeypatch, change, forward, backward):
    change = {"dtype": F16, "D": 64, "T": 20, "arch": "sm_90", "skip": 0} | change
    D, T, dtype, arch, skip = (change.pop(key) for key in ("D", "T", "dtype", "arch", "skip"))
    taken = []
    for module, kind in ((choice.forward, "portable"), (choice.hopper, "hopper")):
        for name in [name for name in vars(module) if re.match("_launch_.*(forward|hopper)$", name)]:
            monkeypatch.setattr(module, name, _noting(taken, kind, "o"))
    for module, kind in ((choice.backward, "portable"), (choice.hopper_backward, "hopper")):
        for name in [name for name in vars(module) if name.endswith("backward") and name.startswith("_launch")]:
            monkeypatch.setattr(module, name, _noting(taken, kind, "d"))
    qkv = torch.zeros(skip + T * 3 * D, dtype=dtype)[skip:].view(1, T, 3 * D).requires_grad_()
    with simulate(arch):
        flash_attention_packed(qkv, 1, **change).sum().backward()
        flash_attention(*split_heads(qkv, 1), **change).sum().backward()
    expected = ["hopper" if forward else "portable", "hopper" if backward else "portable"]
    assert taken == expected * 2


def _noting(taken, kind, what):
    def launch(*tensors):
        taken.append(kind)
        if what == "o" and tensors[0].dim() == 3:
            qkv, num_heads, _ = tensors
            B, T, three_C = qkv.shape
            return qkv.new_zeros(B, T, three_C // 3), qkv.new_zeros(B, num_heads, T, dtype=torch.float32)
        if what == "o":
            q = tensors[0]
            return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)
        return torch.zeros_like(tensors[1])

    return launch
