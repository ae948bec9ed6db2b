"""Linear layers: GPT-2's Conv1D and the head. For inference on a CPU, oneDNN multiplies: model/layers/onednn.py."""

import torch
from torch import nn
from torch.autograd import forward_ad

from kernels.rows import ALIGNMENT, empty_aligned, vocabulary_parts, vocabulary_product
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


WIDE = 1024  # columns from which aligned rows pay for themselves


class Head(Linear):
    """The projection to the vocabulary: weight [out, in], no bias.

    On a GPU the rows of wide logits begin a multiple of 64 elements apart: (B, T, V) for the reader, not contiguous.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.bias = None

    def forward(self, x):
        V = self.weight.shape[0]
        if x.is_cuda and V >= WIDE and V % ALIGNMENT and x.numel() > x.shape[-1] and not _transformed():
            rows, weight = _as_autocast_has_them(x.flatten(0, -2), self.weight)
            return _AlignedLinear.apply(rows, weight).view(*x.shape[:-1], V)
        return super().forward(x)


class _AlignedLinear(torch.autograd.Function):
    """x [M, C] and weight [V, C] to x weight^T in rows that begin on cache lines, as backward's two products want them.

    With rows back to back the three products of GPT-2 in fp16, M = 4096, V = 50257, take 7.5 ms on an H100.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return vocabulary_product(x, weight, empty_aligned(x.shape[0], weight.shape[0], x))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        if dy.stride(1) != 1 or dy.stride(0) % ALIGNMENT:
            dy = empty_aligned(*dy.shape, dy).copy_(dy)
        dx = None
        if ctx.needs_input_grad[0]:
            first, *rest = vocabulary_parts(dy)
            dx = dy[:, first] @ weight[first]
            for columns in rest:
                dx = torch.addmm(dx, dy[:, columns], weight[columns])
        dweight = None
        if ctx.needs_input_grad[1]:
            parts = [dy[:, columns].T for columns in vocabulary_parts(dy)]
            if torch.is_grad_enabled() or len(parts) == 1:  # somebody differentiates this
                dweight = dy.T @ x
            else:
                dweight = torch.empty_like(weight)
                for part, columns in zip(parts, vocabulary_parts(dy)):
                    torch.mm(part, x, out=dweight[columns])
        return dx, dweight


def _transformed():
    """Whether a compiler, torch.func or forward-mode AD looks on, to which a Function of ours is opaque."""
    functorch = torch._C._are_functorch_transforms_active()
    return torch.compiler.is_compiling() or functorch or forward_ad._current_level >= 0


def _as_autocast_has_them(*tensors):
    """The tensors in the dtype that autocast multiplies in, where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]
