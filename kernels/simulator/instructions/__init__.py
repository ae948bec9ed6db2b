"""The instruction set: each module holds one family, and registers its instructions when it is imported."""

from importlib import import_module

from .registry import decode

for _family in (
    "arithmetic",
    "async_copy",
    "atomics",
    "bits",
    "carry",
    "control",
    "convert",
    "mbarrier",
    "memory_access",
    "moves",
    "predicates",
    "tensor_core",
    "warp",
    "wgmma",
):
    import_module(f".{_family}", __name__)

__all__ = ["decode"]
