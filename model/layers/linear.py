"""Linear layers, and on a CPU the kind of product that batched decoding needs.

BLAS chooses its kernel, and with it the order in which it sums, by the number of rows: a row's result in a batch of
eight differs in its last bits from its result alone. oneDNN's result for a row depends on no other row, nor on their
number from two up, nor on the number of threads. So in fp32 on a CPU, outside autograd, oneDNN multiplies.

oneDNN works on weights in blocks. Given plain ones it rearranges them for each product: nothing beside a hundred rows,
three times the work of one. Decoding therefore packs the weights once, at the price of a second copy of them.
"""

import torch
from torch import nn


class PackedWeight:
    """A copy of a layer's weight in oneDNN's blocks, for as long as the weight stays what it was."""

    def __init__(self, weight, out_in):
        self.of = _identity(weight)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(out_in.detach(), 8)
        # Where the sum is long, oneDNN splits it for a single row and not for several.
        rows = torch.linspace(-1, 1, 2 * out_in.shape[1]).view(2, -1)
        one, two = (_onednn(rows[:M], self.blocks, None) for M in (1, 2))
        self.needs_two_rows = not torch.equal(one[0], two[0])

    def is_of(self, weight):
        return self.of == _identity(weight)

    def __deepcopy__(self, memo):
        return None  # the copy's weights are others

    def __reduce__(self):
        return type(None), ()


class Linear(nn.Module):
    """x [..., in] to x @ weight + bias, [..., out]."""

    packed = None

    def out_in(self):
        """The weight as [out, in]."""
        return self.weight

    def forward(self, x):
        rows = x.flatten(0, -2)  # [M, in]
        weight = self.out_in()
        if not _served_by_onednn(rows, weight):
            y = nn.functional.linear(rows, weight, self.bias)
        elif self.packed is not None and self.packed.is_of(self.weight):
            twice = rows.shape[0] == 1 and self.packed.needs_two_rows
            y = _onednn(rows.expand(2, -1) if twice else rows, self.packed.blocks, self.bias)[: rows.shape[0]]
        else:
            y = _onednn(rows.expand(2, -1) if rows.shape[0] == 1 else rows, weight, self.bias)[: rows.shape[0]]
        return y.view(*x.shape[:-1], -1)

    def pack(self):
        """Packs the weight for decoding on a CPU, if it is not packed yet. Training drops what is packed."""
        is_packed = self.packed is not None and self.packed.is_of(self.weight)
        if not is_packed and _served_by_onednn(self.weight, self.weight):
            self.packed = PackedWeight(self.weight, self.out_in())

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

    def out_in(self):
        return self.weight.t()


class Head(Linear):
    """The projection to the vocabulary: weight [out, in], no bias."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.bias = None


def _served_by_onednn(x, weight):
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _onednn(rows, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _identity(weight):
    return weight.data_ptr(), weight._version, tuple(weight.shape)
