"""The operations of a block other than attention and matrix products, one function each.

They are functions, not modules, so that a fused kernel can take the place of one without touching a checkpoint.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name):
    """The activation function that Hugging Face calls `name`; GPT-2's is "gelu_new", the tanh form."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation_function={name!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def layer_norm(x, norm):
    """LayerNorm over the last dimension, with the weight, bias and eps of the module `norm`."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def causal_lm_loss(logits, labels):
    """Mean cross-entropy, in fp32, of logits [B, T, V] at t against labels [B, T] at t + 1; -100 is ignored."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # shifting the labels leaves the logits where they are
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
