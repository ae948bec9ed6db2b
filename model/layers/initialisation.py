"""GPT-2's initialisation of weights."""

import torch
from torch import nn

from model.layers.linear import Conv1D, Head


@torch.no_grad()
def init_weights(module, config):
    """GPT-2's initialisation: normal with std initializer_range, biases 0, norms 1 and 0.

    The projections into the residual stream are scaled by 1 / sqrt(2 * n_layer), one for each of its additions.
    """
    for name, part in module.named_modules():
        if isinstance(part, Conv1D | Head | nn.Linear | nn.Embedding):
            scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
            part.weight.normal_(0.0, config.initializer_range * scale)
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()
