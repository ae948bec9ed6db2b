"""Lets a program that asks for "cuda" run where there is none: its tensors are made on the CPU, for `simulate`."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
import triton.testing
from torch.overrides import TorchFunctionMode
from triton.runtime.autotuner import Autotuner

from .driver import CHIPS, in_charge
from .stand_ins import Device, Event, Generator, NoGraph, Stream, is_cuda, properties_of

_CPU = torch.device("cpu")


class _OnTheCPU(TorchFunctionMode):
    """device="cuda" means the CPU, in every torch function and method; pinned memory is ordinary memory."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.Tensor.get_device:
            return 0
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return arguments[0]
        if function is torch.device and arguments and is_cuda(arguments[0]):
            return _CPU
        if function is torch.Tensor.to and len(arguments) > 1 and type(arguments[1]) is int:  # a device by its number
            arguments = (arguments[0], _CPU, *arguments[2:])
        if options.get("pin_memory"):
            options.pop("pin_memory")
        if type(options.get("device")) is int:
            options["device"] = _CPU
        arguments = [_CPU if is_cuda(value) else value for value in arguments]
        options = {name: _CPU if is_cuda(value) else value for name, value in options.items()}
        return function(*arguments, **options)


class Skipped:
    """What was asked for and not done, counted: times, which only a device has. `trials`: launches of an autotuner."""

    def __init__(self):
        self.benchmarks = self.configurations = self.left_out = 0
        self.trials = []

    def benchmark(self, function, *arguments, quantiles=None, return_mode="mean", **options):
        """Stands for triton.testing.do_bench: measures nothing, not even once."""
        self.benchmarks += 1
        return [float("nan")] * len(quantiles) if quantiles else float("nan")

    def try_configuration(self, call, quantiles=None, **options):
        """Stands for the autotuner's clock: each configuration runs once, under the checks; the first one is kept."""
        before = len(in_charge().launches)
        call()
        self.configurations += 1
        self.trials += in_charge().launches[before:]
        return [float(self.configurations)] * len(quantiles or [0.5])


class _FirstConfiguration:
    """Stands for Autotuner._bench: once a configuration of a call has run, the others are left out."""

    def __init__(self, skipped):
        self._skipped, self._bench = skipped, Autotuner._bench

    def __call__(self, tuner, *arguments, config, **meta):
        if getattr(tuner, "_served", None) is tuner.nargs:
            self._skipped.left_out += 1
            return [float("inf")] * 3
        times = self._bench(tuner, *arguments, config=config, **meta)
        if times[0] != float("inf"):  # else it did not fit the chip
            tuner._served = tuner.nargs
        return times


def _tune_without_disk(tuner, key, configurations, benchmark):
    """Stands for Autotuner.check_disk_cache: such times must not be kept for a GPU of the same architecture."""
    benchmark()
    return False


@contextmanager
def gpu_names(arch, first_configuration=False):
    """Inside, torch.cuda tells of one chip `arch`, whose tensors lie on the CPU, and Triton's benchmarks time nothing.

    first_configuration: autotuned kernels run the first configuration that fits the chip, not each.
    Yields the count of what was Skipped.
    """
    chip, skipped = CHIPS[arch], Skipped()
    properties, stream = properties_of(arch, chip), Stream()
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "device": Device,
        "device_of": Device,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "can_device_access_peer": lambda device, peer: False,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "CUDAGraph": NoGraph,
        "graph": NoGraph,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "Stream": Stream,
        "Event": Event,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = lambda device=None: 0  # tensors lie in the CPU's memory
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats"):
        answers[name] = lambda device=None: None
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("range_push", "range_pop", "mark"):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name, return_value=None))
        for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice"):  # private, and called by other people's launchers
            stack.enter_context(mock.patch.object(torch._C, name, return_value=0, create=True))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", return_value=None))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        for name in ("do_bench", "do_bench_cudagraph"):
            stack.enter_context(mock.patch.object(triton.testing, name, skipped.benchmark))
        # A property: an autotuner would keep what its driver gives it, beyond the end of the simulation.
        clock = property(lambda tuner: getattr(tuner, "_do_bench", None) or skipped.try_configuration)
        stack.enter_context(mock.patch.object(Autotuner, "do_bench", clock))
        stack.enter_context(mock.patch.object(Autotuner, "check_disk_cache", _tune_without_disk))
        if first_configuration:
            first = _FirstConfiguration(skipped)
            stack.enter_context(mock.patch.object(Autotuner, "_bench", lambda *a, **options: first(*a, **options)))
        stack.enter_context(_OnTheCPU())
        yield skipped
