"""LayerNorm, alone or in one kernel with the residual addition before it."""

from torch import nn

from model.layers.observed import is_plain
from model.layers.ops import add, add_layer_norm, layer_norm


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, by the kernels that the model chooses."""

    kernel_implementation = "auto"

    def forward(self, x):
        return layer_norm(x, self, self.kernel_implementation)


def add_norm(x, residual, norm, dropout_p):
    """(norm(sum), sum) for sum = residual + dropout(x); (None, sum) where `norm` is None.

    One kernel computes both, unless something observes the norm or stands in its place.
    """
    if norm is not None and is_plain(norm, LayerNorm):
        return add_layer_norm(x, residual, norm, norm.kernel_implementation, dropout_p)
    total = add(x, residual, dropout_p)
    return None if norm is None else norm(total), total
