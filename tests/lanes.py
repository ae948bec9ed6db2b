"""The lanes that run a kernel: the interpreter, the simulated chips, a real GPU.

    @across_lanes(torch.float32, torch.float16, torch.bfloat16)
    def test_something(lane, dtype): ...

runs the test in each lane with each dtype that the lane can compute, under that lane's mark. A combination that a
lane cannot compute is left out when tests are collected, never skipped.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Lane:
    """Where a kernel runs: its name, the device of the tensors it takes, the dtypes it computes rightly."""

    name: str
    mark: str
    device: str
    dtypes: tuple = (torch.float32, torch.float16, torch.bfloat16)

    @contextmanager
    def enter(self):
        yield self


@dataclass(frozen=True)
class SimulatedLane(Lane):
    """A chip that kernels/simulator stands for: Lane's name is its architecture."""

    @contextmanager
    def enter(self):
        from kernels.simulator import simulate

        with simulate(self.name):
            yield self


LANES = {
    lane.name: lane
    for lane in (
        # Triton's interpreter multiplies bf16 bit patterns as integers in tl.dot.
        Lane("interpret", "interpret", "cpu", (torch.float32, torch.float16)),
        SimulatedLane("sm_80", "simulate", "cpu"),
        SimulatedLane("sm_90", "simulate", "cpu"),
        Lane("gpu", "gpu", "cuda"),
    )
}


def short(dtype):
    return str(dtype).removeprefix("torch.")


def across_lanes(*dtypes, lanes=tuple(LANES)):
    """Parametrises a test over `lane` and `dtype`; with no dtypes, over `lane` alone."""
    chosen = [LANES[name] for name in lanes]
    if not dtypes:
        params = [pytest.param(lane.name, id=lane.name, marks=getattr(pytest.mark, lane.mark)) for lane in chosen]
        return pytest.mark.parametrize("lane", params, indirect=True)
    params = [
        pytest.param(lane.name, dtype, id=f"{lane.name}-{short(dtype)}", marks=getattr(pytest.mark, lane.mark))
        for lane in chosen
        for dtype in dtypes
        if dtype in lane.dtypes
    ]
    return pytest.mark.parametrize(("lane", "dtype"), params, indirect=["lane"])
