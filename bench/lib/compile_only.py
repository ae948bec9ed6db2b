"""A Triton driver that compiles for a chip that need not be there, and neither loads nor launches anything.

    with compile_only(GPUTarget("cuda", 90, 32), shared_memory=232448) as binaries:
        flash_attention(q, k, v)        # CPU tensors; the JIT's own specialisation; outputs are left as they are
    binaries[0].name, binaries[0].binary, binaries[0].shared

Where the chip and the specialisation are those of a later launch, that launch finds on disk what was compiled here. A
kernel that needs more shared memory than the chip has raises Triton's OutOfResources.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from triton.runtime import driver


class Binary(NamedTuple):
    """A kernel's name, its cubin (or AMD's hsaco), and the bytes of shared memory of a block."""

    name: str
    binary: bytes
    shared: int


class CompileOnly:
    """As much of a Triton driver as the JIT asks for. binaries: a Binary for each kernel that the JIT built."""

    def __init__(self, target, shared_memory):
        self.target, self.shared_memory = target, shared_memory
        self.binaries = []
        self.utils = self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self  # the JIT keeps one cache per device: every driver compiles afresh and sees each kernel

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared_memory}

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def load_binary(self, name, binary, shared, device):
        self.binaries.append(Binary(name, binary, shared))
        return None, None, 0, 0, 1024


@contextmanager
def compile_only(target, shared_memory):
    """Launches made inside compile for `target` and do nothing else; yields the list of Binary."""
    previous, ours = driver._active, CompileOnly(target, shared_memory)  # None where nothing asked for a driver yet
    driver.set_active(ours)
    try:
        yield ours.binaries
    finally:
        driver.set_active(previous)
