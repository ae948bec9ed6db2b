"""setmaxnreg: the registers of a block, of which its warps give some back and take some more.

A block gets as many as its launch says, so much for each thread. Whoever wants more waits until others have given back
enough. A warp that keeps fewer than its code needs would lose values: what it needs is counted in PTX, as the registers
that hold a value at a time. ptxas needs about as many; where it computes a value twice, fewer.
"""

from dataclasses import dataclass

import numpy as np

from .errors import AsyncHazard, Unimplemented


@dataclass
class RegisterWait:
    """A ticket of warps that wait for registers."""

    pool: object
    blocks: np.ndarray
    wanted: np.ndarray  # per block of the batch

    def passed(self):
        return bool((self.pool.free[self.blocks] >= self.wanted[self.blocks]).all())

    def describe(self):
        """The first block that lacks some, and what it lacks."""
        block = next(int(b) for b in self.blocks if self.pool.free[b] < self.wanted[b])
        return (
            block,
            f"warps wait for {int(self.wanted[block])} registers, of which {int(self.pool.free[block])} are free",
        )


class RegisterPool:
    """The registers of a batch of blocks."""

    def __init__(self, program, blocks, warps):
        self._program, self._at_first = program, program.kernel.max_registers
        self.held = np.full((blocks, warps), self._at_first or 0, np.int64)  # by a thread of each warp
        self.free = np.zeros(blocks, np.int64)

    def change(self, team, count, grows):
        """The team's warps go on with `count` registers for each thread. Returns a RegisterWait if it has to wait."""
        if self._at_first is None:
            raise Unimplemented("setmaxnreg in a kernel that does not say with how many registers it starts")
        if team.mask is not None:
            raise Unimplemented("setmaxnreg executed by part of a warp")
        held = self.held[team.block, team.warp]
        if (held > count).any() if grows else (held < count).any():
            what = f"setmaxnreg to {count} where a thread holds {int(held.max() if grows else held.min())}"
            raise team.fault(AsyncHazard, f"{what}: inc cannot give any back, dec cannot get more", 0)
        needed, where = self._program.most_registers(team.pc)
        if needed > count:
            what = f"registers beyond setmaxnreg: {count} are kept, but {needed} hold values at {where}"
            raise team.fault(AsyncHazard, what, 0)
        wanted = 32 * np.bincount(team.block, count - held, len(self.free)).astype(np.int64)
        wait = RegisterWait(self, np.unique(team.block), wanted)
        if not wait.passed():
            return wait
        self.free -= wanted
        self.held[team.block, team.warp] = count
        return None
