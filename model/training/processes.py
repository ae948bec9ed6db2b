"""One process, or the several that torchrun started: who writes, who reads what, what is added up, what is split."""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from model.training.tensor_parallel import split_by_heads


class Processes:
    """What the training loop asks of its neighbours. Of a process alone, rank is 0 and size 1."""

    def __init__(self, device, shard=False, tensor=False):
        """device: a torch.device; under torchrun a CUDA device becomes this process's own.

        shard: whether each holds a part of all weights, gradients and moments (FSDP2), or all of them (DDP). tensor:
        whether all of them compute each micro-batch together (tensor_parallel.py). Raises ValueError for both at once,
        and where there is nobody to share with.
        """
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device, self.shard, self.tensor, self.hosts = device, shard, tensor, None
        # Those who read batches of their own, and which of them this one is.
        self.readers, self.reader = (1, 0) if tensor else (self.size, self.rank)
        if shard and tensor:
            raise ValueError("training: shard and tensor_parallel are two ways to split a model; choose one")
        if (shard or tensor) and self.size == 1:
            name = "shard" if shard else "tensor_parallel"
            raise ValueError(f"training: {name} splits a model among processes; torchrun starts them, and there is one")
        if self.size > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # What is no work of the device's: it may wait while the first process prepares a text or saves.
            self.hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    @property
    def is_first(self):
        return self.rank == 0

    def parallel(self, model, dtype=None):
        """The model, with its gradients averaged over all processes, in fp32.

        dtype: what a model that is split rounds its weights to where it gathers them.
        """
        if self.size == 1:
            return model
        if self.shard:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for block in model.transformer.h:
                fully_shard(block, mp_policy=policy)
            return fully_shard(model, mp_policy=policy)
        if self.tensor:
            split_by_heads(model, init_device_mesh(self.device.type, (self.size,)))
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def without_averaging(self, model):
        """A context in which backward leaves gradients where they are, as all but the last micro-batch do."""
        if isinstance(model, FSDPModule):
            return _unreduced(model)
        return model.no_sync() if self.readers > 1 else nullcontext()

    def mean(self, value):
        """The mean of a scalar tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag):
        """Whether a bool is set in any process."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)))

    def gather(self, value):
        """A picklable value of each process, in a list, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def wait(self):
        """Returns once all processes have called it."""
        if self.size > 1:
            dist.barrier(group=self.hosts)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def lost(error):
    """Whether a RuntimeError says that another process is gone."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words or "connection closed" in words


@contextmanager
def _unreduced(model):
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
