"""Happens-before for shared memory: who touched each granule last, and whether a barrier stands between.

Each block has a clock that its barriers and proxy fences advance. An access leaves a stamp (clock, warp,
instruction) on the granules that it touches; a later access by another warp conflicts if the stamp is not older than
the block's last barrier and one of the two writes. Accesses of one warp are ordered by its program.
"""

from dataclasses import dataclass

import numpy as np

from .errors import AsyncHazard, SharedMemoryRace

# A stamp is clock << 28 | warp << 20 | instruction. Two warp numbers are not warps.
_WARP_SHIFT, _WARP_BITS = 20, 8
_INSTRUCTION = (1 << _WARP_SHIFT) - 1
_WHO = ((1 << _WARP_BITS) - 1) << _WARP_SHIFT | 1 << 62  # an unfinished copy is like another warp's
SEVERAL = 255  # more than one warp read
_STAND_INS = 240  # from here on no number is that of a warp
ATOMIC = 254  # atomics are ordered among themselves
_IN_FLIGHT = 1 << 62  # set in a stamp: the copy that writes here has not been waited for


@dataclass
class AsyncRead:
    """A read of shared memory that has begun: by `threads` (of a team) of the warpgroups `group`, at `offsets`."""

    number: int
    size: int
    threads: np.ndarray
    group: np.ndarray
    offsets: np.ndarray

    def part(self, kept):
        """The share of the threads in `kept` (bool per thread), renumbered as they will be in their own team."""
        mine = kept[self.threads]
        renumbered = (np.cumsum(kept) - 1)[self.threads[mine]]
        return AsyncRead(self.number, self.size, renumbered, self.group[mine], self.offsets[mine])

    def moved(self, position):
        """The same, after thread i has become thread position[i]."""
        return AsyncRead(self.number, self.size, position[self.threads], self.group, self.offsets)


def differs(first, second):
    """Where two stamps are those of different warps."""
    return ((first ^ second) & _WHO) != 0


def who_of(stamps):
    return (stamps >> _WARP_SHIFT) & ((1 << _WARP_BITS) - 1)


def clock_of(stamps):
    return stamps >> _WARP_SHIFT >> _WARP_BITS


def in_flight(stamps):
    """Where a copy that has not been waited for writes."""
    return (stamps >= 0) & (stamps & _IN_FLIGHT != 0)


def bit_set(numbers):
    """Block numbers as the bits of a Python int."""
    return sum(1 << int(n) for n in np.unique(numbers))


def _winning(values, rows):
    """What the last access to each row writes, per access."""
    _, inverse = np.unique(rows, return_inverse=True)
    winner = np.empty(len(rows), np.int64)
    winner[inverse] = np.arange(len(rows))
    return values[winner[inverse]]


