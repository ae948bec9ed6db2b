"""What callers may hand to attention beside q, k and v, and at its edges: any strides, any values, no queries, NaN."""

import numerics
import pytest
import torch
from attention_cases import check_against_oracle, inputs
from lanes import across_lanes
from rowwise import poisoned

from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention.dropout import attention_keep_mask

F16, F32 = torch.float16, torch.float32
LARGEST, SMALLEST = 2**31 - 1, -(2**31)

in_some_lanes = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
_poisoned = pytest.fixture(autouse=True)(poisoned)
# Few queries without a gradient take the decode kernels, with one the forward kernel.
by_each_path = pytest.mark.parametrize("path", ["decode", "forward and backward"])


def tensors(dtype, device, T_q=3, T_k=24, B=2):
    return [torch.randn(B, 1, T, 16).to(device, dtype) for T in (T_q, T_k, T_k)]


def attend(path, q, k, v, **options):
    """o and, on the second path, the gradients of its sum."""
    if path == "decode":
        return (flash_attention(q, k, v, **options),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves, **options)
    return o.detach(), *torch.autograd.grad(o.sum(), leaves)


def bounds(*values):
    """Three forms of the same int32 numbers: dense, a column of a table, and, where all are one, expanded."""
    dense = torch.tensor(values, dtype=torch.int32)
    return dense, torch.stack((torch.full_like(dense, 99), dense), 1)[:, 1]


@in_some_lanes
@by_each_path
@pytest.mark.parametrize("name", ["kv_start", "kv_end", "q_start"])
def test_bounds_are_read_with_their_strides(lane, dtype, path, name):
    qkv = tensors(dtype, lane.device)
    dense, column = (x.to(lane.device) for x in bounds(5, 9))
    for one, other in zip(attend(path, *qkv, **{name: dense}), attend(path, *qkv, **{name: column})):
        assert torch.equal(one, other)
    same, expanded = torch.full_like(dense, 7), torch.tensor([7], dtype=torch.int32, device=lane.device).expand(2)
    for one, other in zip(attend(path, *qkv, **{name: same}), attend(path, *qkv, **{name: expanded})):
        assert torch.equal(one, other)


EXTREMES = {
    "queries far behind the keys": {"q_start": (LARGEST, 24)},
    "queries far before the keys": {"q_start": (SMALLEST, -3)},
    "no key by an end below zero": {"kv_start": (1, 0), "kv_end": (SMALLEST, -1)},
    "no key by a start beyond them": {"kv_start": (LARGEST, 24)},
    "every key": {"kv_start": (SMALLEST, -1), "kv_end": (LARGEST, 25)},
    "all at once": {"kv_start": (3, LARGEST), "kv_end": (LARGEST, SMALLEST), "q_start": (LARGEST, SMALLEST)},
}


@in_some_lanes
@by_each_path
@pytest.mark.parametrize("name", EXTREMES)
def test_bounds_of_any_size_mean_what_they_say(lane, dtype, path, name):
    q, k, v = tensors(dtype, lane.device)
    options = {key: torch.tensor(pair, dtype=torch.int32, device=lane.device) for key, pair in EXTREMES[name].items()}
    results = attend(path, q, k, v, **options)

    def plain(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        wide = {key: bound.long() for key, bound in options.items()}
        o, _ = reference.attention(*leaves, **wide)
        return o, *torch.autograd.grad(o.sum(), leaves)

    for result, baseline, oracle in zip(results, plain(dtype), plain(torch.float64)):
        numerics.assert_gradient_close(result, baseline, oracle, beside=(v.double(),))


@in_some_lanes
def test_keys_without_a_query_have_gradients_of_zero(lane, dtype):
    q, k, v = (x.requires_grad_() for x in tensors(dtype, lane.device, T_q=0))
    flash_attention(q, k, v).sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(v.grad, torch.zeros_like(v))


@in_some_lanes
@by_each_path
def test_a_query_that_is_nan_has_a_log_sum_exp_of_nan(lane, dtype, path):
    q, k, v = tensors(dtype, lane.device)
    q[0, 0, 1] = float("nan")
    o, lse = flash_attention(q.requires_grad_(path != "decode"), k, v, return_lse=True)
    for result in (o.isnan().all(-1), lse.isnan()):
        assert result[0, 0].tolist() == [False, True, False]
        assert not result[1].any()


@in_some_lanes
def test_outputs_may_be_modified_in_place(lane, dtype):
    q, k, v = (x.requires_grad_() for x in tensors(dtype, lane.device))
    assert flash_attention(q, k, v).mul_(2).grad_fn is not None
    qkv = torch.randn(1, 5, 48, device=lane.device).to(dtype).requires_grad_()
    assert flash_attention_packed(qkv, 1).mul_(2).grad_fn is not None


@pytest.mark.simulate
@across_lanes(torch.bfloat16, lanes=("sm_80", "sm_90", "gpu"))
def test_large_scores_are_told_apart(lane, dtype):
    """A softmax of such scores is an arg max, and its output the value of the largest: 4e8, and 4e4 with gradients."""
    q, k, v, do = inputs((1, 2, 33, 33, 64), dtype, lane.device)
    o, baseline = flash_attention(q * 1e4, k * 1e4, v), reference.attention(q * 1e4, k * 1e4, v)[0]
    oracle = reference.attention(*(x.double() for x in (q * 1e4, k * 1e4, v)))[0]
    numerics.assert_close(o, baseline, oracle)
    check_against_oracle(q * 100, k * 100, v, do)


def test_heads_are_laid_along_x_where_a_grid_may_have_more_than_65535_blocks():
    from kernels.simulator import simulate

    with simulate("sm_90") as chip:
        for path in ("decode", "forward and backward"):
            attend(path, *tensors(F16, "cpu"))
        attention_keep_mask(torch.zeros(1, dtype=torch.int64), 2, 1, 20, 70, 0.1, None)
    assert len(chip.launches) == 6
    assert {launch.grid[1:] for launch in chip.launches} == {(1, 1)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_end": [1, 2]}, TypeError, r"kv_end is \[1, 2\], of list; it must be a tensor"),
        ({"dropout_p": 0.1, "dropout_seed": 3}, TypeError, "dropout_seed is 3, of int; it must be a tensor"),
        ({"dropout_p": 0.999995}, ValueError, "dropout_p is 0.999995; it must be in .* when rounded"),
    ],
)
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error, match=f"^flash_attention: {message}"):
        flash_attention(*tensors(F32, "cpu"), **options)


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match=r"^flash_attention_packed: num_heads is 0; it must be at least 1"):
        flash_attention_packed(torch.zeros(1, 2, 48), 0)


def test_a_dtype_that_autocast_made_is_explained():
    q, k, v = tensors(F32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast to bfloat16 is on"):
        flash_attention(q.bfloat16(), k, v)
