"""Happens-before for global memory: two warps that touch one place, one of them writing it with an ordinary store.

An access leaves a stamp (clock, who, instruction) on the granules that it touches. A later one is in order if

- the same warp made both: its program orders them;
- both warps are of one block, and a barrier stands between;
- the first warp released afterwards (an atomic with release, or a fence and then an atomic) what the second acquired,
  directly or through others: vector clocks, one entry per warp of the grid.

Otherwise the two race, whatever values they saw, and whatever order this run took. Atomics do not race with each other
nor with loads; an ordinary store races with them. The order in which batches of blocks run orders nothing.

All warps of a block execute `tl.store(p, tl.load(p) + 1)`, and one of them stores. What the others read goes nowhere,
so a load whose value only goes to stores counts for the warps that execute such a store; the fault of another warp is
kept until it does.

Who: a warp's number in the grid, or, from `total` on, a block's number plus `total`: several warps of that block.
"""

import numpy as np

from .control_flow import only_stored, pointers_of
from .errors import GlobalMemoryRace, Unimplemented
from .ptx import TYPES, Vector

# A stamp is clock << 44 | who << 20 | instruction; 0: nobody.
_WHO_SHIFT, _CLOCK_SHIFT = 20, 44
INSTRUCTION = (1 << _WHO_SHIFT) - 1
_WHO = (1 << _CLOCK_SHIFT - _WHO_SHIFT) - 1
STRONG = ("volatile", "relaxed", "acquire", "release")  # such loads and stores are atomic
_CROWD = 1 << 62  # warps of several blocks read: `_Crowd` knows which and when
_MOST_LOCATIONS = 1024  # of one atomic instruction; of more, those of one tensor count as one
_MOST_CROWD_ENTRIES = 1 << 27


def global_accesses(kernel):
    """{instruction's index: parameters that may hold its pointer} of loads, copies and atomics; and of stores."""
    reads, stores = {}, {}
    pointers = pointers_of(kernel)
    for inst in kernel.instructions:
        if not inst.has("global"):
            continue
        if inst.opcode in ("st", "red"):
            where = stores if inst.opcode == "st" and not inst.has(*STRONG) else reads
            where[inst.index] = pointers(inst.operands[0])
        elif inst.has("bulk_group"):
            (reads if inst.has("reduce") else stores)[inst.index] = pointers(inst.operands[0])
        elif inst.opcode in ("ld", "atom", "cp"):
            reads[inst.index] = pointers(inst.operands[1])
    return reads, stores


def granule_of(kernel):
    """The smallest number of bytes that an instruction touches in global memory."""
    sizes = [16]
    for inst in kernel.instructions:
        if inst.has("global") and inst.opcode in ("ld", "st", "atom", "red"):
            vectors = [len(operand.items) for operand in inst.operands if isinstance(operand, Vector)]
            sizes.append(TYPES[inst.type].itemsize * max(vectors, default=1))
        elif inst.has("global") and inst.opcode == "cp" and not inst.has("bulk"):
            sizes.append(inst.operands[2].value)
    return min(sizes)


