"""Attention: the contract that every backend keeps, the registry, and the backends."""

from kernels.attention import split_heads
from model.attention import builtin, flash_attention_2, flex  # noqa: F401 (importing a backend's module registers it)
from model.attention.builtin import triton_runs_on
from model.attention.registry import (
    AttentionBackend,
    attention,
    attention_backends,
    check_attention_name,
    get_attention,
    register_attention,
    self_attention,
)

__all__ = [
    "AttentionBackend",
    "attention",
    "attention_backends",
    "check_attention_name",
    "get_attention",
    "register_attention",
    "self_attention",
    "split_heads",
    "triton_runs_on",
]
