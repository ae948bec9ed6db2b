"""Lets a program that asks for "cuda" run where there is none: its tensors are made on the CPU, for `simulate`."""

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import triton.testing
from torch.overrides import TorchFunctionMode

from .driver import CHIPS, SimulatorDriver


def _is_cuda(value):
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


class _OnTheCPU(TorchFunctionMode):
    """device="cuda" means the CPU, in every torch function and method; pinned memory is ordinary memory."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.Tensor.cuda:
            return arguments[0]
        if function is torch.Tensor.pin_memory or options.get("pin_memory"):
            options.pop("pin_memory", None)
            if function is torch.Tensor.pin_memory:
                return arguments[0]
        arguments = [torch.device("cpu") if _is_cuda(value) else value for value in arguments]
        options = {name: torch.device("cpu") if _is_cuda(value) else value for name, value in options.items()}
        return function(*arguments, **options)


class Skipped:
    """What was asked for and not done, counted: times, which only a device has."""

    def __init__(self):
        self.benchmarks = self.configurations = 0

    def benchmark(self, function, *arguments, quantiles=None, return_mode="mean", **options):
        """Stands for triton.testing.do_bench: measures nothing, not even once."""
        self.benchmarks += 1
        return [float("nan")] * len(quantiles) if quantiles else float("nan")

    def try_configuration(self, call, quantiles=None, **options):
        """Stands for the autotuner's clock: each configuration runs once, under the checks; the first one is kept."""
        call()
        self.configurations += 1
        return [float(self.configurations)] * len(quantiles or [0.5])


@contextmanager
def gpu_names(arch):
    """Inside, torch.cuda tells of one chip `arch`, whose tensors lie on the CPU, and Triton's benchmarks time nothing.

    Yields the count of what was Skipped.
    """
    chip, skipped = CHIPS[arch], Skipped()
    properties = SimpleNamespace(
        name=f"simulated {arch}",
        major=chip.capability // 10,
        minor=chip.capability % 10,
        multi_processor_count=chip.multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
    )
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("do_bench", "do_bench_cudagraph"):
            stack.enter_context(mock.patch.object(triton.testing, name, skipped.benchmark))
        clock = mock.Mock(return_value=skipped.try_configuration)
        stack.enter_context(mock.patch.object(SimulatorDriver, "get_benchmarker", clock))
        stack.enter_context(_OnTheCPU())
        yield skipped
