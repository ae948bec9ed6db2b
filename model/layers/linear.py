"""Linear layers: GPT-2's Conv1D and the head. For inference on a CPU, oneDNN multiplies: model/layers/onednn.py."""

import torch
from torch import nn

from model.layers import onednn


class Linear(nn.Module):
    """x [..., in] to x @ weight + bias, [..., out]."""

    packed = None

    def out_in(self):
        """The weight as [out, in]."""
        return self.weight

    def forward(self, x):
        rows = x.flatten(0, -2)  # [M, in]
        weight = self.out_in()
        if onednn.serves(rows, weight):
            y = onednn.linear(rows, weight, self.bias, self.packed)
        else:
            y = nn.functional.linear(rows, weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def pack(self):
        """The weight packed for decoding on a CPU, or None where that is of no use. Training drops what is packed.

        What an earlier call packed is kept if the weight is still the same.
        """
        if not onednn.serves(self.weight, self.weight):
            self.packed = None
        elif self.packed is None or not self.packed.is_of(self.weight):
            self.packed = onednn.PackedWeight(self.weight, self.out_in())
        return self.packed

    def train(self, mode=True):
        if mode:
            self.packed = None
        return super().train(mode)


class Conv1D(Linear):
    """A linear layer that stores its weight as [in, out], as GPT-2's checkpoints do."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    @property
    def in_features(self):
        return self.weight.shape[0]

    @property
    def out_features(self):
        return self.weight.shape[1]

    def out_in(self):
        return self.weight.t()


class Head(Linear):
    """The projection to the vocabulary: weight [out, in], no bias."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.bias = None
