"""Executes a kernel: a grid of blocks, in batches, each batch as one or more teams of warps.

In lock step a batch starts as one team, and all its blocks run side by side. With a schedule each warp of a block is a
team of its own (together with the same warp of the batch's other blocks), and the teams run in random order from one
barrier to the next.
"""

import numpy as np

from .bulk_stores import BulkStores
from .control_flow import bits, indices, live_registers, per_thread, reachable, read, stretch_ends, words, written
from .counters import Counters
from .dependent import Stream
from .errors import AsyncHazard, BarrierDeadlock, EndlessWait, KernelError
from .global_races import GlobalRaces, global_accesses, granule_of
from .instructions import decode
from .mbarriers import Mbarriers, Wait
from .memory import LocalMemory, SharedMemory
from .partial_order import WarpRaces, warps_meet
from .patterns import Patterns
from .ptx import TYPES, Vector
from .races import RaceDetector
from .register_pool import RegisterPool, RegisterWait
from .team import Team

MOST_TURNS = 1000  # of a batch's teams, see team.TURN: a million loop iterations
GROUPS = 8  # into which a schedule divides the blocks of a cooperative grid
THREADS_PER_BATCH = 8192  # as many as fit a core's second-level cache with their live registers


class Program:
    """A kernel made ready to run: instructions decoded, straight-line stretches and live registers known."""

    def __init__(self, kernel, shared_bytes, copies_need_fence=True):
        """copies_need_fence: may wgmma read what cp.async wrote only after fence.proxy.async, as the manual says?"""
        self.kernel, self.copies_need_fence = kernel, copies_need_fence
        self.shared_bytes = shared_bytes
        self.patterns = Patterns()
        self.code = [_decode(inst, kernel) for inst in kernel.instructions]
        self.stretch_end = stretch_ends(kernel)
        self._live, self._live_at, self._most = live_registers(kernel), {}, {}
        self.is_specialised = any(inst.opcode in ("brx", "setmaxnreg") for inst in kernel.instructions)
        self.warps_meet = warps_meet(kernel)
        self.types = [TYPES[register.type] for register in kernel.registers]
        self.global_accesses, self.global_granule = global_accesses(kernel), granule_of(kernel)
        self.granule = min([16] + [size for inst in kernel.instructions if (size := _shared_access(inst))])

    def live(self, pc):
        """The registers that may be read from `pc` on."""
        if pc not in self._live_at:
            self._live_at[pc] = indices(self._live[pc])
        return self._live_at[pc]

    def most_registers(self, index):
        """(registers, where): the most that hold values of the code behind `index`, up to the next setmaxnreg.

        Not counted are what only other warps' code reads, though it may stand in a register all the while; what is one
        value for the whole warp: ptxas has registers of their own for it, or reads it where the launch put it; and what
        one step makes of another register: ptxas does it again.
        """
        if index not in self._most:
            code, places = self.kernel.instructions, reachable(self.kernel, index, "setmaxnreg")
            used = bits(
                frozenset().union(*(read(code[i]) | written(code[i]) for i in places)) & per_thread(self.kernel)
            )
            counts = [words(self.kernel, self._live[i] & used) for i in places]
            most = int(np.argmax(counts))
            self._most[index] = counts[most], self.kernel.where(code[places[most]])
        return self._most[index]


def _decode(inst, kernel):
    try:
        return decode(inst, kernel)
    except KernelError as error:
        raise error.locate(kernel, inst) from None


def _shared_access(inst):
    """How many bytes of shared memory a thread touches at a time, or None."""
    if inst.opcode in ("ld", "st", "atom", "red") and inst.has("shared"):
        vectors = [len(operand.items) for operand in inst.operands if isinstance(operand, Vector)]
        return TYPES[inst.type].itemsize * max(vectors, default=1)
    if inst.opcode == "mbarrier":
        return 8
    if inst.opcode == "cp" and inst.has("shared") and not inst.has("bulk"):
        return inst.operands[2].value
    return None


def _argument(value, dtype):
    """A Python number as the kernel gets it; negative integers in two's complement."""
    return dtype.type(value & ((1 << 8 * dtype.itemsize) - 1) if dtype.kind == "u" else value)


