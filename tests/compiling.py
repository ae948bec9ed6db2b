"""The compile lane: kernels are compiled for a chip that is not there, through the real host code, and never run.

    with compile_only("sm_86") as kernels:
        flash_attention(q, k, v)        # CPU tensors; the JIT's own specialisation; outputs are left as they are
    assert kernels[0].spilled == 0

A driver takes the place of Triton's: it names the chip, records what the JIT built, and launches nothing. A kernel that
needs more shared memory than the chip has raises Triton's OutOfResources.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.lib.compile_only import CompileOnly

# Shared memory that one block may use, in bytes (CUDA C++ Programming Guide, table of compute capabilities; CDNA3 ISA).
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel: registers per thread, bytes of them spilled, bytes of shared memory."""

    name: str
    arch: str
    registers: int
    spilled: int
    shared: int


def _resources_nvidia(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    # None of our kernels has local arrays, so what stands on the stack was spilled there.
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def _resources_amd(assembly):
    number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return number["vgpr_count"], number["vgpr_spill_count"]  # scalar registers spill into vector ones, not to memory


class _Driver(CompileOnly):
    def __init__(self, arch):
        is_amd = arch.startswith("gfx")
        target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        super().__init__(target, SHARED_MEMORY[arch])
        self.arch, self.kernels = arch, []

    def load_binary(self, name, binary, shared, device):
        if self.target.backend == "cuda":
            registers, spilled = _resources_nvidia(binary)
            self.kernels.append(Kernel(name, self.arch, registers, spilled, shared))
        return None, None, 0, 0, 1024

    def record_amd(self, module, function, name, metadata_group, hash):
        if self.target.backend == "hip" and driver.active is self:
            registers, spilled = _resources_amd(Path(metadata_group[f"{name}.amdgcn"]).read_text())
            self.kernels.append(Kernel(name, self.arch, registers, spilled, 0))


@contextmanager
def compile_only(arch):
    """Launches made inside compile for `arch` and do nothing else; yields the list of kernels that were compiled."""
    previous = driver._active  # None where nothing asked for a driver yet
    ours = _Driver(arch)
    hooks = triton.knobs.runtime.kernel_load_end_hook
    hooks.add(ours.record_amd)
    driver.set_active(ours)
    try:
        yield ours.kernels
    finally:
        driver.set_active(previous)
        hooks.remove(ours.record_amd)
