"""Causal flash attention, forward and backward: README.md derives it, ops.py is the way in."""

from kernels.attention.ops import MAX_HEAD_DIM, flash_attention, flash_attention_packed, split_heads

__all__ = ["MAX_HEAD_DIM", "flash_attention", "flash_attention_packed", "split_heads"]
