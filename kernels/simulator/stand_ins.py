"""Stands for what torch.cuda hands out: a device, streams, events, generators, the properties of a chip."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from .errors import SimulatorError

# Of the chips that `simulate` knows, beside what its driver tells: bytes of L2 cache, threads of a multiprocessor.
_MORE = {"sm_80": (40 << 20, 2048), "sm_86": (6 << 20, 1536), "sm_89": (72 << 20, 1536), "sm_90": (50 << 20, 2048)}


def is_cuda(value):
    """Whether `value` names a GPU: "cuda", "cuda:0" or such a torch.device."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def properties_of(arch, chip):
    """What torch.cuda.get_device_properties tells of a chip."""
    cache, threads = _MORE[arch]
    return SimpleNamespace(
        name=f"simulated {arch}",
        major=chip.capability // 10,
        minor=chip.capability % 10,
        multi_processor_count=chip.multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
        L2_cache_size=cache,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=chip.shared_memory,
        shared_memory_per_multiprocessor=chip.shared_memory + 1024,
        is_integrated=False,
        is_multi_gpu_board=False,
    )


class Device(nullcontext):
    """Stands for torch.cuda.device and device_of: there is one."""

    def __init__(self, device=None):
        super().__init__()
        self.idx, self.prev_idx = 0, 0


class Stream(nullcontext):
    """Stands for a stream, all of which are one: each launch has ended when it returns."""

    cuda_stream, device, device_index, priority = 0, torch.device("cpu"), 0, 0

    def __init__(self, *arguments, **options):
        super().__init__()

    def record_event(self, event=None):
        return Event() if event is None else event

    def query(self):
        return True

    def synchronize(self):
        pass

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass


class Event:
    """Stands for an event: what it should record has happened. Its times are none."""

    def __init__(self, *arguments, **options):
        pass

    def record(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def wait(self, stream=None):
        pass

    def elapsed_time(self, end):
        return float("nan")


class NoGraph:
    """Stands for torch.cuda.CUDAGraph and torch.cuda.graph: a class, for annotations name them."""

    def __init__(self, *arguments, **options):
        raise SimulatorError("torch.cuda.CUDAGraph: the simulator captures nothing; let the program call its function")


_TorchGenerator = torch.Generator


class _Generators(type(_TorchGenerator)):
    def __instancecheck__(cls, value):
        return isinstance(value, _TorchGenerator)


class Generator(_TorchGenerator, metaclass=_Generators):
    """Stands for torch.Generator: one for a GPU is one for the CPU, and gives other numbers than on a GPU."""

    def __new__(cls, device="cpu"):
        return _TorchGenerator("cpu" if is_cuda(device) or isinstance(device, int) else device)
