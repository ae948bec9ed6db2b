"""Runs what Triton compiled, on the CPU: see README.md.

from kernels.simulator import simulate
with simulate("sm_90") as gpu:
    kernel[grid](...)               # CPU tensors
print(gpu.launches[-1].counters)
"""

from .driver import CHIPS, simulate
from .errors import (
    AsyncHazard,
    BarrierDeadlock,
    DependentLaunchRace,
    EndlessWait,
    GlobalMemoryRace,
    GridTooLarge,
    KernelError,
    Misaligned,
    OutOfBounds,
    SharedMemoryRace,
    SimulatorError,
    Unimplemented,
)

__all__ = [
    "CHIPS",
    "AsyncHazard",
    "BarrierDeadlock",
    "DependentLaunchRace",
    "EndlessWait",
    "GlobalMemoryRace",
    "GridTooLarge",
    "KernelError",
    "Misaligned",
    "OutOfBounds",
    "SharedMemoryRace",
    "SimulatorError",
    "Unimplemented",
    "simulate",
]
