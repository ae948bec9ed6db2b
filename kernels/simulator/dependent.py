"""Dependent launches: a kernel that starts before the end of the one before, and may touch its memory after its wait.

A launch with `launch_pdl=True` begins when all blocks of the kernel before have asked for it by
griddepcontrol.launch_dependents, or ended; what they wrote is there for a thread once it has executed
griddepcontrol.wait, or has met one that has at a barrier of their block. The wait is for the end of the kernel before,
and so also for those before that, if some thread of it has waited; where none has, they may still run, too.

The simulator runs one kernel after the other, so that no value shows the fault: each access before the wait is held
against what the kernels that may still run have written, and a write against what they have read, too. A kernel that
does not ask ends before the next begins: what it read is no matter then.

A launch without launch_pdl waits for everything before it, and so does any operation of torch's between two launches,
which the simulator does not see: it takes two launches that follow each other here for neighbours.
"""

from dataclasses import dataclass

import numpy as np

from .errors import DependentLaunchRace
from .global_races import INSTRUCTION

WAIT, ASK = ("wait",), ("launch_dependents",)


@dataclass
class _Ended:
    """A kernel that may still run when the next one begins: which instruction touched each granule of its memory."""

    kernel: object
    memory: object  # its layout
    granule: int
    written: np.ndarray  # stamps of GlobalRaces (int64), or the instruction + 1 (int32); 0: nobody
    read: np.ndarray | None  # None: it has ended by then

    def touched(self, what, begin, size):
        """Of each of `size` bytes from `begin` on, the instruction that touched it + 1, or 0."""
        touched = getattr(self, what)
        if touched is None or not len(touched):
            return np.zeros(size, np.int32)
        first, last = begin // self.granule, -(-(begin + size) // self.granule)
        touched = touched[first:last]
        if touched.dtype == np.int64:
            touched = np.where(touched != 0, (touched & INSTRUCTION) + 1, 0)
        return np.repeat(touched, self.granule)[begin - first * self.granule :][:size]


class Stream:
    """The launches of a simulation, in their order."""

    def __init__(self):
        self._before = []  # kernels that a dependent launch does not wait for by itself, the last one first

    def begin(self, launch, is_dependent):
        """The launch's Dependence. Until end() the stream is that of a kernel that failed."""
        before, self._before = self._before if is_dependent else [], []
        return Dependence(launch, before)

    def end(self, dependence):
        self._before = [dependence.ended(), *([] if dependence.has_waited else dependence.before)]


class Dependence:
    """Watches one launch for what it touches before its wait, and keeps what it touches for the next one."""

    def __init__(self, launch, before):
        program, self._memory = launch.program, launch.memory
        self._launch, self._kernel, self._granule = launch, program.kernel, program.global_granule
        self.before = before
        self.has_waited = False
        total = int(np.prod(launch.grid)) * launch.num_warps
        self._waited = np.zeros(total if before else 0, bool)
        self._warps = launch.num_warps
        self._theirs = [row for ended in before for row in self._shared_with(ended)]
        controls = [inst.modifiers for inst in self._kernel.instructions if inst.opcode == "griddepcontrol"]
        granules = -(-len(self._memory.bytes) // self._granule)
        self._written = np.zeros(granules, np.int32) if controls else None
        self._read = np.zeros(granules, np.int32) if ASK in controls else None
        self.matters = bool(self._theirs or controls)

    def _shared_with(self, ended):
        """(begin, end here, what wrote each byte, what read it, the kernel) of each storage that both have."""
        for storage, begin in self._memory.storages:
            theirs = ended.memory.begin_of(storage)
            if theirs is not None and storage.nbytes():
                size = storage.nbytes()
                written, read = (ended.touched(what, theirs, size) for what in ("written", "read"))
                if written.any() or read.any():
                    yield begin, begin + size, written, read, ended.kernel

    def wait(self, warps):
        """These warps, numbers in the grid, have waited."""
        self.has_waited = True
        if self.before:
            self._waited[warps] = True

    def barrier(self, blocks):
        if self.before:
            waited = self._waited.reshape(-1, self._warps)
            waited[blocks] |= waited[blocks].any(1)[:, None]

    def meet(self, block, warps):
        """Some warps of a block, by their numbers in the grid, have met: {warp: did it wait, or only arrive?}"""
        if self.before and self._waited[list(warps)].any():
            self._waited[[warp for warp, waited in warps.items() if waited]] = True

    def look(self, team, inst, me, offsets, size, threads, *, reads, writes):
        """Accesses of `size` bytes at `offsets`, by the warps `me`. Raises DependentLaunchRace."""
        granules = offsets[:, None] // self._granule + np.arange(max(size // self._granule, 1))
        if writes and self._written is not None:
            self._written[granules] = inst.index + 1
        if reads and self._read is not None:
            self._read[granules] = inst.index + 1
        if not self._theirs:
            return
        early = np.flatnonzero(~self._waited[me])
        for begin, end, written, read, kernel in self._theirs if len(early) else ():
            inside = early[(offsets[early] >= begin) & (offsets[early] < end)]
            if not len(inside):
                continue
            bytes_ = offsets[inside][:, None] - begin + np.arange(size)
            for did, by in (("wrote", written), ("read", read))[: 2 if writes else 1]:
                at, column = np.nonzero(by[bytes_])
                if len(at):
                    verb = ("updates" if reads else "overwrites") if writes else "reads"
                    other = kernel.instructions[by[bytes_[at[0], column[0]]] - 1]
                    what = (
                        f"dependent launch: {verb} {self._memory.describe(offsets[inside[at[0]]] + column[0])}, which "
                        f"{kernel.name}, launched before, {did}, and griddepcontrol.wait has not been passed: "
                        f"`{other.text}` at {kernel.where(other)}"
                    )
                    raise team.fault(DependentLaunchRace, what, int(inside[at[0]]), threads)

    def ended(self):
        """What the next launch may meet. For a kernel without griddepcontrol the stamps of GlobalRaces tell."""
        written = self._written
        if written is None:
            written = self._launch.global_races.written
        return _Ended(self._kernel, self._memory.layout(), self._granule, written, self._read)
