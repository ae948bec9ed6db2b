"""The operations of a block other than attention and matrix products, one function each.

They are functions, not modules, so that a fused kernel can take the place of one without touching a checkpoint. Each
takes `kernels`, the model's kernel_implementation: "triton", the kernels of this project; "torch", PyTorch's; "auto",
triton on a GPU that it supports, else torch.

Under autocast the kernels keep what mixed precision keeps in fp32, the residual stream and the parameters, and read and
write all else in autocast's dtype: a norm's result, too, which PyTorch writes in fp32 and then casts.
"""

import torch
import torch.nn.functional as F

from kernels import add_layer_norm as fused_add_layer_norm
from kernels import bias_gelu, cross_entropy, linear_cross_entropy
from kernels import layer_norm as fused_layer_norm
from kernels.checks import FLOATS
from kernels.library import is_autocast_on
from model.attention import triton_runs_on

KERNEL_IMPLEMENTATIONS = ("auto", "triton", "torch")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function, written in three ways

ACTIVATIONS = {
    **dict.fromkeys(TANH_GELU, lambda x: F.gelu(x, approximate="tanh")),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
}


def activation(name, field="activation_function"):
    """The activation function that Hugging Face calls `name`; GPT-2's is "gelu_new", the tanh form."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is not supported; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_kernels_name(name):
    """Raises ValueError unless `name` is one of KERNEL_IMPLEMENTATIONS; returns it."""
    if not isinstance(name, str) or name not in KERNEL_IMPLEMENTATIONS:
        raise ValueError(
            f"kernel_implementation={name!r} is unknown; choose one of: {', '.join(KERNEL_IMPLEMENTATIONS)}"
        )
    return name


def use_triton(kernels, x):
    if kernels != "auto":
        return kernels == "triton"
    return x.is_cuda and x.dtype in FLOATS and triton_runs_on(x.device)


def autocast_dtype(x):
    """What autocast computes in on x's device, or None where it is off or x is not fp32."""
    kind = x.device.type
    if x.dtype != torch.float32 or not is_autocast_on(kind):
        return None
    return torch.get_autocast_dtype(kind)


def layer_norm(x, norm, kernels):
    """LayerNorm over the last dimension, with the weight, bias and eps of the module `norm`."""
    if use_triton(kernels, x):
        return fused_layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=autocast_dtype(x))
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def add_layer_norm(x, residual, norm, kernels, dropout_p):
    """(y, sum) for sum = residual + dropout(x), and y its LayerNorm by the module `norm`."""
    if use_triton(kernels, x):
        return fused_add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p)
    total = add(x, residual, dropout_p)
    return layer_norm(total, norm, kernels), total


def add(x, residual, dropout_p):
    """residual + dropout(x)."""
    return residual + (F.dropout(x, dropout_p) if dropout_p else x)


def linear_activation(x, linear, name, kernels):
    """activation(linear(x)); with triton the tanh GELU takes the bias with it, and other activations are PyTorch's."""
    if name in TANH_GELU and use_triton(kernels, x):
        rows = torch.mm(x.flatten(0, -2), linear.weight)
        return bias_gelu(rows, linear.bias).view(*x.shape[:-1], -1)
    return activation(name)(linear(x))


def _next_tokens(labels):
    """Targets [B * T] from labels [B, T]: the labels are shifted, so that the logits need no copy."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).flatten()


def causal_lm_loss(logits, labels, kernels):
    """Mean cross-entropy, in fp32, of logits [B, T, V] at t against labels [B, T] at t + 1; -100 is ignored."""
    if use_triton(kernels, logits):
        return cross_entropy(logits.flatten(0, 1), _next_tokens(labels), ignore_index=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), _next_tokens(labels), ignore_index=-100)


def causal_lm_head_loss(x, weight, labels, kernels):
    """causal_lm_loss of the logits x weight^T for x [B, T, C], without ever holding all logits."""
    implementation = "triton" if use_triton(kernels, x) else "torch"
    x = x.to(autocast_dtype(x) or x.dtype)
    return linear_cross_entropy(x.flatten(0, 1), weight, _next_tokens(labels), implementation=implementation)