class GlobalRaces:
    """Watches the global memory of one launch."""

    def __init__(self, launch):
        program, self.dependence = launch.program, launch.dependence
        self._kernel, self._memory, self._grid = program.kernel, launch.memory, launch.grid
        self._warps, blocks = launch.num_warps, int(np.prod(launch.grid))
        self._total = blocks * self._warps
        if self._total + blocks > _WHO:
            raise Unimplemented(f"a grid of {blocks} blocks of {self._warps} warps: more than {_WHO} warps")
        self._granule = program.global_granule
        self._watched = self._watch(launch, *program.global_accesses)
        granules = -(-len(self._memory.bytes) // self._granule)
        self._written = np.zeros(granules if self._has_stores else 0, np.int64)
        self._only_stored = only_stored(self._kernel, self._watched) if self._has_stores else {}
        self._readers = _Readers(granules if self._watched else 0, self._total, self._warps)
        self._idle_readers = _Readers(granules if self._only_stored else 0, self._total, self._warps)
        self._their_stores = frozenset().union(*self._only_stored.values())
        self._stored = set()  # (warp, store) of those stores, executed
        self._kept = {}  # (warp, store) -> the fault if it is executed
        self._clock = np.ones(self._total, np.int64)
        self._barrier_clock = np.ones(blocks, np.int64)
        # What warps know of others: all that warp j did before its clock showed known[i][j] comes before what i does.
        self._known = {}
        self._released = {}  # location -> what whoever acquires it comes to know
        self._at_fence = {}  # warp -> what it knew at its last fence, which its relaxed atomics release
        self._relaxed = {}  # warp -> what its relaxed atomics heard, which its next fence acquires

    def _watch(self, launch, reads, stores):
        """The instructions that read a storage which an ordinary store may write."""
        self._has_stores = bool(stores)

        def storages(names):
            values = [launch.arguments[name] for name in names if launch.arguments[name].dtype == np.uint64]
            return {self._memory.storage_of(int(value)) for value in values} - {None}

        written = set().union(*map(storages, stores.values())) if stores else set()
        anywhere = any(not storages(names) for names in stores.values())
        return {index for index, names in reads.items() if anywhere or storages(names) & written or not storages(names)}

    # What the machine reports

    @property
    def written(self):
        """The stamp of each granule's last ordinary store, 0 where there was none."""
        return self._written

    def read_by(self, team, inst, offsets, size, threads=None):
        """Threads read: raises GlobalMemoryRace where a store that does not come before wrote."""
        self._look(team, inst, offsets, size, threads, reads=True)
        if inst.index in self._watched and self._has_stores:
            me = self._who(team, threads)
            idle = inst.index in self._only_stored
            self._check_written(team, inst, "reads", me, offsets, size, threads, idle=idle)
            self._stamp_reads(self._idle_readers if idle else self._readers, self._keys(inst, me), me, offsets, size)

    def atomic_by(self, team, inst, offsets, size, threads):
        """Threads read, write or both, atomically; by its memory order the instruction also acquires and releases."""
        self._look(team, inst, offsets, size, threads, reads=inst.opcode != "st", writes=inst.opcode != "ld")
        if not self._has_stores:
            return
        me = self._who(team, threads)
        keys = self._keys(inst, me)  # a release tells of its own access too, so the clock is read before
        self._synchronise(inst, me, offsets)
        if inst.index in self._watched:
            verb = "reads" if inst.opcode == "ld" else "updates"
            self._check_written(team, inst, verb, me, offsets, size, threads)
            self._stamp_reads(self._readers, keys, me, offsets, size)

    def written_by(self, team, inst, offsets, size, threads=None, values=None):
        """Threads write `values` (uint8, a row per access): raises GlobalMemoryRace where another access is not
        ordered. Warps of one block may write the same bytes: Triton does so where a layout holds copies.
        """
        self._look(team, inst, offsets, size, threads, writes=True)
        me = self._who(team, threads)
        if inst.index in self._their_stores:
            self._store_values_of_loads(inst, me)
        self._check_written(team, inst, "overwrites", me, offsets, size, threads, values)
        for readers in (self._readers, self._idle_readers):
            if len(readers.stamps):
                self._check_read(team, inst, readers, me, offsets, size, threads)
        keys = self._keys(inst, me)
        written, rows = self._cells(self._written, offsets, size)
        written[rows] = keys
        last = written[rows]
        clash = last != keys
        if np.count_nonzero(clash):
            clash &= ~(self._same_block(me, last) & _as_last(values, rows, clash.shape[1]))
            self._report(team, inst, clash, last, "writes", "writes too", threads, offsets)

    def barrier(self, blocks):
        """All warps of these blocks (their numbers in the grid) have met."""
        self.dependence.barrier(blocks)
        clock = self._clock.reshape(-1, self._warps)
        now = clock[blocks].max(1) + 1
        clock[blocks] = now[:, None]
        self._barrier_clock[blocks] = now
        for block in blocks if self._known else ():
            warps = range(block * self._warps, (block + 1) * self._warps)
            known = [self._known[warp] for warp in warps if warp in self._known]
            if known:
                self._known |= dict.fromkeys(warps, np.maximum.reduce(known))

    def meet(self, block, warps):
        """Some warps of a block, by their numbers in the grid, have met: {warp: did it wait, or only arrive?}"""
        self.dependence.meet(block, warps)
        if not self._has_stores:
            return
        told = np.maximum.reduce([self._release(warp) for warp in warps])
        for warp in [warp for warp, waited in warps.items() if waited]:
            _learn(self._known, warp, told)

    def tell(self, warp):
        """What a warp that arrives at an mbarrier tells those who wait for it."""
        return self._release(warp) if self._has_stores else None

    def hear(self, warp, told):
        if told is not None:
            _learn(self._known, warp, told)

    def wait(self, team):
        """The active warps have waited for the kernels before."""
        active = slice(None) if team.mask is None else team.mask.reshape(-1, 32).any(1)
        self.dependence.wait((team.batch.block_ids[team.block] * self._warps + team.warp)[active])

    def fence(self, team):
        """The active warps order what they did before with what they do after."""
        if not self._has_stores:
            return
        active = slice(None) if team.mask is None else team.mask.reshape(-1, 32).any(1)
        for warp in (team.batch.block_ids[team.block] * self._warps + team.warp)[active].tolist():
            seen = self._relaxed.pop(warp, None)
            if seen is not None:
                _learn(self._known, warp, seen)
            self._at_fence[warp] = self._release(warp)

    def _look(self, team, inst, offsets, size, threads, *, reads=False, writes=False):
        """Tells the launch's Dependence, if it has to know."""
        if self.dependence.matters:
            me = self._who(team, threads)
            self.dependence.look(team, inst, me, offsets, size, threads, reads=reads, writes=writes)

    # Order

    def _who(self, team, threads):
        who = team.batch.block_ids[team.block] * self._warps + team.warp
        return np.repeat(who, 32) if threads is None else who[threads // 32]

    def _keys(self, inst, me):
        return ((self._clock[me] << _CLOCK_SHIFT) | (me << _WHO_SHIFT) | inst.index)[:, None]

    def _cells(self, stamps, offsets, size):
        """The stamps as a table with one row per access of `size` bytes, and the rows' numbers."""
        per_access = max(size // self._granule, 1)
        if len(stamps) % per_access or size % self._granule:
            raise Unimplemented(f"a global access of {size} bytes beside accesses of {self._granule}")
        return stamps.reshape(-1, per_access), offsets // (per_access * self._granule)

    def _block_of(self, who):
        return np.where(who < self._total, who // self._warps, who - self._total)

    def _same_block(self, me, stamps):
        return (me // self._warps)[:, None] == self._block_of((stamps >> _WHO_SHIFT) & _WHO)

    def _unordered(self, me, stamps):
        """Where the accesses that left `stamps` (a row for each of `me`) do not come before."""
        if not np.count_nonzero(stamps):
            return np.zeros(stamps.shape, bool)
        who, clock = (stamps >> _WHO_SHIFT) & _WHO, stamps >> _CLOCK_SHIFT
        before = self._barrier_clock[me // self._warps][:, None]
        unordered = (stamps != 0) & (who != me[:, None]) & ~(self._same_block(me, stamps) & (clock < before))
        if self._known and np.count_nonzero(unordered):
            at, column = np.nonzero(unordered)
            unordered[at, column] = ~self._knows(me[at], who[at, column], clock[at, column])
        return unordered

    def _knows(self, me, who, clock):
        """Per entry: has warp `me` acquired what `who` did when its clock showed `clock`?"""
        result = np.zeros(len(me), bool)
        for warp in np.unique(me):
            known = self._known.get(int(warp))
            if known is not None:
                mine = me == warp
                by_block = known.reshape(-1, self._warps).min(1)
                result[mine] = np.concatenate([known, by_block])[who[mine]] > clock[mine]
        return result

    def _before(self, warp):
        """Per warp of the grid, the clock before which what it did comes before what `warp` does now."""
        known = self._known.get(warp)
        known = np.zeros(self._total, np.int64) if known is None else known.copy()
        block = warp // self._warps
        own = known[block * self._warps : (block + 1) * self._warps]
        np.maximum(own, self._barrier_clock[block], out=own)
        known[warp] = self._clock[warp] + 1
        return known

    def _release(self, warp):
        """What others come to know by acquiring it: all that comes before now. What the warp does next is not in it."""
        known = self._before(warp)
        self._clock[warp] += 1
        return known

    def _synchronise(self, inst, me, offsets):
        """Access by access: what its warp hears at the location, and what it leaves there for others."""
        acquires, releases = inst.has("acquire", "acq_rel"), inst.has("release", "acq_rel")
        if not (acquires or releases or self._at_fence or self._released):
            return
        hears, tells = inst.opcode not in ("st", "red"), inst.opcode != "ld"
        locations = offsets.tolist()
        if len(locations) > _MOST_LOCATIONS:
            locations = [self._memory.storage_of(self._memory.BASE + offset) for offset in locations]
        if inst.has("cta"):  # says nothing to other blocks
            locations = list(zip(locations, (me // self._warps).tolist()))
        for warp, location in dict.fromkeys(zip(me.tolist(), locations)):
            seen = self._released.get(location)
            if hears and seen is not None:
                _learn(self._known if acquires else self._relaxed, warp, seen)
            told = self._release(warp) if releases else self._at_fence.get(warp)
            if tells and told is not None:
                _learn(self._released, location, told)

    # Readers

    def _stamp_reads(self, readers, keys, me, offsets, size):
        read, rows = self._cells(readers.stamps, offsets, size)
        last = read[rows]
        apart = (last == _CROWD) | self._unordered(me, _alone(last))
        read[rows] = keys
        apart |= (read[rows] ^ keys) & (_WHO << _WHO_SHIFT) != 0
        if np.count_nonzero(apart):
            cells = rows[:, None] * read.shape[1] + np.arange(read.shape[1])
            shared = np.isin(cells, cells[apart])
            self._gather(readers, cells[shared], np.broadcast_to(keys, cells.shape)[shared], last[shared])

    def _gather(self, readers, cells, keys, last):
        """Readers that nothing orders share a granule: several warps of a block, or a crowd of several blocks.

        One entry per reader and granule: its stamp, and the stamp that the granule bore before.
        """
        who = (keys >> _WHO_SHIFT) & _WHO
        alone = _alone(last)
        earlier = np.where(self._unordered(who, alone[:, None])[:, 0], alone, 0)  # one that comes before counts no more
        blocks = who // self._warps
        others = np.where(earlier != 0, self._block_of((earlier >> _WHO_SHIFT) & _WHO), blocks)
        order = np.argsort(cells, kind="stable")
        begin = np.flatnonzero(np.r_[True, np.diff(cells[order]) != 0])
        first = np.minimum.reduceat(np.minimum(blocks, others)[order], begin)
        crowd = np.maximum.reduceat(np.maximum(blocks, others)[order], begin) != first
        crowd |= np.maximum.reduceat(last[order], begin) == _CROWD
        if readers is self._idle_readers:  # which of a block's warps read decides
            crowd[:] = True
        newest = np.maximum.reduceat(np.maximum(keys, earlier)[order], begin)
        several = newest & ~(_WHO << _WHO_SHIFT) | (first + self._total) << _WHO_SHIFT
        readers.stamps[cells[order][begin]] = np.where(crowd, _CROWD, several)
        members = order[np.repeat(crowd, np.diff(np.r_[begin, len(order)]))]
        readers.crowd.add(cells[members], keys[members])
        members = members[earlier[members] != 0]
        readers.crowd.add(cells[members], earlier[members])

    def _check_read(self, team, inst, readers, me, offsets, size, threads):
        read, rows = self._cells(readers.stamps, offsets, size)
        last = read[rows]
        if not np.count_nonzero(last):
            return
        alone = _alone(last)
        clash, idle = self._unordered(me, alone), readers is self._idle_readers
        self._report(team, inst, clash, alone, "overwrites", "read", threads, offsets, idle=idle)
        crowded = last == _CROWD
        if np.count_nonzero(crowded):
            at, column = np.nonzero(crowded)
            cells = rows[at] * read.shape[1] + column
            for cell, i_at, i_column in zip(cells.tolist(), at, column):
                clash = np.zeros(last.shape, bool)
                clash[i_at, i_column] = True
                for stamp in readers.crowd.unordered(cell, self._before(int(me[i_at]))):
                    stamps = np.full(last.shape, stamp)
                    self._report(team, inst, clash, stamps, "overwrites", "read", threads, offsets, idle=idle)
            readers.crowd.forget(cells)
        read[rows] = 0

    # Loads whose value only goes to stores

    def _store_values_of_loads(self, inst, me):
        for warp in np.unique(me).tolist():
            fault = self._kept.get((warp, inst.index))
            if fault is not None:
                raise fault
            self._stored.add((warp, inst.index))

    def _keep(self, fault, warp, load):
        """Keeps the fault of a reader until it stores what it read."""
        for store in self._only_stored[load]:
            if (warp, store) in self._stored:
                raise fault
            self._kept[warp, store] = fault

    # Reports

    def _check_written(self, team, inst, verb, me, offsets, size, threads, values=None, *, idle=False):
        written, rows = self._cells(self._written, offsets, size)
        last = written[rows]
        clash = self._unordered(me, last)
        if values is not None and np.count_nonzero(clash):
            present = self._memory.bytes.reshape(-1, size)[offsets // size]
            same = (values == present).reshape(len(values), clash.shape[1], -1).all(2)
            clash &= ~(self._same_block(me, last) & same)
        self._report(team, inst, clash, last, verb, "wrote", threads, offsets, idle=idle)

    def _report(self, team, inst, clash, last, verb, did, threads, offsets, *, idle=False):
        """Raises GlobalMemoryRace where anything clashes; with idle, only for readers that store what they read."""
        if not np.count_nonzero(clash):
            return
        me = self._who(team, threads)
        seen = set()
        for at, column in zip(*np.nonzero(clash)):
            stamp = int(last[at, column])
            if (stamp, me[at]) not in seen:
                seen.add((stamp, me[at]))
                fault = self._fault(team, stamp, verb, did, int(at), threads, int(offsets[at]) + column * self._granule)
                if not idle:
                    raise fault
                fault.locate(self._kernel, inst)
                if verb == "reads":
                    self._keep(fault, int(me[at]), inst.index)
                else:
                    self._keep(fault, (stamp >> _WHO_SHIFT) & _WHO, stamp & INSTRUCTION)

    def _fault(self, team, stamp, verb, did, at, threads, offset):
        who = (stamp >> _WHO_SHIFT) & _WHO
        block = int(self._block_of(np.int64(who)))
        x, y, _ = self._grid
        where = (block % x, block // x % y, block // (x * y))
        whose = f"warp {who % self._warps}" if who < self._total else "several warps"
        other = self._kernel.instructions[stamp & INSTRUCTION]
        what = (
            f"global-memory race: {verb} {self._memory.describe(offset)}, which {whose} of block {where} {did}, and "
            f"nothing orders the two: `{other.text}` at {self._kernel.where(other)}"
        )
        return team.fault(GlobalMemoryRace, what, at, threads)


class _Readers:
    """Who read what: a stamp for each granule, and the crowds."""

    def __init__(self, granules, total, warps):
        self.stamps = np.zeros(granules, np.int64)
        self.crowd = _Crowd(total, warps)


class _Crowd:
    """Granules that warps of several blocks read: for each, when each warp last did."""

    def __init__(self, total, warps):
        self._total, self._warps = total, warps  # of the grid, of a block
        self._row, self._free = {}, []  # of each granule; rows that are not in use
        self._clocks = np.zeros((0, total), np.int64)
        self._instruction = {}  # of the last reader, by row: for the report

    def add(self, cells, stamps):
        who, clock = (stamps >> _WHO_SHIFT) & _WHO, stamps >> _CLOCK_SHIFT
        rows = np.array([self._row_of(cell) for cell in cells.tolist()], np.int64)
        single = who < self._total
        np.maximum.at(self._clocks, (rows[single], who[single]), clock[single])
        for row, block, when in zip(rows[~single], who[~single] - self._total, clock[~single]):
            part = self._clocks[row, block * self._warps : (block + 1) * self._warps]
            np.maximum(part, when, out=part)
        self._instruction.update(zip(rows.tolist(), (stamps & INSTRUCTION).tolist()))

    def _row_of(self, cell):
        if cell not in self._row:
            if not self._free:
                self._grow()
            row = self._row[cell] = self._free.pop()
            self._clocks[row] = 0
        return self._row[cell]

    def _grow(self):
        old = len(self._clocks)
        more = max(old, 64)
        if (old + more) * self._total > _MOST_CROWD_ENTRIES:
            raise Unimplemented("more places that several blocks read and another may write than can be kept")
        self._clocks = np.concatenate([self._clocks, np.zeros((more, self._total), np.int64)])
        self._free += range(old, old + more)

    def unordered(self, cell, before):
        """Stamps of the readers that do not come before. before: as GlobalRaces._before gives it."""
        row = self._row[cell]
        late = np.flatnonzero((self._clocks[row] != 0) & (self._clocks[row] >= before))
        return (self._clocks[row, late] << _CLOCK_SHIFT | late << _WHO_SHIFT | self._instruction[row]).tolist()

    def forget(self, cells):
        self._free += [self._row.pop(cell) for cell in set(cells.tolist())]


def _learn(table, key, clocks):
    """The table's entry, raised to these clocks. Entries are shared, so never written in place."""
    table[key] = np.maximum(table[key], clocks) if key in table else clocks


def _alone(stamps):
    """The stamps, 0 where a crowd read."""
    return np.where(stamps == _CROWD, 0, stamps)


def _as_last(values, rows, columns):
    """Per access and granule: is what it writes what the last access to its row writes?"""
    _, inverse = np.unique(rows, return_inverse=True)
    winner = np.empty(len(rows), np.int64)
    winner[inverse] = np.arange(len(rows))
    return (values == values[winner[inverse]]).reshape(len(values), columns, -1).all(2)
