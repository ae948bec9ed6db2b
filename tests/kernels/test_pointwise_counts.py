"""Bytes and instructions of the row-wise kernels, counted in simulation beside Liger's for the same operation.

What crosses global memory is at most the bytes that threads ask for, which count a value once for each lane it is
broadcast to, and at most 32 times the sectors that warps touch, which count a sector once for each request to it: the
smaller of the two is taken. Bytes are linear in the number of rows but for weights and partial sums; sizes are GPT-2's.
"""

import math

import pytest
import torch
from optional import liger_kernel

from kernels import add_layer_norm, bias_gelu, cross_entropy, gelu, layer_norm
from kernels.simulator import simulate

BF16 = torch.bfloat16
M = 4096
VOCABULARY = 50257
MARGIN = 1.10

pytestmark = pytest.mark.simulate
on_each_chip = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
at_each_width = pytest.mark.parametrize("N", [768, 1600])


def moved(launch):
    """The most bytes that a launch can have moved through global memory."""
    counters = launch.counters
    read = min(counters.global_read, 32 * counters.sectors_read)
    return read + min(counters.global_written, 32 * counters.sectors_written)


def cost(launches):
    """(bytes moved, warp instructions executed)."""
    return sum(map(moved, launches)), sum(int(launch.counters.executed.sum()) for launch in launches)


def measure(arch, function, *tensors):
    """The costs of function's forward pass and of its backward pass for random output gradients."""
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    with simulate(arch) as chip:
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = list(chip.launches)
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    return forward, chip.launches[len(forward) :]


def rows(*shapes):
    return [torch.randn(shape).to(BF16) for shape in shapes]


# Each operation: its inputs, and how many [M, N] tensors forward and backward must read or write.
OPERATIONS = {
    "layer_norm": (layer_norm, ((M, "N"), "N", "N"), 2, 3),
    "add_layer_norm": (add_layer_norm, ((M, "N"), (M, "N"), "N", "N"), 4, 4),
    "gelu": (gelu, ((M, "N"),), 2, 3),
    "bias_gelu": (bias_gelu, ((M, "N"), "N"), 2, 3),
}


@on_each_chip
@at_each_width
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kernel_moves_little_more_than_it_must(arch, N, name):
    function, shapes, forward_tensors, backward_tensors = OPERATIONS[name]
    forward, backward = measure(arch, function, *rows(*((M, N) if len(s) == 2 else (N,) for s in shapes)))
    assert cost(forward)[0] <= MARGIN * forward_tensors * M * N * 2
    # The kernel over all rows; the sum of its partial sums, of which there are at most 128, is small beside it.
    assert cost(backward[:1])[0] <= MARGIN * backward_tensors * M * N * 2
    assert cost(backward[1:])[0] <= 0.05 * backward_tensors * M * N * 2


@on_each_chip
def test_cross_entropy_moves_little_more_than_it_must(arch):
    M = 16
    target = torch.randint(VOCABULARY, (M,))
    forward, backward = measure(arch, cross_entropy, *rows((M, VOCABULARY)), target)
    assert cost(forward)[0] <= MARGIN * M * VOCABULARY * 2
    assert cost(backward)[0] <= MARGIN * 2 * M * VOCABULARY * 2


# Beside Liger's kernels


@on_each_chip
@at_each_width
def test_layer_norm_costs_no_more_than_ligers(arch, N):
    M = 512
    x, weight, bias = rows((M, N), (N,), (N,))
    forward, _ = measure(arch, layer_norm, x, weight, bias)
    with simulate(arch) as chip:
        liger_kernel.ops.layer_norm.layer_norm_forward(x.detach(), weight.detach(), bias.detach(), 1e-5)
    for ours, theirs in zip(cost(forward), cost(chip.launches)):
        assert ours < theirs


@on_each_chip
@at_each_width
def test_layer_norm_backward_costs_no_more_than_ligers(arch, N):
    """Both with one program per multiprocessor of an H100; Liger adds its partial sums up with PyTorch, not counted."""
    x, weight, dy = rows((M, N), (N,), (M, N))
    mean, rstd = x.float().mean(1), x.float().var(1).rsqrt()
    with simulate(arch) as chip:
        torch.ops.gpt2.layer_norm_backward(dy, x, weight, torch.stack((mean, 0 * mean)), rstd)
    ours = cost(chip.launches[:1])
    programs = 132
    block, warps = liger_kernel.ops.layer_norm.calculate_settings(N)
    dx, dweight, dbias = torch.empty_like(x), torch.empty(programs, N), torch.empty(programs, N)
    with simulate(arch) as chip:
        liger_kernel.ops.layer_norm._layer_norm_backward_kernel[(programs,)](
            *(x, N, weight, mean, 1, rstd, 1, dx, N, dweight, N, dbias, N, dy, N, M, N),
            rows_per_program=math.ceil(M / programs),
            BLOCK_SIZE=block,
            num_warps=warps,
        )
    for mine, theirs in zip(ours, cost(chip.launches)):
        assert mine < theirs


@on_each_chip
def test_cross_entropy_costs_no_more_than_ligers(arch):
    """Liger takes loss and gradient in one kernel, over the logits: beside it our forward and backward in place."""
    M = 16
    (logits,), target = rows((M, VOCABULARY)), torch.randint(VOCABULARY, (M,))
    with simulate(arch) as chip:
        liger_logits = logits.clone().requires_grad_()
        liger_kernel.ops.cross_entropy.cross_entropy_forward(
            liger_logits, target, None, -100, 0.0, 0.0, "mean", None, False
        )
    theirs = cost(chip.launches)
    forward, backward = measure(arch, lambda x, t: cross_entropy(x, t, inplace=True), logits, target)
    for mine, liger in zip(cost([*forward, *backward]), theirs):
        assert mine < liger
