"""Happens-before for shared memory: who touched each granule last, and whether a barrier stands between.

Each block has a clock that its barriers and proxy fences advance. An access leaves a stamp (clock, warp,
instruction) on the granules that it touches; a later access by another warp conflicts if the stamp is not older than
the block's last barrier and one of the two writes. Accesses of one warp are ordered by its program.
"""

from dataclasses import dataclass

import numpy as np

from .errors import AsyncHazard, SharedMemoryRace

# A stamp is clock << 28 | warp << 20 | instruction. Two warp numbers are not warps.
_INSTRUCTION_BITS, _WARP_BITS = 20, 8
_INSTRUCTION = (1 << _INSTRUCTION_BITS) - 1
_WHO = ((1 << _WARP_BITS) - 1) << _INSTRUCTION_BITS | 1 << 62  # an unfinished copy is like another warp's
SEVERAL = 255  # more than one warp read
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


def _clash(last, keys, since):
    """Where the stamps `last` are no older than the last barrier and another warp's."""
    return (last >= since) & (((last ^ keys) & _WHO) != 0)


def _winning(values, rows):
    """What the last access to each row writes, per access."""
    _, inverse = np.unique(rows, return_inverse=True)
    winner = np.empty(len(rows), np.int64)
    winner[inverse] = np.arange(len(rows))
    return values[winner[inverse]]


