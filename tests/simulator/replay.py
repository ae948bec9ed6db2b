"""Runs a recorded kernel launch again, on copies of its tensors, with its PTX changed."""

import copy
import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from kernels.simulator.driver import Simulation
from kernels.simulator.machine import Launch, Program
from kernels.simulator.memory import GlobalMemory
from kernels.simulator.ptx import parse


@dataclass
class Recording:
    """A launch as it was before it ran: `text` is its PTX, `arguments` holds a tensor's name or a number for each."""

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
        values = [memory.address(tensors[a]) + shift.get(a, 0) if isinstance(a, str) else a for a in self.arguments]
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
                [names[id(a)] if isinstance(a, torch.Tensor) else a for a in arguments],
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
