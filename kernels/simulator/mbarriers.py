"""mbarriers and the copies that they count: phases, who waits for what, and when bytes land.

A bulk copy reads its bytes when it is issued. They land, and count at its mbarrier, when the machine likes: in lock
step as late as possible, when nothing else can move; with a seed at random. A warp may touch what landed once it has
seen the phase end, or a barrier stands behind another warp that has: the race detector keeps that.
"""

from dataclasses import dataclass, field

import numpy as np

from .errors import AsyncHazard

MOST_BYTES = (1 << 20) - 1  # that a phase can count (PTX ISA, "Tx-count")


@dataclass(eq=False)
class Mbarrier:
    """One mbarrier of one block: `phase` counts those that have ended."""

    block: int
    at: int  # byte in the block's shared memory
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    telling: object = None  # what the arrivals of this phase tell, and
    told: object = None  # those of the phases that have ended: see partial_order.py
    tickets: list = field(default_factory=list)  # (phase, the race detector's number of a copy that landed in it)

    def complete(self, parity):
        """Whether the phase of this parity has ended."""
        return self.phase & 1 != parity & 1

    def step(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            if self.telling is not None:
                self.told, self.telling = self.telling.joined(self.told), None

    def describe(self):
        lacks = [f"lacks {self.pending} arrivals"] if self.pending else []
        if self.bytes:
            many = f"counted {-self.bytes} bytes more than expected"
            lacks.append(f"lacks {self.bytes} bytes" if self.bytes > 0 else many)
        return f"the mbarrier at byte {self.at}, which in its phase {self.phase} {', '.join(lacks)}"


@dataclass
class Wait:
    """A ticket of a team that waits: the mbarriers, each with its parity."""

    pairs: list

    def passed(self):
        return all(mbarrier.complete(parity) for mbarrier, parity in self.pairs)

    def missing(self):
        """The first that has not ended, and its parity."""
        return next(pair for pair in self.pairs if not pair[0].complete(pair[1]))


@dataclass(eq=False)
class BulkCopy:
    """A copy in flight: into `offsets` (of the batch's shared memory, 16 bytes each) of a block, for its mbarrier."""

    inst: object
    block: int
    mbarrier: Mbarrier
    offsets: np.ndarray
    data: np.ndarray  # (chunks, 16) uint8


class Mbarriers:
    """Those of one batch of blocks."""

    def __init__(self, batch):
        self._batch, self._known = batch, {}
        self.in_flight = []

    def init(self, team, offset, thread, count):
        block = int(team.thread_block[thread])
        self._known[int(offset)] = Mbarrier(block, int(offset) - int(team.shared_base[thread]), int(count), int(count))

    def find(self, team, offset, thread):
        """The mbarrier at this offset of the batch's shared memory. Raises AsyncHazard where none was initialised."""
        if int(offset) not in self._known:
            at = int(offset) - int(team.shared_base[thread])
            raise team.fault(AsyncHazard, f"no mbarrier was initialised at byte {at}", int(thread))
        return self._known[int(offset)]

    def forget(self, offset):
        self._known.pop(int(offset), None)

    def arrive(self, team, mbarrier, thread, count, expected=0):
        mbarrier.bytes += expected
        if abs(mbarrier.bytes) > MOST_BYTES:
            what = f"expects {mbarrier.bytes} bytes in one phase; {MOST_BYTES} is the most"
            raise team.fault(AsyncHazard, what, thread)
        if count > mbarrier.pending:
            what = f"arrives once too often in phase {mbarrier.phase} of the mbarrier at byte {mbarrier.at}"
            raise team.fault(AsyncHazard, f"{what}, initialised for {mbarrier.count}", thread)
        mbarrier.pending -= count
        mbarrier.telling = self._batch.tell(team, thread, mbarrier.telling)
        mbarrier.step()

    def land(self, copy):
        """The bytes are written and counted."""
        self.in_flight.remove(copy)
        self._batch.shared.store(copy.offsets, copy.data, 1, copy.data.shape[1])
        ticket = self._batch.races.land_bulk(copy.block, copy.offsets, copy.data.shape[1], copy.inst)
        copy.mbarrier.tickets.append((copy.mbarrier.phase, ticket))
        copy.mbarrier.bytes -= copy.data.size
        copy.mbarrier.step()

    def land_some(self, schedule):
        """Each copy in flight lands or not, as the schedule has it, in any order."""
        copies = list(self.in_flight)
        for i in schedule.permutation(len(copies)):
            if schedule.random() < 0.3:
                self.land(copies[i])

    def land_wanted(self):
        """When nobody can move: what is waited for lands, else everything. Returns whether anything did."""
        waits = [ticket for team in self._batch.teams for *_, ticket in team.parked if isinstance(ticket, Wait)]
        wanted = {id(mbarrier) for wait in waits for mbarrier, _ in wait.pairs}
        copies = [copy for copy in self.in_flight if id(copy.mbarrier) in wanted] or list(self.in_flight)
        for copy in copies:
            self.land(copy)
        return bool(copies)
