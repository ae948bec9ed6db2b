"""The correctness gate before the clock: a provider that fails it gets no time."""

import numpy as np
import torch

OK = "ok"

# The rule of tests/numerics.py: error <= factor * (error of plain PyTorch in the same dtype) + a few ulps.
FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULPS = 2


def judge(results, *, factor):
    """(the largest error, OK) or (it, "failed: ..."), by the tolerance rule; the gate before the clock.

    results: {name: (actual, baseline, oracle)}: a provider's tensors, those of plain PyTorch in the same dtype, and
    those in float64 from the same rounded inputs. Errors are the largest absolute differences; one that is not finite
    comes back as None. The ulps are those of the largest value in any of the results: gradients are sums of terms of
    one scale, and one of them may be small by cancellation.
    """
    worst, status = 0.0, OK
    largest = max(oracle.abs().max().item() for _, _, oracle in results.values())
    largest = max(largest, torch.finfo(torch.float32).tiny)
    for name, (actual, baseline, oracle) in results.items():
        error, baseline_error = ((x.double() - oracle).abs().max().item() for x in (actual, baseline))
        bound = factor * baseline_error + FLOOR_ULPS * torch.finfo(actual.dtype).eps * largest
        if not np.isfinite(error):
            return None, f"failed: {name} holds NaN or infinity"
        if error > bound:
            status = f"failed: error of {name} is {error:.1e}, allowed {bound:.1e}"
        worst = max(worst, error)
    return worst, status
