"""What the tests of Hopper's kernels share."""

import contextlib
from unittest import mock

import compiling
import pytest
import torch

from kernels import configs
from kernels.launch import forget


@contextlib.contextmanager
def long_rows():
    """Within it short inputs, too, take the tiles of long ones."""
    with mock.patch.object(configs, "SHORT_T", 0):
        forget()
        yield
    forget()


@contextlib.contextmanager
def kept_binaries():
    """Yields the list of the cubins that are loaded inside."""
    before, cubins = compiling._resources_nvidia, []

    def keep(cubin):
        cubins.append(cubin)
        return before(cubin)

    with mock.patch.object(compiling, "_resources_nvidia", keep):
        yield cubins


def on_hopper(test):
    """Marks a test for the GPU; where that is another chip the test is not there."""
    other = torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    return None if other else pytest.mark.gpu(test)
