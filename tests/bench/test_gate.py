"""The gate before the clock decides as the tests do."""

import numerics
import pytest
import torch

from bench.lib import gate
from bench.lib.gate import FORWARD_FACTOR, judge


def test_the_gate_is_the_rule_of_the_tests():
    for constant in ("FORWARD_FACTOR", "GRADIENT_FACTOR", "FLOOR_ULPS"):
        assert getattr(gate, constant) == getattr(numerics, constant)


@pytest.mark.parametrize("excess", [0.5, 0.999, 1.001, 100.0])
def test_the_gate_decides_as_assert_close_does(excess):
    oracle = torch.linspace(-3, 3, 64, dtype=torch.float64)
    baseline = (oracle + 1e-4).float()
    bound = 2 * numerics.max_error(baseline, oracle) + numerics.floor(torch.float32, oracle)
    actual = oracle.float()
    actual[63] = 3 + excess * bound

    error, status = judge({"o": (actual, baseline, oracle)}, factor=FORWARD_FACTOR)
    assert error == numerics.max_error(actual, oracle)
    if excess < 1:
        assert status == "ok"
        numerics.assert_close(actual, baseline, oracle)
    else:
        assert status.startswith("failed: error of o is")
        with pytest.raises(AssertionError):
            numerics.assert_close(actual, baseline, oracle)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails_the_gate(bad):
    oracle = torch.zeros(4, dtype=torch.float64)
    actual = torch.tensor([0.0, bad, 0.0, 0.0])
    status = (None, "failed: dq holds NaN or infinity")
    assert judge({"dq": (actual, oracle.float(), oracle)}, factor=3.0) == status
