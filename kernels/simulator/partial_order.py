"""Happens-before for shared memory where not all warps of a block meet: named barriers, arrivals at mbarriers.

Where all warps meet at each barrier one clock per block says what comes before (races.py). Here each warp knows of each
other the clock before which what that one did comes before what it does now itself, as in global_races.py:

- warps that meet at a barrier know what any of them knew, and all that each of them did;
- who arrives at an mbarrier, or at a barrier without waiting, tells what it knows; who sees the phase end hears it.

Readers are kept by warpgroup, of which `several warps` may have read: two that share a slot release it each by itself.
"""

import numpy as np

from .races import ATOMIC, SEVERAL, RaceDetector, clock_of, differs, in_flight, who_of

_GROUP = 240  # and the number of a warpgroup: several of its warps
_OWN = 1 << 40  # what a warp did itself always comes before


def warps_meet(kernel):
    """Whether some warps of a block meet without the others."""
    return any(
        inst.opcode in ("brx", "setmaxnreg")
        or (inst.opcode in ("bar", "barrier") and len(inst.operands) > 1)
        or (inst.opcode == "mbarrier" and inst.has("arrive") and not inst.has("expect_tx"))
        for inst in kernel.instructions
    )


class Told:
    """What arrivals tell: of each warp of the block a clock, and the copies that are known to have landed."""

    def __init__(self, clocks, copies, everywhere=None):
        """everywhere: the same of the grid's warps, for global memory, or None."""
        self.clocks, self.copies, self.everywhere = clocks, copies, everywhere

    def joined(self, other):
        if other is None:
            return self
        known = [each for each in (self.everywhere, other.everywhere) if each is not None]
        everywhere = np.maximum.reduce(known) if known else None
        return Told(np.maximum(self.clocks, other.clocks), self.copies | other.copies, everywhere)


class WarpRaces(RaceDetector):
    """Watches one batch of blocks whose warps do not all meet."""

    is_partial = True

    def __init__(self, program, blocks, shared, warps):
        super().__init__(program, blocks, shared, warps)
        self._warps, self._groups = warps, -(-warps // 4)
        # known[block, i, j]: what j did before this clock comes before what warp i does now. j: warps and stand-ins.
        self._known = np.ones((blocks, warps, 256), np.int64)
        self._known[:, range(warps), range(warps)] = _OWN
        self._fenced = np.zeros((blocks, warps, 256), np.int64)  # the same at each warp's last proxy fence
        self._readers = np.full((self._groups, len(self.written)), -1, np.int64)

    # Order

    def barrier(self, blocks):
        for block in blocks:
            self.meet(int(block), dict.fromkeys(range(self._warps), True))

    def meet(self, block, warps):
        """These warps of a block have met at a barrier: {warp: did it wait, or only arrive?}"""
        told = None
        for warp in warps:
            told = self.release(block, warp).joined(told)
        for warp in [warp for warp, waited in warps.items() if waited]:
            self.acquire(block, warp, told)

    def release(self, block, warp):
        """What the warp tells whoever hears it: all that comes before now."""
        clocks = self._known[block, warp, : self._warps].copy()
        self.clock[block] += 1
        clocks[warp] = self.clock[block]
        return Told(clocks, {ticket for ticket in self._news[block] if self._observed[ticket, warp]})

    def acquire(self, block, warp, told):
        if told is None:
            return
        known = self._known[block, warp]
        known[: self._warps] = np.maximum(known[: self._warps], told.clocks)
        known[warp] = _OWN
        known[[SEVERAL, ATOMIC]] = known[: self._warps].min()
        for group in range(self._groups):
            known[_GROUP + group] = known[4 * group : min(4 * group + 4, self._warps)].min()
        for ticket in told.copies:
            self._observed[ticket, warp] = True

    def _since(self, team, threads, whole_group=False):
        """Of each access its block and warp; whole_group: whether the other warps of its warpgroup make it too."""
        block, warp = (team.thread_block, team.thread_warp)
        if threads is not None:
            block, warp = block[threads], warp[threads]
        return block, warp, whole_group

    def _before(self, since, who):
        """Per access and granule the clock before which what `who` did comes before the access."""
        block, warp, whole_group = since
        if not whole_group:
            return self._known[block[:, None], warp[:, None], who]
        group = warp // 4 * 4
        known = [self._known[block[:, None], (group + i)[:, None], who] for i in range(4)]
        return np.minimum.reduce(known)

    def _clash(self, last, keys, since):
        other = (last >= 0) & differs(last, keys)
        return other & (in_flight(last) | (clock_of(last) >= self._before(since, who_of(last))))

    def _several(self, team):
        return _GROUP + team.warp // 4

    # Readers, by warpgroup

    def _note(self, team, offsets, size, keys, since):
        who = who_of(keys[:, 0])
        groups = np.where(who >= _GROUP, who - _GROUP, who // 4)
        block, warp, whole_group = since
        for group in np.unique(groups):
            mine = groups == group
            part = (block[mine], warp[mine], whole_group)
            self._stamp(self._readers[group], offsets[mine], size, keys[mine], part, _GROUP + int(group))

    def _check_readers(self, team, keys, since, offsets, size, threads):
        for readers in self._readers:
            read, rows = self._cells(readers, offsets, size)
            last = read[rows]
            self._report(team, self._clash(last, keys, since), last, "overwrites", "read", threads)

    # Proxy fences

    def proxy_fence(self, team):
        super().proxy_fence(team)
        warps = slice(None) if team.mask is None else team.mask.reshape(-1, 32).any(1)
        for block, warp in zip(team.block[warps].tolist(), team.warp[warps].tolist()):
            self._fenced[block, warp] = np.where(
                self._known[block, warp] == _OWN, self.clock[block], self._known[block, warp]
            )

    def _fenced_before(self, block, warp, writer):
        return self._fenced[block[:, None], warp[:, None], writer]
