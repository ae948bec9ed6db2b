"""Which of its kernels PyTorch's SDPA took, as the profiler names them: it chooses by shapes, versions and settings."""

import torch
from torch.profiler import ProfilerActivity, profile

# By what stands in a kernel's name, first match first: cuDNN's carry "flash", too.
_KINDS = (("cudnn", "cudnn"), ("flash", "flash"), ("fmha", "efficient"))


def kind_of(names):
    """ "cudnn", "flash", "efficient", or "math" where no name is a fused kernel's."""
    return next((kind for part, kind in _KINDS if any(part in name.lower() for name in names)), "math")


def launched(call):
    """The names of the kernels that call() runs on the GPU."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return [event.key for event in profiled.key_averages()]
