"""oneDNN's matrix products, on a CPU the kind that batched decoding needs.

BLAS chooses its kernel, and with it the order in which it sums, by the number of rows: a row's result in a batch of
eight differs in its last bits from its result alone. oneDNN's result for a row depends on no other row, nor on their
number from two up, nor on the number of threads. So in fp32 on a CPU, outside autograd, oneDNN multiplies.

oneDNN works on weights in blocks. Given plain ones it rearranges them for each product: nothing beside a hundred rows,
three times the work of one. Decoding therefore packs the weights once, at the price of a second copy of them.
"""

import torch


class PackedWeight:
    """A copy of a layer's weight in oneDNN's blocks, for as long as the weight stays what it was."""

    def __init__(self, weight, out_in):
        self.of = _identity(weight)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(out_in.detach(), 8)
        # Where the sum is long, oneDNN splits it for a single row and not for several.
        rows = torch.linspace(-1, 1, 2 * out_in.shape[1]).view(2, -1)
        one, two = (_product(rows[:M], self.blocks, None) for M in (1, 2))
        self.needs_two_rows = not torch.equal(one[0], two[0])

    def is_of(self, weight):
        return self.of == _identity(weight)

    def __deepcopy__(self, memo):
        return None  # the copy's weights are others

    def __reduce__(self):
        return type(None), ()


def serves(x, weight):
    """Whether the product of x with weight is one for oneDNN: fp32 on a CPU, outside autograd."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(rows, weight, bias, packed=None):
    """rows [M, in] @ weight^T + bias: [M, out]. weight: [out, in]; packed: its PackedWeight, if there is one."""
    M = rows.shape[0]
    if M == 1 and (packed is None or packed.needs_two_rows):
        rows = rows.expand(2, -1)
    return _product(rows, weight if packed is None else packed.blocks, bias)[:M]


def _product(rows, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _identity(weight):
    return weight.data_ptr(), weight._version, tuple(weight.shape)