class Launch:
    """One kernel launch: `kernel` (name), `grid`, `num_warps`, `shared` (bytes) and, after `run`, `counters`."""

    def __init__(
        self, program, grid, arguments, memory, schedule=None, *, stream=None, dependent=False, together=False
    ):
        """stream: of the launches before. dependent: does not wait for them. together: all blocks run at a time."""
        self.kernel, self.grid = program.kernel.name, tuple(grid)
        self.num_warps, self.shared = -(-program.kernel.block_size // 32), program.shared_bytes
        self.program, self.memory, self.schedule = program, memory, schedule
        pairs = list(zip(program.kernel.parameters, arguments))
        self.arguments = {p.name: _argument(a, TYPES[p.type]) for p, a in pairs if p.type != "map"}
        self.maps = [a for p, a in pairs if p.type == "map"]
        self.counters = Counters(program.kernel)
        self.stream, self.together = stream or Stream(), together
        self.dependence = self.stream.begin(self, dependent)

    def run(self):
        self.global_races = GlobalRaces(self)
        x, y, z = self.grid
        order = np.arange(x * y * z)
        if self.schedule is not None:
            order = self.schedule.permutation(order)
        per_batch = max(THREADS_PER_BATCH // (32 * self.num_warps), 1)
        if self.together:
            per_batch = max(len(order), 1)
        with np.errstate(all="ignore"):
            for start in range(0, len(order), per_batch):
                _Batch(self, order[start : start + per_batch]).run()
        self.stream.end(self.dependence)
        self.global_races = self.dependence = None
        return self


class _Batch:
    """Blocks that run at the same time: their shared memory, barriers and teams."""

    def __init__(self, launch, block_ids):
        self.launch, self.program, self.block_ids = launch, launch.program, block_ids
        x, y, _ = launch.grid
        self.coordinates = np.stack([block_ids % x, block_ids // x % y, block_ids // (x * y)], 1).astype(np.uint32)
        blocks, warps = len(block_ids), launch.num_warps
        self.shared = SharedMemory(blocks, launch.shared)
        self.local = LocalMemory(32 * blocks * warps, self.program.kernel.local_bytes)
        self.races = (WarpRaces if self.program.warps_meet else RaceDetector)(self.program, blocks, self.shared, warps)
        self.registers = RegisterPool(self.program, blocks, warps)
        self.mbarriers, self.stores = Mbarriers(self), BulkStores(self)
        self.arrived = np.zeros((blocks, 16), np.int64)
        self.generation = np.zeros((blocks, 16), np.int64)
        self._at_barrier = {}  # (block, barrier) -> (threads that it takes, {warp that has come: does it wait?})
        self.teams = [Team(self, np.repeat(np.arange(blocks), warps), np.tile(np.arange(warps), blocks))]
        self._group = None  # of each block, where a schedule lets some of them fall behind
        if launch.schedule is not None:
            self.teams = self.teams[0].by_warp()
            if launch.together:
                self._group = launch.schedule.permutation(np.arange(blocks) % GROUPS)
                groups = [self._group == i for i in range(min(blocks, GROUPS))]
                self.teams = [team.part(group[team.block], 0) for team in self.teams for group in groups]
        self._turns = 0
        self._meetings = {}  # (instruction, warpgroup, blocks) -> teams that wait there for the rest of the warpgroup

    def run(self):
        progress = False
        while self.teams:
            teams, self.teams = self.teams, []
            if self.launch.schedule is not None:
                teams = [teams[i] for i in self.launch.schedule.permutation(len(teams))]
                self.mbarriers.land_some(self.launch.schedule)
                self.stores.land_some(self.launch.schedule)
            teams, late = self._divide(teams) if progress else (teams, [])
            self.teams, progress = late, bool(late)
            for team in teams:
                progress |= team.advance()
                if not team.finished:
                    self.teams.append(team)
            if not progress and not self.mbarriers.land_wanted():
                self._deadlock()
        if self._meetings:
            raise self._stuck(next(iter(self._meetings))[0], "warps wait at a wgmma for the rest of their warpgroup")
        for copy in self.mbarriers.in_flight:
            error = AsyncHazard("the block ended while this copy was in flight", block=self.coordinates[copy.block])
            raise error.locate(self.program.kernel, copy.inst)
        self.stores.finish()

    def _divide(self, teams):
        """Those that run in this round, and those that do not: of blocks that meet, one may come early or late."""
        if self._group is None:
            return teams, []
        is_late = self.launch.schedule.random(GROUPS) < 0.5
        late = [team for team in teams if is_late[self._group[team.block[0]]]]
        return [team for team in teams if team not in late], late

    def count_turn(self, team):
        """A team has used up a turn; a batch that takes too many is waiting for something that will not happen."""
        self._turns += 1
        if self._turns > MOST_TURNS:
            what = "the kernel goes on and on, as where an arrival is missing"
            if not self.launch.together:
                what += "; blocks that wait for blocks of a later batch would never end without a cooperative launch"
            raise team.fault(EndlessWait, what, 0)

    @property
    def scheduled(self):
        return self.launch.schedule is not None

    def arrive(self, team, mask, barrier, threads=None, waits=True):
        """Threads reach a barrier of so many threads, or of all. Returns a ticket for `passed`."""
        count = np.full(team.warps, 32) if mask is None else np.count_nonzero(mask.reshape(-1, 32), axis=1)
        everyone = 32 * self.launch.num_warps
        takes = threads or everyone
        if self.program.warps_meet:
            self._note(team, count, barrier, takes, waits)
        self.arrived[:, barrier] += np.bincount(team.block, count, len(self.arrived)).astype(np.int64)
        blocks = np.unique(team.block[count > 0])
        target = self.generation[blocks, barrier] + 1
        full = blocks[self.arrived[blocks, barrier] >= takes]
        if len(full):
            self.arrived[full, barrier] = 0
            self.generation[full, barrier] += 1
            if self.program.warps_meet:
                for block in full.tolist():
                    self._met(block, self._at_barrier.pop((block, barrier))[1])
            else:
                self.races.barrier(full)
                self.launch.global_races.barrier(self.block_ids[full])
        return blocks, barrier, target

    def _note(self, team, count, barrier, takes, waits):
        """Which warps have come to a barrier; raises BarrierDeadlock where they do not fit it."""
        for block, warp, some in zip(team.block.tolist(), team.warp.tolist(), count):
            if not some:
                continue
            expected, warps = self._at_barrier.setdefault((block, barrier), (takes, {}))
            if expected != takes:
                what = f"barrier {barrier} is taken for one of {takes} threads here, of {expected} by who came before"
                raise team.fault(BarrierDeadlock, what, 32 * int(np.argmax(count > 0)))
            if warp in warps and not warps[warp]:
                what = f"warp {warp} comes to barrier {barrier} again, before the others have come"
                raise team.fault(BarrierDeadlock, what, 32 * int(np.argmax(team.warp == warp)))
            warps[warp] = waits
            if 32 * len(warps) > takes:
                what = f"more than the {takes} threads of barrier {barrier} come to it"
                raise team.fault(BarrierDeadlock, what, 32 * int(np.argmax(team.warp == warp)))

    def _met(self, block, warps):
        """These warps have met at a barrier; {warp: did it wait?}"""
        self.races.meet(block, warps)
        first = int(self.block_ids[block]) * self.launch.num_warps
        self.launch.global_races.meet(int(self.block_ids[block]), {first + w: waited for w, waited in warps.items()})

    def tell(self, team, thread, told):
        """A thread arrives where others will wait: what came before, joined with `told`."""
        if not self.races.is_partial:
            return None
        block, warp = int(team.thread_block[thread]), int(team.thread_warp[thread])
        here = self.races.release(block, warp)
        here.everywhere = self.launch.global_races.tell(int(self.block_ids[block]) * self.launch.num_warps + warp)
        return here.joined(told)

    def hear(self, block, warp, told):
        """A warp has seen end what `told` was told by."""
        if told is not None:
            self.races.acquire(block, warp, told)
            self.launch.global_races.hear(int(self.block_ids[block]) * self.launch.num_warps + warp, told.everywhere)

    def meet(self, team):
        """A team that holds only some warps of its warpgroups comes to an instruction that needs all four of each."""
        key = (team.pc, int(team.warp[0]) // 4, team.block_bits)
        here = self._meetings.setdefault(key, [])
        here.append(team)
        if sum(t.warps for t in here) == 4 * len(np.unique(team.block)):
            self.teams.append(Team.merged(self._meetings.pop(key), team.pc))

    def passed(self, ticket):
        if isinstance(ticket, (Wait, RegisterWait)):
            return ticket.passed()
        blocks, barrier, target = ticket
        return bool((self.generation[blocks, barrier] >= target).all())

    def _deadlock(self):
        waiting, kernel = {}, self.program.kernel
        for team in self.teams:
            for pc, _, ticket in team.parked:
                if isinstance(ticket, Wait):
                    mbarrier, parity = ticket.missing()
                    warps = sorted(set(team.warp[team.block == mbarrier.block].tolist()))
                    who = f"warps {', '.join(map(str, warps))} wait for parity {parity} of {mbarrier.describe()}"
                    waiting.setdefault((pc, who), mbarrier.block)
                    continue
                if isinstance(ticket, RegisterWait):
                    block, who = ticket.describe()
                    waiting.setdefault((pc, who), block)
                    continue
                blocks, barrier, target = ticket
                stuck = blocks[self.generation[blocks, barrier] < target][0]
                takes, _ = self._at_barrier.get((int(stuck), barrier), (32 * self.launch.num_warps, {}))
                threads = f"{self.arrived[stuck, barrier]} of {takes} threads"
                waiting.setdefault((pc - 1, f"{threads} wait at barrier {barrier}"), stuck)
        (pc, _), block = next(iter(waiting.items()))
        places = "; ".join(f"{who} ({kernel.where(kernel.instructions[at])})" for at, who in waiting)
        raise self._stuck(pc, f"barrier deadlock: {places} and nothing else can happen", self.coordinates[block])

    def _stuck(self, pc, what, block=None):
        kernel = self.program.kernel
        return BarrierDeadlock(what, block=block).locate(kernel, kernel.instructions[pc])
