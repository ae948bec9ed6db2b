"""Hand-written Triton kernels, forward and backward, and in kernels.reference their plain-PyTorch definitions."""

from kernels.attention import flash_attention, flash_attention_packed
from kernels.cross_entropy import cross_entropy
from kernels.gelu import bias_gelu, gelu
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "bias_gelu",
    "cross_entropy",
    "flash_attention",
    "flash_attention_packed",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
]

# Outside the range that transformers takes for Hugging Face's package of the same import name: tests/test_packaging.py.
__version__ = "0.1.0"
