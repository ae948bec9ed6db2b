"""The loss and the gradients of a micro-batch as one CUDA graph: one launch where the host makes hundreds.

What a graph reads and writes stands at one address: the ids, the loss, each parameter's gradient, to which a replay
adds. Philox offsets advance from replay to replay, so that dropout draws anew; no number of the host enters. The norm,
its clipping and AdamW stay outside: a few launches over all parameters.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from kernels.checks import check_tensor
from model.generation.graph import capture

DEVICES = ("cuda",)


def refusal(device, *, processes=1, compiled=False):
    """Why gradients cannot be captured here, in words, or None if they can."""
    if device.type not in DEVICES:
        return f"the model is on {device.type}; a CUDA graph is for an NVIDIA GPU"
    if torch.version.hip is not None:
        return "on AMD GPUs nobody has tried it"
    if processes > 1:
        return f"{processes} processes average their gradients outside of a graph"
    return "torch.compile makes graphs of its own" if compiled else None


class CapturedGradients:
    """captured(ids) adds the gradients of loss_of(ids) to those of `parameters`, and returns the loss, which the next
    call overwrites.

    loss_of: ids [B, T] int64 to a loss [], and nothing that waits for the device. ids: such as all that will come, of
    one shape. scale: what makes of a loss that whose gradient is taken, such as a GradScaler's. around: makes a context
    in which loss and gradients are taken, such as precision.Held.

    Making it leaves weights and random state as they are, and gradients of zero. Raises what a call or its capture
    raises.
    """

    def __init__(
        self,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        parameters: Iterable[torch.nn.Parameter],
        ids: torch.Tensor,
        scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        check_tensor("CapturedGradients", ids, "ids", "BT")
        self.ids = ids.clone()
        self.parameters = [p for p in parameters if p.requires_grad]
        self.loss = torch.zeros((), device=ids.device)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient

        def step():
            with around():
                loss = loss_of(self.ids)
                scale(loss).backward()
            self.loss.copy_(loss.detach())

        with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):  # warm-ups draw, too
            self.graph = capture(step, ids.device)
        self.zero()

    def zero(self) -> None:
        """Sets the gradients to zero, where they stand; zero_grad(set_to_none=True) would let them go."""
        torch._foreach_zero_(self.gradients)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape != self.ids.shape:
            raise ValueError(
                f"CapturedGradients: ids are {tuple(ids.shape)}; {tuple(self.ids.shape)} is what was captured"
            )
        for parameter, gradient in zip(self.parameters, self.gradients):
            if parameter.grad is not gradient:
                raise RuntimeError(
                    "CapturedGradients: a gradient was replaced; zero() keeps them, zero_grad() does not"
                )
        self.ids.copy_(ids)
        self.graph.replay()
        return self.loss
