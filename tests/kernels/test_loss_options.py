"""The options of both losses: right within the tolerance rule, alone and together, and Liger's and torch's words for
them mean what they mean there."""

import pytest
import torch
from lanes import across_lanes
from optional import liger_kernel
from rowwise import check_against_oracle, poisoned

from kernels import cross_entropy, linear_cross_entropy, reference
from kernels.cross_entropy import REDUCTIONS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
M, C, V = 5, 24, 301
CHUNK_ROWS = 3

OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "z-loss": {"lse_square_scale": 0.02},
    "class weights": {"class_weight": True},
    "all": {"label_smoothing": 0.2, "softcap": 30.0, "lse_square_scale": 0.02, "class_weight": True},
}

_poisoned = pytest.fixture(autouse=True)(poisoned)
with_each_option = pytest.mark.parametrize("name", OPTIONS)
with_each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def options_for(name, device):
    options = dict(OPTIONS[name])
    if options.get("class_weight"):
        options["class_weight"] = (torch.rand(V) + 0.1).to(device)
    return options


def targets(device):
    target = torch.randint(V, (M,))
    target[1] = -100
    return target.to(device)


def check(function, plain, tensors, target, reduction, options):
    def bound(loss):
        return lambda *tensors: loss(*tensors[:2], *tensors[2:], **options, reduction=reduction)

    dloss = torch.rand(M if reduction == "none" else (), device=target.device) + 0.5
    check_against_oracle(bound(function), bound(plain), (*tensors, target), (dloss,))


@across_lanes(F32, F16, BF16, lanes=("interpret", "gpu"))
@with_each_option
@with_each_reduction
def test_cross_entropy_matches_the_oracle(lane, dtype, name, reduction):
    logits = (torch.randn(M, V) * 3).to(lane.device, dtype)
    check(
        cross_entropy,
        reference.cross_entropy,
        (logits,),
        targets(lane.device),
        reduction,
        options_for(name, lane.device),
    )


@across_lanes(F32, BF16, lanes=("sm_80", "sm_90"))
@with_each_option
def test_compiled_cross_entropy_matches_the_oracle(lane, dtype, name):
    logits = (torch.randn(M, V) * 3).to(lane.device, dtype)
    check(
        cross_entropy, reference.cross_entropy, (logits,), targets(lane.device), "mean", options_for(name, lane.device)
    )


def head(implementation):
    def loss(x, weight, bias, target, **options):
        return linear_cross_entropy(
            x, weight, target, bias=bias, chunk_rows=CHUNK_ROWS, implementation=implementation, **options
        )

    return loss


def plain_head(x, weight, bias, target, **options):
    """In the same chunks: a product of other sizes adds up in another order, on some CPUs with thrice the error."""
    logits = torch.cat([torch.nn.functional.linear(rows, weight, bias) for rows in x.split(CHUNK_ROWS)])
    return reference.cross_entropy(logits, target, **options)


def head_tensors(dtype, device):
    shapes = ((M, C), (V, C), (V,))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


@across_lanes(F32, F16, lanes=("interpret", "gpu"))
@pytest.mark.parametrize("name", ["softcap", "all"])
@with_each_reduction
def test_the_fused_head_with_a_bias_matches_the_oracle(lane, dtype, name, reduction):
    target, options = targets(lane.device), options_for(name, lane.device)
    check(head("triton"), plain_head, head_tensors(dtype, lane.device), target, reduction, options)


@across_lanes(BF16, lanes=("sm_90",))
@with_each_reduction
def test_the_compiled_fused_head_with_a_bias_matches_the_oracle(lane, dtype, reduction):
    target, options = targets(lane.device), options_for("all", lane.device)
    check(head("triton"), plain_head, head_tensors(dtype, lane.device), target, reduction, options)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@with_each_option
@with_each_reduction
def test_its_plain_pytorch_form_matches_the_oracle(dtype, name, reduction):
    target, options = targets("cpu"), options_for(name, "cpu")
    check(head("torch"), plain_head, head_tensors(dtype, "cpu"), target, reduction, options)


@across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_large_class_weights_keep_the_fused_heads_mean_in_range(lane, dtype, reduction):
    x, weight, bias = (tensor.requires_grad_() for tensor in head_tensors(dtype, lane.device))
    class_weight = torch.full((V,), 1e5 if reduction == "mean" else 10.0, device=lane.device)
    options = {"bias": bias, "class_weight": class_weight, "reduction": reduction}
    linear_cross_entropy(x, weight, targets(lane.device), **options).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, weight, bias))


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
@with_each_option
def test_targets_that_weigh_nothing_have_gradients_of_zero(lane, dtype, name):
    options = options_for(name, lane.device) | {"class_weight": torch.zeros(V, device=lane.device)}
    options.pop("lse_square_scale", None)
    logits = torch.randn(M, V, device=lane.device, requires_grad=True)
    loss = cross_entropy(logits, targets(lane.device), **options)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert torch.equal(dlogits, torch.zeros_like(logits))


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
def test_options_at_logits_of_ten_thousand(lane, dtype):
    logits = torch.where(torch.randn(M, V) > 0, 1e4, -1e4) + torch.randn(M, V)
    for name in ("smoothing", "softcap", "all"):
        options = options_for(name, lane.device)
        check(cross_entropy, reference.cross_entropy, (logits.to(lane.device),), targets(lane.device), "none", options)


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_infinitely_improbable_class_has_pytorchs_loss(lane, dtype, softcap):
    logits, target = torch.randn(M, V, device=lane.device), targets(lane.device)
    logits[0, 7] = float("-inf")
    logits[2, target[2]] = float("-inf")
    options = {"label_smoothing": 0.1, "reduction": "none", "softcap": softcap}
    ours, plain = (loss(logits, target, **options) for loss in (cross_entropy, reference.cross_entropy))
    torch.testing.assert_close(ours, plain)


@across_lanes(F32, lanes=("sm_90", "gpu"))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_option_means_what_liger_means(lane, dtype, reduction):
    logits, target = torch.randn(M, V, device=lane.device) * 3, targets(lane.device)
    options = options_for("all", lane.device)
    ours = logits.clone().requires_grad_()
    loss = cross_entropy(ours, target, reduction=reduction, **options)
    loss.backward()
    theirs = logits.clone().requires_grad_()
    order = ("class_weight", "lse_square_scale", "label_smoothing", "softcap")
    class_weight, scale, smoothing, softcap = (options[name] for name in order)
    arguments = (theirs, target, class_weight, -100, scale, smoothing, reduction, softcap, False)
    liger_loss, *_, gradient = liger_kernel.ops.cross_entropy.cross_entropy_forward(*arguments)
    torch.testing.assert_close(loss, liger_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, gradient, rtol=1e-4, atol=1e-6)
