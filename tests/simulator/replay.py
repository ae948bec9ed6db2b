"""Runs a recorded kernel launch again, on copies of its tensors, with its PTX changed."""

import copy
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.simulator.driver import Simulation
from kernels.simulator.machine import Launch, Program
from kernels.simulator.memory import GlobalMemory
from kernels.simulator.ptx import parse
from kernels.simulator.tensor_maps import TensorMap


@dataclass
class Recording:
    """A launch as it was before it ran: `text` is its PTX, `arguments` holds tensors' names, maps of them, numbers."""

    kernel: str
    text: str
    shared: int
    grid: tuple
    tensors: dict
    arguments: list
    copies_need_fence: bool

    def run(self, text=None, *, seed=None, shift=None):
        """The tensors after the kernel ran. shift: {tensor's name: bytes to add to its address}."""
        tensors, shift = copy.deepcopy(self.tensors), shift or {}
        memory = GlobalMemory(tensors)
        program = Program(parse(text or self.text), self.shared, self.copies_need_fence)
        values = list(self.arguments)
        for i, a in enumerate(values):
            if isinstance(a, str):
                values[i] = memory.address(tensors[a]) + shift.get(a, 0)
            elif isinstance(a, TensorMap):
                values[i] = a.placed(memory.address(tensors[a.tensor]))
        values += [0] * (len(program.kernel.parameters) - len(values))
        Launch(program, self.grid, values, memory, None if seed is None else np.random.default_rng(seed)).run()
        memory.write_back()
        return tensors

    def without(self, match):
        """The PTX with one regular-expression match cut out."""
        return self.text[: match.start()] + self.text[match.end() :]

    def replaced(self, match, new):
        return self.text[: match.start()] + new + self.text[match.end() :]

    def find(self, pattern):
        return list(re.finditer(pattern, self.text))


def _by_name(argument, names):
    if isinstance(argument, TensorMap):
        return replace(argument, tensor=names[id(argument.tensor)])
    return names[id(argument)] if isinstance(argument, torch.Tensor) else argument


@contextmanager
def recording(monkeypatch):
    """A list that gets a Recording of each launch inside `simulate`."""
    recorded, launch = [], Simulation.launch

    def record(self, loaded, grid, tensors, arguments):
        names = {id(tensor): name for name, tensor in tensors.items()}
        recorded.append(
            Recording(
                loaded.name,
                loaded.text,
                loaded.shared,
                grid,
                copy.deepcopy({name: tensor.detach() for name, tensor in tensors.items()}),
                [_by_name(a, names) for a in arguments],
                loaded.copies_need_fence,
            )
        )
        launch(self, loaded, grid, tensors, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "launch", record)
        yield recorded


def same(first, second):
    """Whether two runs left the same bits in every tensor."""
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
