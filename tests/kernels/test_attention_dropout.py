"""Dropout inside the attention kernels: the rate, the scaling, the replay in backward, the seed."""

import numerics
import pytest
import torch
from attention_cases import bounds, check_against_oracle, inputs, with_gradients
from lanes import across_lanes

from kernels import flash_attention, reference
from kernels.attention.dropout import attention_keep_mask

a_property = across_lanes(torch.float16, lanes=("interpret", "sm_90", "gpu"))


def seed(device, value=1234):
    return torch.tensor([value], dtype=torch.int64, device=device)


@a_property
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_kept_share_is_what_was_asked_for(lane, dtype, p):
    keep = attention_keep_mask(seed(lane.device), 2, 3, 256, 256, p, None)
    share, n = keep.double().mean().item(), keep.numel()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    by_key, by_query, by_head = (keep.double().mean(dims) for dims in ((0, 1, 2), (0, 1, 3), (0, 2, 3)))
    for shares in (by_key, by_query, by_head):
        deviation = (p * (1 - p) / (n / shares.numel())) ** 0.5
        assert (shares - (1 - p)).abs().max() < 5.5 * deviation


@a_property
def test_neighbouring_choices_are_independent(lane, dtype):
    keep = attention_keep_mask(seed(lane.device), 1, 2, 256, 256, 0.5, None).double() - 0.5
    n = keep.numel()
    for dim, shift in ((3, 1), (3, 2), (3, 4), (3, 8), (3, 16), (2, 1), (2, 8), (2, 16), (1, 1)):
        correlation = (keep * keep.roll(shift, dim)).mean().item() / 0.25
        assert abs(correlation) < 5 / n**0.5, (dim, shift)


@across_lanes(torch.float32, torch.float16, lanes=("interpret", "gpu"))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_output_and_gradients_use_one_choice(lane, dtype, causal):
    """Forward and both backward kernels have tiles of their own and must agree on every weight."""
    q, k, v, do = inputs((2, 2, 70, 70, 64), dtype, lane.device)
    chosen = seed(lane.device)
    keep = attention_keep_mask(chosen, 2, 2, 70, 70, 0.25, None)
    compare(q, k, v, do, keep, dropout_p=0.25, dropout_seed=chosen, causal=causal)


@across_lanes(torch.bfloat16, lanes=("sm_80", "sm_90"))
def test_the_compiled_kernels_use_one_choice(lane, dtype):
    q, k, v, do = inputs((1, 2, 70, 70, 64), dtype, lane.device)
    chosen = seed(lane.device)
    keep = attention_keep_mask(chosen, 1, 2, 70, 70, 0.25, None)
    compare(q, k, v, do, keep, dropout_p=0.25, dropout_seed=chosen, causal=True)


@across_lanes(torch.float32, lanes=("interpret", "gpu"))
def test_padding_and_dropout_together(lane, dtype):
    q, k, v, do = inputs((2, 1, 70, 70, 16), dtype, lane.device)
    rows = bounds(lane.device, kv_start=[5, 0], kv_end=[70, 33])
    chosen = seed(lane.device)
    keep = attention_keep_mask(chosen, 2, 1, 70, 70, 0.5, rows["kv_start"])
    compare(q, k, v, do, keep, dropout_p=0.5, dropout_seed=chosen, causal=True, **rows)


def compare(q, k, v, do, keep, *, dropout_p, dropout_seed, **options):
    def plain(q, k, v):
        return reference.attention(q, k, v, dropout_p=dropout_p, keep=keep, **options)[0]

    def kernel(q, k, v):
        return flash_attention(q, k, v, dropout_p=dropout_p, dropout_seed=dropout_seed, **options)

    ours, baseline = with_gradients(kernel, q, k, v, do), with_gradients(plain, q, k, v, do)
    oracle = with_gradients(plain, *(x.double() for x in (q, k, v, do)))
    numerics.assert_close(ours[0], baseline[0], oracle[0], what="o")
    for name, *gradients in zip(("dq", "dk", "dv"), ours[1:], baseline[1:], oracle[1:]):
        numerics.assert_gradient_close(*gradients, what=name, beside=oracle[1:])


@a_property
def test_a_seed_repeats_and_another_seed_differs(lane, dtype):
    q, k, v, _ = inputs((1, 1, 40, 40, 16), dtype, lane.device)
    first, again = (flash_attention(q, k, v, dropout_p=0.5, dropout_seed=seed(lane.device)) for _ in range(2))
    other = flash_attention(q, k, v, dropout_p=0.5, dropout_seed=seed(lane.device, 4321))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@a_property
def test_without_a_seed_torchs_generator_decides(lane, dtype):
    q, k, v, _ = inputs((1, 1, 40, 40, 16), dtype, lane.device)
    torch.manual_seed(7)
    first, second = (flash_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(first, flash_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)


@across_lanes(torch.float32, lanes=("interpret", "gpu"))
def test_no_dropout_is_no_dropout(lane, dtype):
    arguments = inputs((1, 1, 40, 40, 16), dtype, lane.device)
    check_against_oracle(*arguments, dropout_p=0.0)
