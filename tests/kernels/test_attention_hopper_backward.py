"""The Gluon kernels of attention/hopper_backward.py: compiled without spills, in order, right in the simulator."""

import re

import compiling
import numerics
import pytest
import torch
from attention_cases import check_partial_sums, inputs, with_gradients
from hopper import kept_binaries, long_rows, on_hopper

from bench.lib.sass import _tool, inspect
from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention import hopper_backward, ops
from kernels.attention.ops import split_heads
from kernels.configs import hopper_config
from kernels.simulator import simulate

F16, BF16 = torch.float16, torch.bfloat16
# (B, H, T_q, T_k, D): below, at and beyond a tile; fewer and more keys than queries.
SHAPES = [
    (1, 2, 1, 1, 64),
    (2, 1, 17, 17, 64),
    (1, 3, 64, 64, 64),
    (2, 2, 65, 65, 64),
    (1, 2, 129, 129, 128),
    (2, 3, 300, 300, 64),
    (1, 2, 1000, 1000, 64),
    (1, 2, 1100, 1100, 64),
    (1, 1, 70, 17, 64),
    (2, 2, 100, 333, 64),
    (1, 1, 33, 500, 128),
]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Tensors that PyTorch leaves uninitialised hold NaN, so that an element no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Compiled


@pytest.fixture(scope="module")
def binaries():
    """{(D, T): ((what the compiler made, its cubin) of dq, of dk and dv)}, bf16, causal."""
    found = {}
    for D, T in [(64, 300), (64, 1100), (128, 300)]:
        q, k, v, do = inputs((2, 3, T, T, D), BF16, "cpu")
        lse, gradients = torch.zeros(2, 3, T), [torch.empty_like(x) for x in (q, k, v)]
        with compiling.compile_only("sm_90") as kernels, kept_binaries() as cubins:
            options = ops.Options(None, None, None, None, 0.125, True, 0.0)
            hopper_backward._launch_hopper_backward(do, q, k, v, q, lse, *gradients, options)
        found[D, T] = list(zip(kernels, cubins))
    return found


@pytest.mark.compile
def test_they_spill_nothing_and_programs_share_a_multiprocessor(binaries):
    for (D, T), both in binaries.items():
        for (kernel, _), programs in zip(both, {64: (3, 3 if T == 300 else 2), 128: (2, 2)}[D]):
            assert kernel.spilled == 0
            assert kernel.registers <= 65536 // (programs * 128) // 8 * 8
            assert programs * (kernel.shared + 1024) <= 228 * 1024


@pytest.mark.compile
def test_the_instructions_of_the_loop_without_a_mask_per_score(binaries):
    most = {(64, 300): (8.5, 15.1), (64, 1100): (8.5, 12.5), (128, 300): (15.6, 17.5)}
    for (D, T), both in binaries.items():
        for direction, (kernel, cubin), limit in zip(("dq", "dkdv"), both, most[D, T]):
            config = hopper_config(direction, D, T)
            code = inspect(cubin, kernel.name)
            assert "FSEL" not in code.loop_names
            assert sum(code.loop_names.values()) <= limit * config.BLOCK_M * config.BLOCK_N / 128


@pytest.mark.compile
def test_four_products_are_queued_before_the_exponentials_and_waited_for_one_by_one(binaries, tmp_path):
    """dk and dv, in the machine code: s, dp, dv and dk queued, three left, exponentials, two left, none left."""
    _, (_, cubin) = binaries[64, 300]
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    lines = [line for line in _tool("nvdisasm", "-c", file).split("\n") if re.search("HGMMA|DEPBAR|MUFU.EX2", line)]
    events = "".join("M" if "HGMMA" in x else "E" if "EX2" in x else re.search(r"gsb0, 0x(\d)", x)[1] for x in lines)
    assert re.search("M{12}3+E{12,}2+E*0", events), events


# Right, in the simulator and on a Hopper GPU


