"""cp.async: copies from global to shared memory that land when their group is waited for.

The data is read when the copy is issued and written when the thread waits. In between the destination holds poison, and
the race detector reports whoever touches it.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import Unimplemented
from ..operands import POISON, reader
from ..ptx import Immediate
from .bulk_copy import load_box
from .bulk_store import commit, store, wait
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

    def land(self, team):
        """The owners have waited: the bytes are written."""
        if len(self.threads):
            size = self.data.shape[1]
            team.races.end_copy(team, self.inst, self.offsets, size, self.threads)
            team.shared.store(self.offsets, self.data, 1, size)


@instruction("cp")
def cp(inst, kernel):
    if inst.has("bulk"):
        return _bulk(inst, kernel)
    if inst.modifiers[0] != "async" or inst.has("mbarrier"):
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


def _bulk(inst, kernel):
    """What the copy engine does: loads by mbarriers, stores and additions by groups."""
    for name, decoder in (("bulk_group", store), ("commit_group", commit), ("wait_group", wait), ("tensor", load_box)):
        if inst.has(name):
            return decoder(inst, kernel)
    raise unknown(inst)


def _issue(inst, kernel):
    """cp.async [dst], [src], size, source_size: bytes after source_size are zero, and not read."""
    to = address_reader(inst.operands[0], "u32", kernel)
    source = address_reader(inst.operands[1], "u64", kernel)
    size = inst.operands[2].value
    if len(inst.operands) > 4:
        raise unknown(inst)
    valid = reader(inst.operands[3], "u32", kernel) if len(inst.operands) == 4 else lambda team: np.uint32(size)
    guard = guard_of(inst, kernel)

    def execute(team):
        threads = active(guard(team))
        if threads is None:
            threads = np.arange(team.size)
        if not len(threads):
            return
        destinations = chosen(to(team), threads)
        offsets = team.shared.locate(team, destinations, size, threads)
        team.counters.shared(team.pattern(destinations, size, threads))
        count, addresses = np.broadcast_to(valid(team), team.size)[threads], source(team)[threads]
        data = np.zeros((len(threads), size), np.uint8)
        for length in np.unique(count[count > 0]):
            some = np.flatnonzero(count == length)
            begin = team.memory.locate(team, addresses[some], int(length), threads[some], alignment=size)
            data[some, :length] = team.memory.load(begin, 1, size)[:, :length]
            team.counters.read(team, inst, begin, int(length), threads[some])
            team.global_races.read_by(team, inst, begin, size, threads[some])
        team.races.begin_copy(team, inst, offsets, size, threads)
        team.shared.store(offsets, np.full((len(threads), size), POISON, np.uint8), 1, size)
        team.open_copies.append(Copy(inst, threads, offsets, data))

    return execute


def _commit(team):
    """The copies issued since the last commit become the newest group. An empty group counts too."""
    _refuse_divergence(team)
    team.copies.append(team.open_copies)
    team.open_copies = []


def _wait(team, pending):
    """All but the newest `pending` groups land."""
    _refuse_divergence(team)
    done = team.copies[: max(len(team.copies) - pending, 0)]
    team.copies = team.copies[len(done) :]
    for group in done:
        for copy in group:
            copy.land(team)


def _wait_all(team):
    _commit(team)
    _wait(team, 0)


def _refuse_divergence(team):
    """Groups are kept per team: threads of one block must commit and wait together."""
    if team.mask is not None:
        raise Unimplemented("cp.async groups committed or waited for by part of a block")
