"""What the model holds while it computes, instead of its weights: them rounded to 16 bits, or this process's part.

In 16 bits alone the model computes with rounded weights, and the weights themselves stay fp32.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.1: an update is often smaller than half a unit in the
last place of a bf16 weight and would be lost; the fp32 master weight gathers it.
"""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from model.training.tensor_parallel import local


class Held:
    """with held(): the model holds its weights in `dtype`, of a DTensor the local part; behind it, the fp32 ones again.

    That is part of the graph: backward, which belongs inside as well, adds each 16-bit gradient to the fp32
    gradient of its fp32 weight, so that micro-batches and processes are summed in fp32.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.places = [
            (module._parameters, name, weight)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if weight is not None and weight.dtype is torch.float32
        ]

    @contextmanager
    def __call__(self):
        weights = {weight: weight for _, _, weight in self.places}  # a tied one once
        for weight in weights:
            weights[weight] = (local(weight) if isinstance(weight, DTensor) else weight).to(self.dtype)
        for parameters, name, weight in self.places:
            parameters[name] = weights[weight]
        try:
            yield
        finally:
            for parameters, name, weight in self.places:
                parameters[name] = weight
