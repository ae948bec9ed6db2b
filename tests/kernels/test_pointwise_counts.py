"""Bytes and instructions of the row-wise kernels, counted in simulation beside Liger's for the same operation.

What crosses global memory is at most the bytes that threads ask for, which count a value once for each lane it is
broadcast to, and at most 32 times the sectors that warps touch, which count a sector once for each request to it: the
smaller of the two is taken. Bytes are linear in the number of rows but for weights and partial sums; sizes are GPT-2's.
"""

import importlib
import math

import pytest
import torch
from optional import liger_kernel

from kernels import add_layer_norm, bias_gelu, cross_entropy, gelu, layer_norm
from kernels.launch import forget
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


# Each operation: its inputs, and how many [M, N] tensors forward and backward must read or write. LayerNorm's forward
# takes a row a program and reads weight and bias for each, two rows of the size of x's that L1 and L2 have; an H100 was
# faster so than with 16 rows a program (bench/results/nvidia-h100-80gb-hbm3/NOTES.md).
OPERATIONS = {
    "layer_norm": (layer_norm, ((M, "N"), "N", "N"), 4, 3),
    "add_layer_norm": (add_layer_norm, ((M, "N"), (M, "N"), "N", "N"), 6, 4),
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
    # The kernel over all rows; its partial sums and their sum are small beside it (264 programs of LayerNorm's: 9% each
    # of this many rows, 2% of the 16384 of a training step).
    share = 0.10 if "norm" in name else 0.0
    assert cost(backward[:1])[0] <= (MARGIN + share) * backward_tensors * M * N * 2
    assert cost(backward[1:])[0] <= (0.05 + share) * backward_tensors * M * N * 2


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
    (ours, instructions), (theirs, theirs_instructions) = cost(forward), cost(chip.launches)
    assert ours < 1.01 * theirs  # ours writes what rounding left in the mean, too
    assert instructions < theirs_instructions


@on_each_chip
@at_each_width
def test_layer_norm_backward_costs_no_more_than_ligers(arch, N, monkeypatch):
    """Both with one program per multiprocessor of an H100; Liger adds its partial sums up with PyTorch, not counted."""
    monkeypatch.setattr(importlib.import_module("kernels.layer_norm"), "PARTIAL_ROWS", 132)
    forget()
    x, weight, dy = rows((M, N), (N,), (M, N))
    mean, rstd = x.float().mean(1), x.float().var(1).rsqrt()
    with simulate(arch) as chip:
        torch.ops.gpt2.layer_norm_backward(dy, x, weight, torch.stack((mean, 0 * mean)), rstd)
    forget()
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
    (ours, instructions), (theirs, theirs_instructions) = ours, cost(chip.launches)
    assert ours < 1.05 * theirs
    # Rows of 1600 are one tile of 2048, and rows come through shared memory: more instructions, half of the time.
    assert instructions < theirs_instructions * (1.0 if N == 768 else 1.4)


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
    ours, instructions = cost([*forward, *backward])
    assert ours < 1.05 * theirs[0]  # each of a row's 16 warps asks for its target, maximum and sum
    assert instructions < theirs[1]