class RaceDetector:
    """Watches one batch of blocks. Offsets are bytes into the batch's shared memory."""

    def __init__(self, kernel, blocks, shared, granule):
        self._kernel = kernel
        self._shared = shared
        self._granule = granule
        self._stride = shared.stride
        granules = blocks * shared.stride // granule
        self.written = np.full(granules, -1, np.int64)
        self.read = np.full(granules, -1, np.int64)
        self.clock = np.ones(blocks, np.int64)
        self.barrier_clock = np.ones(blocks, np.int64)  # the clock at each block's last barrier
        # Proxy fences, per block and warp: the clock at the last one, and at the last barrier before it.
        self.fence_clock = np.zeros((blocks, 256), np.int64)
        self.fence_barrier = np.zeros((blocks, 256), np.int64)
        self.reading = None  # per warpgroup and granule: number of the last unfinished asynchronous read, or 0
        self._reads_begun = 0

    def barrier(self, blocks):
        """All warps of these blocks have met."""
        self.clock[blocks] += 1
        self.barrier_clock[blocks] = self.clock[blocks]

    def _keys(self, team, instruction, blocks, warps):
        return (self.clock[blocks] << 28) | (warps.astype(np.int64) << 20) | instruction.index

    def _cells(self, stamps, offsets, size):
        """The stamps as a table with one row per access of `size` bytes, and the rows' numbers."""
        per_access = max(size // self._granule, 1)
        return stamps.reshape(-1, per_access), offsets // (per_access * self._granule)

    def touch(self, team, instruction, offsets, size, *, write, threads=None, atomic=False, values=None):
        """Records the accesses of these threads and raises SharedMemoryRace where one conflicts.

        values: what a write writes, an array with one row per access. Warps may write one value to one place: Triton
        does so where a layout holds copies.
        """
        blocks = team.thread_block if threads is None else team.thread_block[threads]
        warps = team.thread_warp if threads is None else team.thread_warp[threads]
        if atomic:
            warps = np.full(len(offsets), ATOMIC)
        keys = self._keys(team, instruction, blocks, warps)[:, None]
        since = (self.barrier_clock[blocks] << 28)[:, None]
        written, rows = self._cells(self.written, offsets, size)
        read, _ = self._cells(self.read, offsets, size)

        last = written[rows]
        clash = _clash(last, keys, since)
        if values is not None and clash.any():
            present = self._shared.bytes.reshape(-1, size)[offsets // size]
            clash &= ~self._same(values, present) | (last & _IN_FLIGHT != 0)
        self._report(team, instruction, clash, last, write, "wrote", threads)

        last = read[rows]
        if write:
            self._report(team, instruction, _clash(last, keys, since), last, write, "read", threads)
            self._report_asynchronous_readers(team, offsets, size, threads)
            written[rows] = keys
            last = written[rows]
            clash = last != keys
            if values is not None and clash.any():
                clash &= ~self._same(values, _winning(values, rows))
            self._report(team, instruction, clash, last, write, "writes too", threads)
        else:
            crowd = keys | (SEVERAL << _INSTRUCTION_BITS)
            read[rows] = np.where(_clash(last, keys, since), crowd, keys)
            beaten = read[rows] >> _INSTRUCTION_BITS != keys >> _INSTRUCTION_BITS
            if beaten.any():
                at = np.nonzero(beaten)
                read[rows[at[0]], at[1]] = np.broadcast_to(crowd, beaten.shape)[at]

    def _same(self, ours, theirs):
        """Per access and granule, whether the bytes are equal."""
        return (ours == theirs).reshape(len(ours), max(ours.shape[1] // self._granule, 1), -1).all(2)

    def _report(self, team, instruction, clash, last, write, did, threads):
        """Raises for the first access in `clash` (per access and granule); `last` holds the other side's stamps."""
        if not clash.any():
            return
        at, column = (int(i[0]) for i in np.nonzero(clash))
        stamp = int(last[at, column])
        other = self._kernel.instructions[stamp & _INSTRUCTION]
        place = f"`{other.text}` at {self._kernel.where(other)}"
        verb = "overwrites" if write else "reads"
        if stamp & _IN_FLIGHT:
            raise team.fault(
                AsyncHazard, f"{verb} shared memory that {place} still fills: its wait is missing", at, threads
            )
        warp = (stamp >> _INSTRUCTION_BITS) & ((1 << _WARP_BITS) - 1)
        who = {SEVERAL: "several warps", ATOMIC: "an atomic"}.get(warp, f"warp {warp}")
        what = f"shared-memory race: {verb} what {who} {did} since the last barrier, {place}"
        raise team.fault(SharedMemoryRace, what, at, threads)

    def begin_copy(self, team, instruction, offsets, size, threads):
        """An asynchronous copy into these places starts: until `end_copy` no one may touch them."""
        self.touch(team, instruction, offsets, size, write=True, threads=threads)
        written, rows = self._cells(self.written, offsets, size)
        written[rows] |= _IN_FLIGHT

    def end_copy(self, team, instruction, offsets, size, threads):
        """The threads have waited for their copies: from here on these are writes of theirs."""
        keys = self._keys(team, instruction, team.thread_block[threads], team.thread_warp[threads])
        written, rows = self._cells(self.written, offsets, size)
        written[rows] = keys[:, None]

    # Asynchronous readers (wgmma) see ordinary writes only through a proxy fence, and read until they are waited for.

    def proxy_fence(self, team):
        """The active warps make the writes that they know of visible to asynchronous readers."""
        blocks = np.unique(team.block)
        self.clock[blocks] += 1
        warps = slice(None) if team.mask is None else team.mask.reshape(-1, 32).any(1)
        block, warp = team.block[warps], team.warp[warps]
        self.fence_clock[block, warp] = self.clock[block]
        self.fence_barrier[block, warp] = self.barrier_clock[block]

    def begin_async_read(self, team, instruction, offsets, size, threads):
        """The warpgroups of these threads start to read. Returns what `end_async_read` takes."""
        blocks, warps = team.thread_block[threads], team.thread_warp[threads]
        written, rows = self._cells(self.written, offsets, size)
        last = written[rows]
        everyone = np.full(len(warps), SEVERAL)
        keys = self._keys(team, instruction, blocks, everyone)[:, None]
        clash = _clash(last, keys, (self.barrier_clock[blocks] << 28)[:, None])
        self._report(team, instruction, clash, last, False, "wrote", threads)
        self._report_unfenced(team, last, blocks, warps, threads)
        if self.reading is None:
            self.reading = np.zeros((team.batch.launch.num_warps // 4, len(self.written)), np.int32)
        self._reads_begun += 1
        group = warps // 4
        for g in np.unique(group):
            cells, _ = self._cells(self.reading[g], offsets, size)
            cells[rows[group == g]] = self._reads_begun
        return AsyncRead(self._reads_begun, size, threads, group, offsets)

    def end_async_read(self, team, instruction, ticket):
        """The readers have been waited for; what they did counts as a read by all their warps now."""
        for g in np.unique(ticket.group):
            cells, rows = self._cells(self.reading[g], ticket.offsets[ticket.group == g], ticket.size)
            cells[rows] = np.where(cells[rows] == ticket.number, 0, cells[rows])
        blocks = team.thread_block[ticket.threads]
        read, rows = self._cells(self.read, ticket.offsets, ticket.size)
        read[rows] = self._keys(team, instruction, blocks, np.full(len(blocks), SEVERAL))[:, None]

    def _report_unfenced(self, team, last, blocks, warps, threads):
        clock = last >> 28
        writer = (last >> _INSTRUCTION_BITS) & ((1 << _WARP_BITS) - 1)
        by_writer = clock < self.fence_clock[blocks[:, None], writer]
        by_reader = clock < self.fence_barrier[blocks, warps][:, None]
        bare = (last >= 0) & ~by_writer & ~by_reader
        if bare.any():
            at, column = (int(i[0]) for i in np.nonzero(bare))
            other = self._kernel.instructions[int(last[at, column]) & _INSTRUCTION]
            place = f"`{other.text}` at {self._kernel.where(other)}"
            what = f"reads asynchronously what {place} wrote, with no fence.proxy.async between"
            raise team.fault(AsyncHazard, what, at, threads)

    def _report_asynchronous_readers(self, team, offsets, size, threads):
        if self.reading is None:
            return
        for cells in self.reading:
            table, rows = self._cells(cells, offsets, size)
            busy = table[rows] != 0
            if busy.any():
                at = int(np.nonzero(busy)[0][0])
                raise team.fault(
                    AsyncHazard, "overwrites shared memory that a wgmma still reads: its wait is missing", at, threads
                )
