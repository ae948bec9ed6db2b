"""A Triton driver whose device is the simulator, and `simulate`, which installs it for a while."""

import math
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver

from .dependent import Stream
from .errors import GridTooLarge, KernelError, SimulatorError, Unimplemented
from .machine import Launch, Program
from .memory import GlobalMemory
from .ptx import parse
from .stand_ins import Event
from .tensor_maps import TensorMap


@dataclass(frozen=True)
class Chip:
    """What the driver tells of a chip: compute capability, multiprocessors, bytes of shared memory for one block."""

    capability: int
    multiprocessors: int
    shared_memory: int
    threads: int  # of one multiprocessor
    blocks: int


CHIPS = {
    "sm_80": Chip(80, 108, 166912, 2048, 32),
    "sm_86": Chip(86, 84, 101376, 1536, 16),
    "sm_89": Chip(89, 128, 101376, 1536, 24),
    "sm_90": Chip(90, 132, 232448, 2048, 32),
}

MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # along a grid's x, y and z

# The JIT keeps compiled kernels by device number: these differ per target and from any real device's.
_FIRST_DEVICE = 9000


class Simulation:
    """What `simulate` yields.

    `launches`: one `Launch` per launch, in order, each with its counters and its cubin; `faults`: the KernelErrors of
    the launches that raised one, whether the program caught them or not.
    """

    def __init__(self, arch, seed=None, transform=None):
        self.arch, self.chip = arch, CHIPS[arch]
        self.launches, self.faults = [], []
        self._stream = Stream()
        self._schedule = None if seed is None else np.random.default_rng(seed)
        self._transform = transform

    def launch(self, loaded, grid, tensors, arguments):
        """Runs a loaded kernel. tensors: {name: tensor}; arguments: a tensor or a number for each parameter."""
        if loaded.is_cooperative:
            self._refuse_grid(loaded, grid)
        for size, most, axis in zip(grid, MOST_BLOCKS, "xyz"):
            if size > most:
                raise SimulatorError(
                    f"{loaded.name}: grid {tuple(grid)} has {size} blocks along {axis}; a GPU takes at most {most}"
                )
        try:
            self._run(loaded, grid, tensors, arguments)
        except KernelError as fault:
            self.faults.append(fault)
            raise

    def _run(self, loaded, grid, tensors, arguments):
        program = loaded.program(self._transform)
        memory = GlobalMemory(tensors, program.kernel.tables)
        values = [_placed(a, memory) for a in arguments]
        values += [0] * (len(program.kernel.parameters) - len(values))  # scratch pointers, unused
        how = {"stream": self._stream, "dependent": loaded.is_dependent, "together": loaded.is_cooperative}
        launch = Launch(program, grid, values, memory, self._schedule, **how)
        launch.run()
        memory.write_back()
        launch.memory, launch.cubin = None, loaded.cubin
        self.launches.append(launch)

    def _refuse_grid(self, loaded, grid):
        """GridTooLarge if the chip cannot hold all blocks at a time, which a cooperative launch requires."""
        chip, threads = self.chip, 32 * loaded.num_warps
        registers = -(-loaded.registers // 8) * 8 * threads
        limits = (chip.blocks, chip.threads // threads, 65536 // max(registers, 1))
        held = chip.multiprocessors * min(*limits, (chip.shared_memory + 1024) // (loaded.shared + 1024))
        blocks = math.prod(grid)
        if blocks > held:
            error = GridTooLarge(
                f"a cooperative grid of {blocks} blocks; {self.arch} holds {held} of them at a time, each of "
                f"{loaded.num_warps} warps, {loaded.registers} registers and {loaded.shared} bytes of shared memory"
            )
            error.kernel = loaded.name
            raise error


def _placed(argument, memory):
    """A tensor's address, a tensor map at its tensor's address, any other argument itself."""
    if isinstance(argument, TensorMap):
        return argument.placed(memory.address(argument.tensor))
    return memory.address(argument) if isinstance(argument, torch.Tensor) else argument


_simulations = []  # those entered and not yet left, all by one thread; the last one is in charge
_thread, _entering = None, threading.Lock()  # Triton has one driver for the process, so only one thread simulates
_files = {}  # what was compiled, by the kernel's hash: {".ptx": bytes, ".cubin": bytes}


def in_charge():
    """The Simulation that launches go to."""
    return _simulations[-1]


def _keep_files(module, function, name, metadata_group, hash):
    """Triton calls this when it loads a kernel: the only place that shows a launcher its PTX."""
    paths = [Path(path) for path in metadata_group.values()]
    _files[hash] = {path.suffix: path.read_bytes() for path in paths if path.suffix in (".ptx", ".cubin")}


# An entry of a cubin's .nv.info: format 4 (a size and a value), attribute 0x2f (registers), 8 bytes: symbol, registers.
_REGISTER_COUNT = b"\x04\x2f\x08\x00"


def _registers(cubin):
    """Registers per thread that ptxas allocated: launch code that sizes a grid by occupancy divides by them."""
    at = cubin.find(_REGISTER_COUNT)
    if at < 0:
        raise SimulatorError("simulate: the cubin does not say how many registers a thread has")
    return int.from_bytes(cubin[at + 8 : at + 12], "little")


class _Loaded:
    """A compiled kernel as the driver keeps it, with what was parsed of it."""

    def __init__(self, metadata):
        self.name, self.shared = metadata.name, metadata.shared
        # Triton 3.6 leaves this fence out everywhere; later versions write it.
        self.copies_need_fence = not metadata.triton_version.startswith("3.6.")
        self.num_warps = metadata.num_warps
        self.is_dependent = bool(getattr(metadata, "launch_pdl", False))
        self.is_cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
        self.text, self.cubin = _files[metadata.hash][".ptx"].decode(), _files[metadata.hash][".cubin"]
        self.registers = _registers(self.cubin)
        self._programs = {}

    def program(self, transform):
        text = self.text if transform is None else transform(self.text)
        if text not in self._programs:
            self._programs[text] = Program(parse(text), self.shared, self.copies_need_fence)
        return self._programs[text]


class _Launcher:
    """Stands for Triton's compiled launcher: takes the kernel's arguments apart and runs them."""

    def __init__(self, source, metadata):
        self._signature, self._names, self._metadata = source.signature, source.fn.arg_names, metadata
        self._loaded = None

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        if not _simulations:
            raise SimulatorError(f"{self._metadata.name}: compiled for a simulated chip; launch it inside `simulate`")
        if _thread != threading.get_ident():
            raise SimulatorError(f"{self._metadata.name}: launched by a thread that did not enter `simulate`")
        if getattr(self._metadata, "global_scratch_size", 0):
            raise Unimplemented(f"{self._metadata.name}: kernels with global scratch memory (device-side descriptors)")
        if self._loaded is None:
            self._loaded = _Loaded(self._metadata)
        tensors, values = {}, []
        self._descriptors = iter(getattr(self._metadata, "tensordesc_meta", None) or ())
        for name, value in zip(self._names, arguments):
            self._flatten(name, self._signature[name], value, tensors, values)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        in_charge().launch(self._loaded, (x, y, z), tensors, values)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _flatten(self, name, kind, value, tensors, values):
        """Appends what the kernel is passed for one argument: nothing for a constexpr, several values for a tuple."""
        if isinstance(kind, (tuple, list)):
            for i, (inner, item) in enumerate(zip(kind, value)):
                self._flatten(f"{name}[{i}]", inner, item, tensors, values)
        elif kind == "constexpr":
            return
        elif kind.startswith("*"):
            value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
            tensors[name] = self._checked(name, value)
            values.append(value)
        elif kind.startswith("tensordesc"):
            metadata = next(self._descriptors, None)
            if metadata is None:
                raise Unimplemented(f"{self._metadata.name}: {name}, a tensor descriptor that is no tensor map")
            tensors[name] = self._checked(name, value.base)
            values += [TensorMap.of(value, metadata), *value.shape, *value.strides]
        else:
            values.append(value)

    def _checked(self, name, value):
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            what = f"a tensor on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise SimulatorError(f"{self._metadata.name}: {name} is {what}; the simulator takes CPU tensors")
        return value


class _Utils:
    """The driver functions that Triton's runtime calls on a device."""

    def __init__(self, chip):
        self._chip = chip

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, threads per block at most)"""
        return name, name, _registers(binary), 0, 1024

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self._chip.shared_memory,
            "multiprocessor_count": self._chip.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class SimulatorDriver(DriverBase):
    """What `triton.runtime.driver.active` is inside `simulate`."""

    takes_tensors = True  # kernels/launch.py hands over tensors, whose bounds are checked, not addresses

    def __init__(self, arch):
        chip = CHIPS[arch]
        self._device = _FIRST_DEVICE + chip.capability
        self._target = GPUTarget("cuda", chip.capability, 32)
        self.utils, self.launcher_cls = _Utils(chip), _Launcher
        self._interface = SimpleNamespace(
            current_device=lambda: self._device,
            set_device=lambda device: None,
            device_count=lambda: 1,
            is_available=lambda: True,
            synchronize=lambda device=None: None,
            get_device_capability=lambda device=None: divmod(chip.capability, 10),
            get_device_properties=lambda device=None: SimpleNamespace(
                name=f"simulated {arch}", multi_processor_count=chip.multiprocessors, warp_size=32
            ),
            Event=Event,
        )

    @classmethod
    def is_active(cls):
        return bool(_simulations)

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return self._target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return self._interface

    def get_current_device(self):
        return self._device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self._target.arch, 10)

    def assemble_tensormap_to_arg(self, descriptions, arguments):
        return arguments

    def get_benchmarker(self):
        raise SimulatorError("the simulator measures no time: benchmarks and autotuning need a GPU")

    get_empty_cache_for_benchmark = get_benchmarker

    def clear_cache(self, cache):
        self.get_benchmarker()


@contextmanager
def simulate(arch, *, seed=None, transform=None):
    """Inside, Triton kernels take CPU tensors and run as compiled for `arch`; yields a `Simulation`.

    arch: "sm_80", "sm_86", "sm_89" or "sm_90". seed: None runs warps in lock step, an int runs warps and blocks in a
    random order that it determines. transform: a function from PTX to PTX, applied before a kernel runs (for tests that
    plant faults).

    Raises SimulatorError for an unknown arch, under TRITON_INTERPRET=1, and while another thread is inside; another
    thread's launches raise it as well. What a kernel does wrong is raised where it is launched, as a subclass of
    KernelError; the tensors are then as before the launch. The previous driver comes back on leaving.
    """
    if arch not in CHIPS:
        raise SimulatorError(f"simulate: no chip {arch!r}; one of {', '.join(CHIPS)} is required")
    if knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET") == "1":
        raise SimulatorError("simulate: TRITON_INTERPRET=1 is set, so kernels are interpreted, not compiled; unset it")
    global _thread
    with _entering:
        if _simulations and _thread != threading.get_ident():
            raise SimulatorError(
                "simulate: another thread is inside; Triton has one driver, so let one thread simulate"
            )
        _thread = threading.get_ident()
        previous = triton_driver._active
        simulation = Simulation(arch, seed, transform)
        _simulations.append(simulation)
        knobs.runtime.kernel_load_start_hook.add(_keep_files)
        triton_driver.set_active(SimulatorDriver(arch))
    try:
        yield simulation
    finally:
        with _entering:
            triton_driver.set_active(previous)
            _simulations.remove(simulation)
            if not _simulations:
                knobs.runtime.kernel_load_start_hook.remove(_keep_files)
