"""A Triton driver that launches nothing: what remains of a call is what it costs the host.

    with launching_nothing() as launches:
        flash_attention(q, k, v)        # CPU tensors; the result is whatever memory held
    launches.names                      # ["_attention_forward_kernel"]

Kernels are compiled for a chip, and each launch goes all the way to Triton's launcher, which here only notes the name.
"""

from contextlib import contextmanager

import torch
from triton.runtime import driver

from kernels.simulator.driver import SimulatorDriver


class Launches:
    """names: of the kernels launched, in order."""

    def __init__(self):
        self.names = []


class _Driver(SimulatorDriver):
    takes_tensors = False  # addresses, as on a GPU

    def __init__(self, arch, launches):
        super().__init__(arch)
        # Triton keeps compiled kernels, and with them their launchers, by device: this is one of our own.
        self._device = self

        def launcher(source, metadata):
            return lambda *arguments: launches.names.append(metadata.name)

        self.launcher_cls = launcher


@contextmanager
def launching_nothing(arch="sm_90"):
    """Inside, Triton kernels take CPU tensors and do nothing; yields Launches."""
    previous, launches = driver._active, Launches()
    driver.set_active(_Driver(arch, launches))
    try:
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's products are a CPU's own, with checks of their own
            yield launches
    finally:
        driver.set_active(previous)
