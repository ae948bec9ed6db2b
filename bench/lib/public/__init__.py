"""Kernels that others wrote, and what each must compute: `bench/public_kernels.py` runs them in the simulator."""

from bench.lib.public import fla, liger, tutorials, unsloth
from bench.lib.public.cases import CASES

__all__ = ["cases_of", "fla", "liger", "tutorials", "unsloth"]


def cases_of():
    """Every case, package by package."""
    return list(CASES)
