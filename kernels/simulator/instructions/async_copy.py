"""cp.async: copies from global to shared memory that land when their group is waited for.

The data is read when the copy is issued and written when the thread waits. In between the destination holds poison, and
the race detector reports whoever touches it.
"""

from dataclasses import dataclass

import numpy as np

from ..operands import POISON, reader
from ..ptx import Immediate
from .memory_access import active, address_reader, chosen
from .registry import guard_of, instruction, unknown


@dataclass
class Copy:
    """One cp.async of a team: the threads (indices) that take part, where their bytes go, and the bytes."""

    inst: object
    threads: np.ndarray
    offsets: np.ndarray
    data: np.ndarray  # (threads, size) uint8

    def part(self, kept):
        """The share of the threads in `kept` (bool per thread), renumbered as they will be in their own team."""
        mine = kept[self.threads]
        number = np.cumsum(kept) - 1
        return Copy(self.inst, number[self.threads[mine]], self.offsets[mine], self.data[mine])

    def moved(self, position):
        """The same, after thread i has become thread position[i]."""
        return Copy(self.inst, position[self.threads], self.offsets, self.data)

    def land(self, team, finished):
        """Writes the bytes of the threads in `finished` (bool per thread, None for all)."""
        if finished is not None and not finished[self.threads].all():
            here, rest = finished[self.threads], ~finished[self.threads]
            Copy(self.inst, self.threads[here], self.offsets[here], self.data[here]).land(team, None)
            self.threads, self.offsets, self.data = self.threads[rest], self.offsets[rest], self.data[rest]
            return False
        size = self.data.shape[1]
        if len(self.threads):
            team.races.end_copy(team, self.inst, self.offsets, size, self.threads)
            width = min(size, 8)
            team.shared.store(self.offsets, self.data.view(f"u{width}"), width, size // width)
        return True


@instruction("cp")
def cp(inst, kernel):
    if inst.modifiers[0] != "async" or inst.has("bulk", "mbarrier"):
        raise unknown(inst)
    if inst.has("commit_group"):
        return _commit
    if inst.has("wait_group"):
        if not isinstance(inst.operands[0], Immediate):
            raise unknown(inst)
        return lambda team: _wait(team, inst.operands[0].value)
    if inst.has("wait_all"):
        return _wait_all
    if not inst.has("ca", "cg"):
        raise unknown(inst)
    return _issue(inst, kernel)


def _issue(inst, kernel):
    """cp.async [dst], [src], size, source_size: bytes after source_size are zero, and not read."""
    to = address_reader(inst.operands[0], "u32", kernel)
    source = address_reader(inst.operands[1], "u64", kernel)
    size = inst.operands[2].value
    if len(inst.operands) > 4:
        raise unknown(inst)
    valid = reader(inst.operands[3], "u32", kernel) if len(inst.operands) == 4 else lambda team: np.uint32(size)
    guard = guard_of(inst, kernel)
    width = min(size, 8)

    def execute(team):
        threads = active(guard(team))
        if threads is None:
            threads = np.arange(team.size)
        if not len(threads):
            return
        count = np.broadcast_to(valid(team), team.size)[threads]
        destinations = chosen(to(team), threads)
        offsets = team.shared.locate(team, destinations, size, threads)
        team.counters.shared(team.pattern(destinations, size, threads))
        data = np.zeros((len(threads), size), np.uint8)
        reads = count > 0
        if reads.any():
            # The source may be read up to source_size only; a shorter read stays aligned to the full size.
            readers = threads[reads]
            addresses = source(team)[readers]
            for length in np.unique(count[reads]):
                some = count[reads] == length
                begin = team.memory.locate(team, addresses[some], int(length), readers[some])
                data[np.flatnonzero(reads)[some], :length] = (
                    team.memory.bytes[begin[:, None] + np.arange(length)]
                    if length < size
                    else (team.memory.load(begin, width, size // width).view(np.uint8))
                )
                team.counters.read(team, inst, begin, int(length), readers[some])
        team.races.begin_copy(team, inst, offsets, size, threads)
        team.shared.store(
            offsets,
            np.full((len(threads), size // width), POISON * 0x0101010101010101 & ((1 << 8 * width) - 1), f"u{width}"),
            width,
            size // width,
        )
        team.open_copies.append(Copy(inst, threads, offsets, data))

    return execute


def _commit(team):
    """The copies issued since the last commit become the newest group. An empty group counts too."""
    if team.mask is not None:
        from ..errors import Unimplemented

        raise Unimplemented("cp.async.commit_group executed by part of a block")
    team.copies.append(team.open_copies)
    team.open_copies = []


def _wait(team, pending):
    """All but the newest `pending` groups land."""
    done = team.copies[: max(len(team.copies) - pending, 0)]
    team.copies = team.copies[len(done) :]
    for group in done:
        for copy in group:
            copy.land(team, team.mask)


def _wait_all(team):
    _commit(team)
    _wait(team, 0)
