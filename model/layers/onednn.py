"""Matrix products by oneDNN, for batched decoding on a CPU: a row's result is independent of the batch.

BLAS chooses its kernel, and with it the order in which it sums, by the number of rows: a row's result in a batch of
eight differs in its last bits from its result alone. oneDNN's result for a row depends on no other row, nor on their
number from two up, nor on the number of threads. So in fp32 on a CPU, outside autograd, oneDNN multiplies.

oneDNN works on weights in blocks. Given plain ones it rearranges them for each product: nothing beside a hundred rows,
three times the work of one. Decoding therefore packs the weights once, at the price of a second copy of them.

A weight can change without torch knowing: through .data, through numpy, in inference mode. So a packed copy is used
within a block of code alone, at whose start its weight is read and compared. That takes about as long as a decode step,
and packing twenty times as long.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch

_in_use: ContextVar[frozenset] = ContextVar(
    "packed weights in use", default=frozenset()
)  # of the blocks that this thread is in


@contextmanager
def using(packed):
    """Within this block linear() takes these PackedWeights, which the caller has just made or compared."""
    token = _in_use.set(_in_use.get() | set(packed))
    try:
        yield
    finally:
        _in_use.reset(token)


class PackedWeight:
    """A copy of a layer's weight in oneDNN's blocks, and what tells whether the weight is still what it was."""

    def __init__(self, weight, out_in):
        self.fingerprint = _fingerprint(weight)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(out_in.detach(), 8)
        # Where the sum is long, oneDNN splits it for a single row and not for several.
        rows = torch.linspace(-1, 1, 2 * out_in.shape[1], dtype=out_in.dtype, device=out_in.device).view(2, -1)
        one, two = (_product(rows[:M], self.blocks, None) for M in (1, 2))
        self.needs_two_rows = not torch.equal(one[0], two[0])

    def is_of(self, weight):
        """Whether the weight is the one that was packed. Reads all of it, but within a block that uses the copy."""
        return self in _in_use.get() or all(torch.equal(a, b) for a, b in zip(self.fingerprint, _fingerprint(weight)))

    def __deepcopy__(self, memo):
        return None  # the copy's weights are others

    def __reduce__(self):
        return type(None), ()


def serves(x, weight):
    """Whether the product of x with weight is one for oneDNN: fp32 on a CPU, without autograd, autocast, a compiler."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # which multiplies in 16 bits
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(rows, weight, bias, packed=None):
    """rows [M, in] @ weight^T + bias: [M, out]. weight: [out, in]; packed: its PackedWeight, if there is one."""
    M = rows.shape[0]
    if packed not in _in_use.get():
        packed = None
    if M == 1 and (packed is None or packed.needs_two_rows):
        rows = rows.expand(2, -1)
    return _product(rows, weight if packed is None else packed.blocks, bias)[:M]


def _product(rows, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@torch.no_grad()
def _fingerprint(weight):
    """Two sums of a weight [M, N], which together tell any change to it: of its bits along M, of its values along N.

    The first is exact, so the least change shows; the second shows what the first cannot, as two rows exchanged.
    """
    weight = weight.detach()
    halves = weight.is_contiguous() and weight.shape[1] % 2 == 0 and weight.storage_offset() % 2 == 0
    bits = weight.view(torch.int64 if halves else torch.int32).sum(0)  # [N / 2] or [N]
    factors = torch.linspace(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)  # [N]
    return bits, torch.mv(weight, factors).view(torch.int32)  # [M], as bits, since NaN is not NaN
