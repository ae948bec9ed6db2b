"""Which of its kernels PyTorch's SDPA took, as the profiler names them: it chooses by shapes, versions and settings."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# By what stands in a kernel's name, first match first: cuDNN's carry "flash", too.
_KINDS = (("cudnn", "cudnn"), ("flash", "flash"), ("fmha", "efficient"))


def kind_of(names):
    """ "cudnn", "flash", "efficient", or "math" where no name is a fused kernel's."""
    return next((kind for part, kind in _KINDS if any(part in name.lower() for name in names)), "math")


def launched(call):
    """The names of the kernels that call() runs on the GPU."""
    return [event.key for event in _profiled(call, ProfilerActivity.CUDA)]


def launches(call):
    """How many kernels and copies call() runs on the GPU, those of a captured graph too."""
    events = _profiled(call, ProfilerActivity.CPU, ProfilerActivity.CUDA)
    return sum(event.count for event in events if event.device_type != DeviceType.CPU)


def _profiled(call, *activities):
    call()
    with profile(activities=activities) as profiled:
        call()
        torch.cuda.synchronize()
    return profiled.key_averages()