def check(q, k, v, do, **options):
    """The tolerance rule for the gradients; what the kernels gave."""
    _, *found = with_gradients(lambda *x: flash_attention(*x, kernel="hopper", **options), q, k, v, do)
    baseline, oracle = (
        with_gradients(lambda *x: reference.attention(*x, **options)[0], *(x.to(dtype) for x in (q, k, v, do)))[1:]
        for dtype in (q.dtype, torch.float64)
    )
    for what, actual, plain, exact in zip(("dq", "dk", "dv"), found, baseline, oracle):
        numerics.assert_gradient_close(actual, plain, exact, what=what, beside=oracle)
    return found


@on_hopper
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-Tq{}-Tk{}-D{}".format(*s))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_match_the_oracle(shape, dtype, causal):
    check(*inputs(shape, dtype, "cuda"), causal=causal)


@pytest.mark.simulate
@pytest.mark.parametrize(
    ("shape", "causal", "dtype", "seed"),
    [
        ((2, 2, 65, 65, 64), True, F16, 1),
        ((1, 2, 300, 300, 64), True, BF16, 2),
        ((1, 2, 70, 200, 64), True, BF16, None),
        ((1, 1, 150, 270, 64), False, F16, 3),
        ((1, 1, 130, 17, 64), True, BF16, None),
        ((1, 1, 150, 150, 128), True, BF16, 4),
    ],
    ids=str,
)
def test_simulated_gradients_match_the_oracle_in_any_order(shape, causal, dtype, seed):
    with simulate("sm_90", seed=seed):
        check(*inputs(shape, dtype, "cpu"), causal=causal)


@pytest.mark.simulate
def test_simulated_gradients_of_long_rows_match_the_oracle():
    with long_rows(), simulate("sm_90", seed=1):
        check(*inputs((1, 1, 300, 300, 64), BF16, "cpu"))


@pytest.mark.simulate
def test_first_queries_that_stand_anywhere_match_the_oracle():
    """Among them queries that see no key: their rows of dq are zero."""
    start = torch.tensor([0, 17, -30], dtype=torch.int32)
    with simulate("sm_90"):
        dq, _, _ = check(*inputs((3, 1, 70, 90, 64), BF16, "cpu"), q_start=start)
    assert not dq[2, :, :30].any()


@pytest.mark.simulate
def test_packed_and_separate_tensors_and_any_batch_give_the_same_bits():
    """And any memory of the incoming gradient: what the copy engine cannot read is copied."""
    qkv, dy = torch.randn(2, 100, 3 * 2 * 64).bfloat16(), torch.randn(2, 100, 2 * 64).bfloat16()
    odd = torch.zeros(2, 100, 2 * 64 + 3).bfloat16()[..., 3:].copy_(dy)
    with simulate("sm_90"):
        packed, again = (_packed(qkv, each) for each in (dy, odd))
        one = _packed(qkv[1:], dy[1:])
        q, k, v = (x.detach() for x in split_heads(qkv, 2))
        do = dy.unflatten(2, (2, 64)).transpose(1, 2)
        _, *separate = with_gradients(lambda *x: flash_attention(*x, kernel="hopper"), q, k, v, do)
    assert torch.equal(packed, again)
    assert torch.equal(packed[1:], one)
    for found, expected in zip(separate, split_heads(packed, 2)):
        assert torch.equal(found, expected)


@pytest.mark.simulate
def test_the_gradients_sums_over_rows_are_left_to_be_added_up():
    with simulate("sm_90"):
        check_partial_sums(BF16, "cpu", 64)


def _packed(qkv, dy):
    leaf = qkv.clone().requires_grad_()
    return torch.autograd.grad(flash_attention_packed(leaf, 2, kernel="hopper"), leaf, dy)[0]


@on_hopper
def test_two_runs_give_the_same_bits():
    q, k, v, do = inputs((4, 12, 1024, 1024, 64), BF16, "cuda")
    first, second = (with_gradients(lambda *x: flash_attention(*x, kernel="hopper"), q, k, v, do) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
