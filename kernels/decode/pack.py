"""Weights as the decode kernels read them: [out, in], in the model's dtype or in int8.

In int8 each output has a scale of its own, the largest magnitude of its weights over 127, and a weight is the nearest
multiple of it: off by at most half a scale. The kernels sum the integers times the activations in fp32 and multiply
once, so that the only error that int8 brings is that of the rounded weights.
"""

from typing import NamedTuple

import torch

WEIGHTS = ("model", "int8")
LARGEST = 127


class Packed(NamedTuple):
    """A matrix: weight [N, K] in the model's dtype, or in int8 with scale [N] fp32."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def write(self, weight):
        """Packs weight [N, K], a view of any strides, into this memory."""
        if self.scale is None:
            self.weight.copy_(weight)
            return
        integers, scale = to_int8(weight)
        self.weight.copy_(integers)
        self.scale.copy_(scale)


def pack(weight, weights="model"):
    """Packed memory for weight [N, K], a view of any strides, and what it holds. weights: "model" or "int8"."""
    if weights == "model":
        packed = Packed(weight.new_empty(weight.shape))
    elif weights == "int8":
        scale = weight.new_empty(len(weight), dtype=torch.float32)
        packed = Packed(weight.new_empty(weight.shape, dtype=torch.int8), scale)
    else:
        raise ValueError(f"pack: weights is {weights!r}; it must be {' or '.join(map(repr, WEIGHTS))}")
    packed.write(weight)
    return packed


def to_int8(weight):
    """weight [N, K] as integers [N, K] int8 and scale [N] fp32. A row with NaN or infinity has such a scale too."""
    weight = weight.float()
    scale = weight.abs().amax(1) / LARGEST  # [N]
    integers = (weight / scale.where(scale > 0, 1.0)[:, None]).round()
    return integers.nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(torch.int8), scale


def from_int8(integers, scale):
    """The weights [N, K] fp32 that they stand for."""
    return integers.float() * scale[:, None]
