"""The tolerance rule. bench/lib/gate.py has it for benchmarks; tests/bench/test_gate.py ties the two.

A kernel may err at most a small multiple of what plain PyTorch errs in the same dtype on the same inputs; both errors
are taken against a float64 oracle computed from the inputs already rounded to that dtype. The floor, two units in the
last place of the oracle's largest value, is there because the baseline's own error can be exactly zero (T = 1). Where a
result vanishes by cancellation, such as dq at T = 1, `beside` names what gives the scale of the terms.
"""

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULPS = 2


def max_error(actual, oracle):
    """The largest absolute difference, in float64. NaN or infinity where the oracle has none counts as infinite."""
    actual, oracle = actual.detach().cpu().double(), oracle.detach().cpu().double()
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return 0.0
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    difference = torch.where(same, torch.zeros_like(oracle), (actual - oracle).abs())
    return torch.nan_to_num(difference, nan=float("inf")).max().item()


def floor(dtype, *oracles):
    finite = torch.cat([oracle.detach().double().flatten() for oracle in oracles])
    finite = finite[finite.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 1.0
    return FLOOR_ULPS * torch.finfo(dtype).eps * max(largest, torch.finfo(torch.float32).tiny)


def assert_close(actual, baseline, oracle, *, factor=FORWARD_FACTOR, what="result", beside=()):
    """Asserts the rule: error(actual) <= factor * error(baseline) + floor.

    actual: what the kernel computed; baseline: plain PyTorch in the same dtype; oracle: float64; beside: further
    oracles whose largest value counts for the floor.
    """
    assert actual.dtype == baseline.dtype, f"{what}: kernel gives {actual.dtype}, baseline {baseline.dtype}"
    error, allowed = max_error(actual, oracle), max_error(baseline, oracle)
    bound = factor * allowed + floor(actual.dtype, oracle, *beside)
    assert error <= bound, f"{what}: error {error:.3e} exceeds {factor} * {allowed:.3e} + floor = {bound:.3e}"


def assert_gradient_close(actual, baseline, oracle, what="gradient", beside=()):
    """The same rule with the factor for gradients."""
    assert_close(actual, baseline, oracle, factor=GRADIENT_FACTOR, what=what, beside=beside)