class RaceDetector:
    """Watches one batch of blocks. Offsets are bytes into the batch's shared memory."""

    is_partial = False  # whether warps of a block meet without the others: partial_order.py

    def __init__(self, program, blocks, shared, warps):
        self._kernel, self._granule = program.kernel, program.granule
        self._copies_need_fence = program.copies_need_fence
        self._is_copy = np.array([inst.opcode == "cp" for inst in self._kernel.instructions])
        self._shared = shared
        self._stride = shared.stride
        granules = blocks * shared.stride // self._granule
        self.written = np.full(granules, -1, np.int64)
        self.read = np.full(granules, -1, np.int64)
        self.clock = np.ones(blocks, np.int64)
        self.barrier_clock = np.ones(blocks, np.int64)  # the clock at each block's last barrier
        # Proxy fences, per block and warp: the clock at the last one, and at the last barrier before it.
        self.fence_clock = np.zeros((blocks, 256), np.int64)
        self.fence_barrier = np.zeros((blocks, 256), np.int64)
        self.reading = None  # per warpgroup and granule: number of the last unfinished asynchronous read, or 0
        self._reads_begun = 0
        # Most reads are followed by a barrier, not by a write: they are noted, and stamped only when a write comes.
        self._noted_reads = []  # (blocks as a bit set, offsets, size, keys, since)
        self._write_clock = np.zeros(blocks, np.int64)  # of the newest write
        self._copies = np.zeros(blocks, np.int64)  # begun and not ended
        self._landed = None  # per granule: number of the bulk copy that filled it, or 0
        self._observed = np.ones((1, warps), bool)  # per bulk copy and warp: has it seen that the copy landed?
        self._landings = [None]  # per bulk copy, its instruction
        self._news = [[] for _ in range(blocks)]  # bulk copies that some warp of the block has not seen land

    def barrier(self, blocks):
        """All warps of these blocks have met."""
        self.clock[blocks] += 1
        self.barrier_clock[blocks] = self.clock[blocks]
        for block in blocks if self._landed is not None else ():
            seen = self._observed[self._news[block]].any(1) if self._news[block] else ()
            for ticket in [t for t, is_seen in zip(self._news[block], seen) if is_seen]:
                self._observed[ticket] = True
                self._news[block].remove(ticket)
        met = bit_set(blocks)
        self._noted_reads = [noted for noted in self._noted_reads if noted[0] & ~met]

    def _keys(self, team, instruction, threads, warps=None):
        """The stamps that accesses leave: a column with one row per access."""
        warps = team.warp if warps is None else warps
        keys = (self.clock[team.block] << _WARP_SHIFT << _WARP_BITS) | (warps << _WARP_SHIFT) | instruction.index
        return (np.repeat(keys, 32) if threads is None else keys[threads // 32])[:, None]

    def _clash(self, last, keys, since):
        """Where the stamps `last` are no older than the last barrier and another warp's."""
        return (last >= since) & differs(last, keys)

    def _several(self, team):
        """Who reads where all warps of each of the team's warpgroups do, per warp."""
        return np.full(team.warps, SEVERAL)

    def _since(self, team, threads, whole_group=False):
        """Stamps from here on are no older than the last barrier: a number, or a column with one row per access."""
        clocks = self.barrier_clock[team.block] << _WARP_SHIFT << _WARP_BITS
        if clocks[0] == clocks.min() == clocks.max():
            return clocks[0]
        return (np.repeat(clocks, 32) if threads is None else clocks[threads // 32])[:, None]

    def _cells(self, stamps, offsets, size):
        """The stamps as a table with one row per access of `size` bytes, and the rows' numbers."""
        per_access = max(size // self._granule, 1)
        return stamps.reshape(-1, per_access), offsets // (per_access * self._granule)

    def read_by(self, team, instruction, offsets, size, threads=None, distinct=None):
        """Threads read: raises SharedMemoryRace where another warp wrote since the last barrier.

        distinct: the accesses (indices) that remain when those that a warp makes twice count once; None: all.
        """
        if distinct is not None:
            offsets, threads = offsets[distinct], distinct if threads is None else threads[distinct]
        keys, since = self._keys(team, instruction, threads), self._since(team, threads)
        if self._copies.any() or (self._write_clock[team.block] >= self.barrier_clock[team.block]).any():
            written, rows = self._cells(self.written, offsets, size)
            last = written[rows]
            self._report(team, self._clash(last, keys, since), last, "reads", "wrote", threads)
        self._report_unobserved(team, "reads", offsets, size, threads)
        self._note(team, offsets, size, keys, since)

    def _note(self, team, offsets, size, keys, since):
        self._noted_reads.append((team.block_bits, offsets, size, keys, since))

    def written_by(self, team, instruction, offsets, size, threads=None, values=None, atomic=False):
        """Threads write: raises SharedMemoryRace where another warp touched the place since the last barrier.

        values: what they write, a uint8 array with one row per access. Warps may write one value to one place: Triton
        does so where a layout holds copies.
        """
        self._stamp_reads()
        keys = self._keys(team, instruction, threads, np.full(team.warps, ATOMIC) if atomic else None)
        since = self._since(team, threads)
        written, rows = self._cells(self.written, offsets, size)
        last = written[rows]
        clash = self._clash(last, keys, since)
        if values is not None and np.count_nonzero(clash):
            present = self._shared.bytes.reshape(-1, size)[offsets // size]
            clash &= ~self._same(values, present) | (last & _IN_FLIGHT != 0)
        self._report(team, clash, last, "overwrites", "wrote", threads)
        self._check_readers(team, keys, since, offsets, size, threads)
        self._report_asynchronous_readers(team, offsets, size, threads)
        self._report_unobserved(team, "overwrites", offsets, size, threads)
        if self._landed is not None:
            self._cells(self._landed, offsets, size)[0][rows] = 0
        written[rows] = keys
        last = written[rows]
        clash = last != keys
        if values is not None and np.count_nonzero(clash):
            clash &= ~self._same(values, _winning(values, rows))
        self._report(team, clash, last, "writes", "writes too", threads)
        self._write_clock[team.block] = self.clock[team.block]

    def _check_readers(self, team, keys, since, offsets, size, threads):
        read, rows = self._cells(self.read, offsets, size)
        last = read[rows]
        self._report(team, self._clash(last, keys, since), last, "overwrites", "read", threads)

    def _stamp_reads(self):
        for _, offsets, size, keys, since in self._noted_reads:
            self._stamp(self.read, offsets, size, keys, since, SEVERAL)
        self._noted_reads.clear()

    def _stamp(self, stamps, offsets, size, keys, since, several):
        """Where another warp read in the same interval, now or before, the stamp says `several`."""
        read, rows = self._cells(stamps, offsets, size)
        last = read[rows]
        crowd = keys & ~(((1 << _WARP_BITS) - 1) << _WARP_SHIFT) | (several << _WARP_SHIFT)
        read[rows] = np.where(self._clash(last, keys, since), crowd, keys)
        beaten = differs(read[rows], keys)
        if np.count_nonzero(beaten):
            at = np.nonzero(beaten)
            read[rows[at[0]], at[1]] = np.broadcast_to(crowd, beaten.shape)[at]

    def _same(self, ours, theirs):
        """Per access and granule, whether the bytes are equal."""
        return (ours == theirs).reshape(len(ours), max(ours.shape[1] // self._granule, 1), -1).all(2)

    def _report(self, team, clash, last, verb, did, threads):
        """Raises for the first access in `clash` (per access and granule); `last` holds the other side's stamps."""
        if not np.count_nonzero(clash):
            return
        at, column = (int(i[0]) for i in np.nonzero(clash))
        stamp = int(last[at, column])
        place = self._place(stamp)
        if stamp & _IN_FLIGHT:
            what = f"{verb} shared memory that {place} still fills: its wait is missing"
            raise team.fault(AsyncHazard, what, at, threads)
        warp = who_of(stamp)
        who = {ATOMIC: "an atomic"}.get(warp, f"warp {warp}" if warp < _STAND_INS else "several warps")
        what = f"shared-memory race: {verb} what {who} {did} since the last barrier, {place}"
        raise team.fault(SharedMemoryRace, what, at, threads)

    def _place(self, stamp):
        other = self._kernel.instructions[stamp & _INSTRUCTION]
        return f"`{other.text}` at {self._kernel.where(other)}"

    # Asynchronous copies (cp.async)

    def begin_copy(self, team, instruction, offsets, size, threads):
        """An asynchronous copy into these places starts: until `end_copy` no one may touch them."""
        self.written_by(team, instruction, offsets, size, threads)
        written, rows = self._cells(self.written, offsets, size)
        written[rows] |= _IN_FLIGHT
        self._copies[team.block] += 1

    def end_copy(self, team, instruction, offsets, size, threads):
        """The threads have waited for their copies: from here on these are writes of theirs."""
        written, rows = self._cells(self.written, offsets, size)
        written[rows] = self._keys(team, instruction, threads)
        self._write_clock[team.block] = self.clock[team.block]
        self._copies[team.block] -= 1

    # Bulk copies (TMA): begun by one thread, landed by nobody; who touches the data has seen its mbarrier's phase end.

    def begin_bulk(self, team, instruction, offsets, size, thread):
        """The thread starts a copy into these places of its block."""
        threads = np.full(len(offsets), thread)
        self.written_by(team, instruction, offsets, size, threads)
        written, rows = self._cells(self.written, offsets, size)
        written[rows] |= _IN_FLIGHT
        self._copies[team.thread_block[thread]] += 1

    def land_bulk(self, block, offsets, size, instruction):
        """The copy is done. Returns its number, which `observe` takes."""
        if self._landed is None:
            self._landed = np.zeros(len(self.written), np.int32)
        written, rows = self._cells(self.written, offsets, size)
        landed, _ = self._cells(self._landed, offsets, size)
        ticket = len(self._landings)
        written[rows], landed[rows] = -1, ticket
        self._landings.append(instruction)
        if ticket == len(self._observed):
            self._observed = np.concatenate([self._observed, np.zeros_like(self._observed)])
        self._observed[ticket] = False
        self._news[block].append(ticket)
        self._copies[block] -= 1
        return ticket

    def observe(self, ticket, warp):
        """The warp has seen the phase end in which this copy landed."""
        self._observed[ticket, warp] = True

    def _report_unobserved(self, team, verb, offsets, size, threads, whole_group=False):
        """Raises where a warp, or one of the four of its warpgroup, touches what it does not know to have landed."""
        if self._landed is None:
            return
        landed, rows = self._cells(self._landed, offsets, size)
        tickets = landed[rows]
        if not np.count_nonzero(tickets):
            return
        warps = team.thread_warp if threads is None else team.thread_warp[threads]
        if whole_group:
            seen = self._observed.reshape(len(self._observed), -1, 4).all(2)[tickets, warps[:, None] // 4]
        else:
            seen = self._observed[tickets, warps[:, None]]
        if not seen.all():
            at, column = (int(i[0]) for i in np.nonzero(~seen))
            inst = self._landings[int(tickets[at, column])]
            place = f"`{inst.text}` at {self._kernel.where(inst)}"
            what = f"{verb} what {place} filled, without having seen its mbarrier's phase end"
            raise team.fault(AsyncHazard, what, at, threads)

    def check_fenced(self, team, instruction, offset, size, thread):
        """Raises unless what was written there by ordinary instructions is fenced for the copy engine."""
        written, rows = self._cells(self.written, np.array([offset]), size)
        self._report_unfenced(team, written[rows], np.array([thread]))

    # Asynchronous readers (wgmma) see ordinary writes only through a proxy fence, and read until they are waited for.

    def proxy_fence(self, team):
        """The active warps make the writes that they know of visible to asynchronous readers."""
        self.clock[np.unique(team.block)] += 1
        warps = slice(None) if team.mask is None else team.mask.reshape(-1, 32).any(1)
        block, warp = team.block[warps], team.warp[warps]
        self.fence_clock[block, warp] = self.clock[block]
        self.fence_barrier[block, warp] = self.barrier_clock[block]

    def begin_async_read(self, team, instruction, offsets, size, threads):
        """The warpgroups of these threads start to read. Returns what `end_async_read` takes."""
        keys = self._keys(team, instruction, threads, self._several(team))
        since = self._since(team, threads, whole_group=True)
        written, rows = self._cells(self.written, offsets, size)
        last = written[rows]
        self._report(team, self._clash(last, keys, since), last, "reads", "wrote", threads)
        self._report_unobserved(team, "reads", offsets, size, threads, whole_group=True)
        self._report_unfenced(team, last, threads)
        self._begin_reading(team)
        group = team.thread_warp[threads] // 4
        for g in np.unique(team.warp // 4):
            cells, _ = self._cells(self.reading[g], offsets, size)
            cells[rows[group == g]] = self._reads_begun
        return AsyncRead(self._reads_begun, size, threads, group, offsets)

    def end_async_read(self, team, instruction, ticket):
        """The readers have been waited for; what they did counts as a read by all their warps now."""
        for g in np.unique(team.warp // 4):
            cells, rows = self._cells(self.reading[g], ticket.offsets[ticket.group == g], ticket.size)
            now = cells[rows]
            cells[rows] = np.where(now == ticket.number, 0, now)
        keys = self._keys(team, instruction, ticket.threads, self._several(team))
        since = self._since(team, ticket.threads, whole_group=True)
        self._note(team, ticket.offsets, ticket.size, keys, since)

    def _begin_reading(self, team):
        if self.reading is None:
            self.reading = np.zeros((team.batch.launch.num_warps // 4 + 1, len(self.written)), np.int32)
        self._reads_begun += 1

    # Bulk stores (TMA): the copy engine reads for a thread, until the thread has waited for it.

    def begin_bulk_read(self, team, instruction, offsets, size, thread):
        """The thread starts a copy out of these places. Returns what `end_bulk_read` takes."""
        threads = np.full(len(offsets), thread)
        keys, since = self._keys(team, instruction, threads), self._since(team, threads)
        written, rows = self._cells(self.written, offsets, size)
        last = written[rows]
        self._report(team, self._clash(last, keys, since), last, "reads", "wrote", threads)
        self._report_unobserved(team, "reads", offsets, size, threads)
        self._report_unfenced(team, last, threads)
        self._begin_reading(team)
        cells, _ = self._cells(self.reading[-1], offsets, size)
        cells[rows] = self._reads_begun
        return self._reads_begun

    def end_bulk_read(self, team, instruction, number, offsets, size, thread):
        """The thread has waited for the copy: it counts as a read of its own."""
        cells, rows = self._cells(self.reading[-1], offsets, size)
        now = cells[rows]
        cells[rows] = np.where(now == number, 0, now)
        threads = np.full(len(offsets), thread)
        self._note(team, offsets, size, self._keys(team, instruction, threads), self._since(team, threads))

    def _fenced_before(self, block, warp, writer):
        """The clock before which what `writer` wrote came before each reader's last fence."""
        return self.fence_barrier[block, warp][:, None]

    def _report_unfenced(self, team, last, threads):
        block, warp = team.block[threads // 32], team.warp[threads // 32]
        clock, writer = clock_of(last), who_of(last)
        unseen = (last >= 0) & (clock >= self._fenced_before(block, warp, writer))
        if not np.count_nonzero(unseen):
            return
        # The readers' own fence came too early; the writers may have fenced after they wrote.
        unseen &= clock >= self.fence_clock[block[:, None], writer]
        if not self._copies_need_fence:
            unseen &= ~self._is_copy[np.where(unseen, last & _INSTRUCTION, 0)]
        if unseen.any():
            at, column = (int(i[0]) for i in np.nonzero(unseen))
            place = self._place(int(last[at, column]))
            what = f"reads asynchronously what {place} wrote, with no fence.proxy.async between"
            raise team.fault(AsyncHazard, what, at, threads)

    def _report_asynchronous_readers(self, team, offsets, size, threads):
        if self.reading is None:
            return
        for group, cells in enumerate(self.reading):
            table, rows = self._cells(cells, offsets, size)
            busy = table[rows]
            if np.count_nonzero(busy):
                at = int(np.nonzero(busy)[0][0])
                reader = "a wgmma" if group + 1 < len(self.reading) else "a bulk store"
                what = f"overwrites shared memory that {reader} still reads: its wait is missing"
                raise team.fault(AsyncHazard, what, at, threads)
