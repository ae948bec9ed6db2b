"""Hand-written Triton kernels, forward and backward, and in kernels.reference their plain-PyTorch definitions."""

from kernels.attention import flash_attention, flash_attention_packed

__all__ = ["flash_attention", "flash_attention_packed"]

# Outside the range that transformers takes for Hugging Face's package of the same import name: tests/test_packaging.py.
__version__ = "0.1.0"
