"""Kernels that others wrote and tested on hardware: Liger's layer norm and cross-entropy, against torch."""

import pytest
import torch
from lanes import across_lanes
from numerics import assert_close, assert_gradient_close
from optional import liger_kernel

CHIPS = ("sm_80", "sm_90")


def with_gradients(function, inputs, dtype, upstream):
    """function of the inputs in `dtype`, and the gradients of its floating inputs."""
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*inputs)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs if x.is_floating_point())]


def compare(liger, eager, inputs, dtype, upstream):
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    actual = with_gradients(liger, inputs, dtype, upstream)
    baseline = with_gradients(eager, inputs, dtype, upstream)
    oracle = with_gradients(eager, inputs, torch.float64, upstream.double())
    assert_close(actual[0], baseline[0], oracle[0])
    for got, base, exact in zip(actual[1:], baseline[1:], oracle[1:]):
        assert_gradient_close(got, base, exact)


@across_lanes(torch.float32, torch.float16, torch.bfloat16, lanes=CHIPS)
@pytest.mark.parametrize(("M", "N"), [(7, 768), (5, 1000)])
def test_layer_norm(lane, dtype, M, N):
    LigerLayerNormFunction = liger_kernel.ops.layer_norm.LigerLayerNormFunction
    inputs = [torch.randn(M, N), torch.randn(N), torch.randn(N)]
    upstream = torch.randn(M, N).to(dtype)

    def eager(x, weight, bias):
        return torch.nn.functional.layer_norm(x, (N,), weight, bias)

    compare(lambda *args: LigerLayerNormFunction.apply(*args, 1e-5), eager, inputs, dtype, upstream)


@across_lanes(torch.float32, lanes=CHIPS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(lane, dtype, label_smoothing):
    liger_cross_entropy = liger_kernel.transformers.functional.liger_cross_entropy
    target = torch.randint(0, 5003, (6,))
    target[2] = -100

    def eager(logits, target):
        return torch.nn.functional.cross_entropy(logits, target, label_smoothing=label_smoothing)

    def liger(logits, target):  # writes the gradient over its input: give it a copy
        return liger_cross_entropy(logits * 1, target, label_smoothing=label_smoothing)

    compare(liger, eager, [3 * torch.randn(6, 5003), target], dtype, torch.tensor(1.0))
