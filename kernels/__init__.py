"""Hand-written Triton kernels and their plain-PyTorch definitions."""

__version__ = "0.1.0"
