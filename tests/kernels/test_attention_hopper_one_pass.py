"""The one-pass backward of attention/hopper_one_pass.py: compiled, right in the simulator in any order, refused."""

import compiling
import numerics
import pytest
import torch
from attention_cases import inputs, with_gradients
from hopper import kept_binaries
from lanes import across_lanes

from bench.lib.sass import inspect
from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention import hopper_one_pass, ops
from kernels.simulator import simulate

F16, BF16 = torch.float16, torch.bfloat16
HOPPER = {"kernel": "hopper", "deterministic": False}


@pytest.fixture
def _at_any_length(monkeypatch):
    monkeypatch.setattr(hopper_one_pass, "LEAST_QUERIES", 1)


def check(q, k, v, do, causal):
    def plain(q, k, v):
        return reference.attention(q, k, v, causal=causal)[0]

    ours = with_gradients(lambda q, k, v: flash_attention(q, k, v, causal=causal, **HOPPER), q, k, v, do)
    baseline = with_gradients(plain, q, k, v, do)
    oracle = with_gradients(plain, *(x.double() for x in (q, k, v, do)))
    for name, *gradients in zip(("dq", "dk", "dv"), ours[1:], baseline[1:], oracle[1:]):
        numerics.assert_gradient_close(*gradients, what=name, beside=oracle[1:])


@pytest.mark.compile
def test_it_takes_fewer_instructions_than_the_two_kernels_and_two_programs_share_a_multiprocessor():
    q, k, v, do = inputs((2, 3, 2048, 2048, 64), BF16, "cpu")
    lse, gradients = torch.zeros(2, 3, 2048), [torch.empty_like(x) for x in (q, k, v)]
    with compiling.compile_only("sm_90") as kernels, kept_binaries() as cubins:
        options = ops.Options(None, None, None, None, 0.125, True, 0.0)
        hopper_one_pass._launch_one_pass_backward(do, q, k, v, q, lse, *gradients, options)
    kernel, cubin = kernels[-1], cubins[-1]
    assert kernel.name == "_attention_one_pass_kernel"
    assert kernel.spilled <= 8
    assert 2 * (kernel.shared + 1024) <= 228 * 1024
    names = inspect(cubin, kernel.name).loop_names
    assert names["HGMMA"] == 5 * 4  # of 16 each: k and q, v and do, p and do, ds and q, ds and k
    assert sum(names.values()) / (64 * 64 / 128) <= 14.5  # the two kernels take 8.3 and 12.3


@pytest.mark.simulate
@pytest.mark.usefixtures("_at_any_length")
@pytest.mark.parametrize(
    ("shape", "dtype", "causal", "seed"),
    [
        ((1, 2, 70, 70, 64), F16, True, None),
        ((2, 1, 130, 130, 64), BF16, True, 1),
        ((1, 1, 40, 150, 64), BF16, True, 2),
        ((1, 1, 150, 40, 64), F16, False, 3),
    ],
    ids=str,
)
def test_simulated_gradients_match_the_oracle_in_any_order(shape, dtype, causal, seed):
    with simulate("sm_90", seed=seed) as gpu:
        check(*inputs(shape, dtype, "cpu"), causal)
    assert [launch.kernel for launch in gpu.launches][-2:] == ["_prepare_kernel", "_attention_one_pass_kernel"]


@pytest.mark.simulate
@pytest.mark.usefixtures("_at_any_length")
def test_packed_and_separate_tensors_give_the_same_gradients():
    """In lock step, where the shares of dq come in one order."""
    qkv, do = torch.randn(1, 70, 3 * 2 * 64, dtype=BF16), torch.randn(1, 70, 2 * 64, dtype=BF16)
    qkv.requires_grad_()
    with simulate("sm_90"):
        (packed,) = torch.autograd.grad(flash_attention_packed(qkv, 2, **HOPPER), qkv, do)
        o = flash_attention(*ops.split_heads(qkv, 2), **HOPPER).transpose(1, 2).flatten(2)
        (separate,) = torch.autograd.grad(o, qkv, do)
    assert torch.equal(packed, separate)


@pytest.mark.simulate
def test_below_the_least_length_the_two_kernels_serve():
    q, k, v, do = inputs((1, 1, 70, 70, 64), BF16, "cpu")
    with simulate("sm_90") as gpu:
        flash_attention(q.requires_grad_(), k, v, **HOPPER).backward(do)
    assert [launch.kernel for launch in gpu.launches][1:] == [
        "_attention_dq_hopper_kernel",
        "_attention_dkdv_hopper_kernel",
    ]


@pytest.mark.simulate
@pytest.mark.parametrize(
    ("arch", "head_dim", "options", "reason"),
    [
        ("sm_80", 64, {}, "compute capability"),
        ("sm_90", 128, {}, "head_dim 128: 64 is required"),
        ("sm_90", 64, {"dropout_p": 0.1}, "dropout"),
        ("sm_90", 64, {"kernel": "portable"}, "kernel='portable'"),
        ("sm_90", 64, {"kv_start": torch.zeros(1, dtype=torch.int32)}, "kv_start|padding"),
    ],
    ids=str,
)
def test_where_it_cannot_be_had_it_is_refused_with_the_reason(arch, head_dim, options, reason):
    q, k, v, _ = inputs((1, 1, 20, 20, head_dim), BF16, "cpu")
    with simulate(arch), pytest.raises(ValueError, match=f"^flash_attention: deterministic=False .*({reason})"):
        flash_attention(q, k, v, deterministic=False, **options)


@across_lanes(F16, BF16, lanes=("gpu",))
@pytest.mark.parametrize("shape", [(2, 3, 2048, 2048, 64), (1, 2, 3001, 3001, 64)], ids=str)
def test_gradients_match_the_oracle(lane, dtype, shape):
    check(*inputs(shape, dtype, lane.device), True)
