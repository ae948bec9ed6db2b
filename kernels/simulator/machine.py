"""Executes a kernel: a grid of blocks, in batches, each batch as one or more teams of warps.

A team is a set of warps that run together: each instruction is one numpy operation over all their threads. A batch
starts as one team (lock step). Where blocks part ways at a branch, the team splits; where threads of one block part,
the team keeps them and runs the paths one after the other under a mask, lowest address first, until they meet again.
"""

import numpy as np

from .control_flow import live_after_branches, stretch_ends
from .counters import Counters
from .errors import BarrierDeadlock, KernelError
from .instructions import decode
from .memory import SharedMemory
from .operands import POISON
from .ptx import TYPES
from .races import RaceDetector

THREADS_PER_BATCH = 8192  # as many as fit a core's second-level cache with their live registers


class Program:
    """A kernel made ready to run: each instruction decoded once, the straight-line stretches and live registers
    known."""

    def __init__(self, kernel, shared_bytes):
        self.kernel = kernel
        self.shared_bytes = shared_bytes
        self.code = [_decode(inst, kernel) for inst in kernel.instructions]
        self.stretch_end = stretch_ends(kernel)
        self.live = live_after_branches(kernel)
        self.types = [TYPES[register.type] for register in kernel.registers]
        self.granule = min([16] + [size for inst in kernel.instructions if (size := _shared_access(inst))])


def _decode(inst, kernel):
    try:
        return decode(inst, kernel)
    except KernelError as error:
        raise error.locate(kernel, inst) from None


def _shared_access(inst):
    """Bytes per element of an instruction that touches shared memory thread by thread, else None."""
    if inst.opcode in ("ld", "st", "atom", "red") and inst.has("shared"):
        return TYPES[inst.type].itemsize
    if inst.opcode == "cp" and inst.has("shared"):
        return inst.operands[2].value
    return None


def _argument(value, dtype):
    """A Python number as the kernel gets it; negative integers in two's complement."""
    return dtype.type(value & ((1 << 8 * dtype.itemsize) - 1) if dtype.kind == "u" else value)


class Launch:
    """One kernel launch: `kernel` (name), `grid`, `num_warps`, `shared` (bytes) and, after `run`, `counters`."""

    def __init__(self, program, grid, arguments, memory, schedule=None):
        self.kernel, self.grid = program.kernel.name, tuple(grid)
        self.num_warps, self.shared = -(-program.kernel.block_size // 32), program.shared_bytes
        self.program, self.memory, self.schedule = program, memory, schedule
        self.arguments = {p.name: _argument(a, TYPES[p.type]) for p, a in zip(program.kernel.parameters, arguments)}
        self.counters = Counters(program.kernel)

    def run(self):
        x, y, z = self.grid
        order = np.arange(x * y * z)
        if self.schedule is not None:
            order = self.schedule.permutation(order)
        per_batch = max(THREADS_PER_BATCH // (32 * self.num_warps), 1)
        with np.errstate(all="ignore"):
            for start in range(0, len(order), per_batch):
                _Batch(self, order[start : start + per_batch]).run()
        return self


class _Batch:
    """Blocks that run at the same time: their shared memory, barriers and teams."""

    def __init__(self, launch, block_ids):
        self.launch, self.program = launch, launch.program
        x, y, _ = launch.grid
        self.coordinates = np.stack([block_ids % x, block_ids // x % y, block_ids // (x * y)], 1).astype(np.uint32)
        blocks, warps = len(block_ids), launch.num_warps
        self.shared = SharedMemory(blocks, launch.shared)
        self.races = RaceDetector(self.program.kernel, blocks, self.shared, self.program.granule)
        self.arrived = np.zeros((blocks, 16), np.int64)
        self.generation = np.zeros((blocks, 16), np.int64)
        self.teams = [Team(self, np.repeat(np.arange(blocks), warps), np.tile(np.arange(warps), blocks))]
        if launch.schedule is not None:
            whole = self.teams[0]
            unit = 4 if any(inst.opcode == "wgmma" for inst in self.program.kernel.instructions) else 1
            slots = np.arange(warps) // unit
            self.teams = [whole.part(np.isin(whole.warp, np.flatnonzero(slots == s))) for s in range(slots[-1] + 1)]

    def run(self):
        while self.teams:
            teams, self.teams = self.teams, []
            if self.launch.schedule is not None:
                teams = [teams[i] for i in self.launch.schedule.permutation(len(teams))]
            progress = False
            for team in teams:
                progress |= team.advance()
                if not team.finished:
                    self.teams.append(team)
            if not progress:
                self._deadlock()

    def arrive(self, team, mask, barrier, expected=None):
        """Threads reach a barrier. Returns the generation after which they may go on."""
        threads = team.thread_block if mask is None else team.thread_block[mask]
        blocks, counts = np.unique(threads, return_counts=True)
        target = self.generation[blocks, barrier] + 1
        self.arrived[blocks, barrier] += counts
        full = blocks[self.arrived[blocks, barrier] >= (expected or 32 * self.launch.num_warps)]
        if len(full):
            self.arrived[full, barrier] = 0
            self.generation[full, barrier] += 1
            self.races.barrier(full)
        return blocks, barrier, target

    def passed(self, ticket):
        blocks, barrier, target = ticket
        return bool((self.generation[blocks, barrier] >= target).all())

    def _deadlock(self):
        kernel = self.program.kernel
        waiting = {}
        for team in self.teams:
            for pc, _, (blocks, barrier, target) in team.parked:
                stuck = blocks[self.generation[blocks, barrier] < target]
                waiting.setdefault((pc - 1, barrier), (stuck, self.arrived[stuck[0], barrier]))
        (pc, barrier), (blocks, arrived) = next(iter(waiting.items()))
        places = ", ".join(f"{kernel.where(kernel.instructions[pc])}" for pc, _ in waiting)
        error = BarrierDeadlock(
            f"barrier deadlock: {arrived} of {32 * self.launch.num_warps} threads wait at barrier {barrier} ({places}) "
            "and no other thread can reach it",
            block=self.coordinates[blocks[0]],
        )
        raise error.locate(kernel, kernel.instructions[pc])


class Team:
    """Warps that run together. `registers[i]` is an array with an element per thread, or None if never written.

    block, warp: per warp, its block within the batch and its number within the block. mask: the threads that execute
    the current instruction, None for all.
    """

    def __init__(self, batch, block, warp):
        self.batch, self.block, self.warp = batch, block, warp
        self.program = batch.program
        self.warps, self.size = len(block), 32 * len(block)
        self.thread_block, self.thread_warp = np.repeat(block, 32), np.repeat(warp, 32)
        self.lane = np.tile(np.arange(32), self.warps)
        self.shared_base = self.thread_block * batch.shared.stride
        self.registers = [None] * len(self.program.types)
        self.mask = None
        self.paths = {0: None}  # instruction to go on from -> threads (None: all)
        self.parked = []  # (instruction, threads, barrier ticket)
        self.copies = []  # groups of asynchronous copies, oldest first: see instructions/async_copy.py
        self.open_copies = []
        self.pending_mma = None  # see instructions/wgmma.py
        self.local = None
        self.pc = 0

    # What instructions use

    @property
    def memory(self):
        return self.batch.launch.memory

    @property
    def shared(self):
        return self.batch.shared

    @property
    def races(self):
        return self.batch.races

    @property
    def counters(self):
        return self.batch.launch.counters

    def special(self, name):
        """%tid.x and its like: one value per thread, uint32."""
        launch = self.batch.launch
        register, _, axis = name.partition(".")
        i = "xyz".index(axis) if axis else 0
        if register == "tid":
            return (self.thread_warp * 32 + self.lane) * (i == 0)
        if register == "ctaid":
            return self.batch.coordinates[self.thread_block, i]
        if register in ("laneid", "warpid"):
            return self.lane if register == "laneid" else self.thread_warp
        constants = {"ntid": (32 * launch.num_warps, 1, 1), "nctaid": launch.grid, "clusterid": None}
        if constants.get(register) is None:
            raise self.fault(KernelError, f"special register %{name} is not simulated")
        return np.full(self.size, constants[register][i])

    def poison(self, index, dtype):
        """What a register holds that no one wrote."""
        if dtype.kind == "b":
            return np.zeros(self.size, bool)
        return np.full(self.size, POISON, np.uint8).repeat(dtype.itemsize).view(f"u{dtype.itemsize}")

    def fault(self, kind, what, at=None, threads=None, **fields):
        """An error of class `kind` at the current instruction. `at` counts within `threads`, or within the team."""
        if at is not None:
            thread = at if threads is None else int(threads[at])
            fields["block"] = self.batch.coordinates[self.thread_block[thread]]
            fields["thread"] = int(self.thread_warp[thread] * 32 + self.lane[thread])
        return kind(what, **fields)

    # Running

    @property
    def finished(self):
        return not self.paths and not self.parked

    def advance(self):
        """Runs until every path waits or has ended. False if none could move."""
        moved = False
        while self._unpark() or self.paths:
            moved = True
            self.pc = min(self.paths)
            self.mask = self.paths.pop(self.pc)
            try:
                self._run_path()
            except KernelError as error:
                kernel = self.program.kernel
                raise error.locate(kernel, kernel.instructions[self.pc]) from None
        return moved

    def _run_path(self):
        """Runs from self.pc until the path ends, waits or forks, or another path is further behind."""
        code, stretch_end, executed = self.program.code, self.program.stretch_end, self.counters.executed
        while self.pc < len(code):
            end = stretch_end[self.pc]
            if self.paths:
                behind = min(self.paths)
                if behind <= self.pc:
                    return self.go_on(self.pc, self.mask)
                end = min(end, behind)
            executed[self.pc : end] += self._active_warps()
            if self.pending_mma:
                self.pending_mma.check_registers(self, self.pc, end)
            for self.pc in range(self.pc, end):  # noqa: B020  (an error needs to know where it happened)
                following = code[self.pc](self)
            if following is STOP:
                return None
            self.pc = self.pc + 1 if following is None else following
        return None

    def _active_warps(self):
        return self.warps if self.mask is None else int(self.mask.reshape(-1, 32).any(1).sum())

    # What control instructions do to a team

    def go_on(self, pc, mask):
        """These threads continue at `pc`, together with those that do so already."""
        if pc in self.paths:
            other = self.paths[pc]
            mask = None if mask is None or other is None else mask | other
        self.paths[pc] = None if mask is None or mask.all() else mask

    def fork(self, taken, target):
        """The `taken` threads go to `target`, the other active ones to the next instruction."""
        if self.mask is None and not self.parked:
            by_block = np.bincount(self.block, taken.reshape(-1, 32).all(1), len(self.batch.coordinates))
            any_taken = np.bincount(self.block, taken.reshape(-1, 32).any(1), len(self.batch.coordinates))
            size = np.bincount(self.block, minlength=len(self.batch.coordinates))
            if ((by_block == size) | (any_taken == 0)).all():
                warps = taken[::32]
                self.batch.teams += [self.part(warps, target), self.part(~warps, self.pc + 1)]
                return STOP
        others = ~taken if self.mask is None else self.mask & ~taken
        self.go_on(target, taken)
        self.go_on(self.pc + 1, others)
        return STOP

    def park(self, ticket):
        """The active threads wait for a barrier."""
        self.parked.append((self.pc + 1, self.mask, ticket))
        return STOP

    def _unpark(self):
        ready = [entry for entry in self.parked if self.batch.passed(entry[2])]
        for entry in ready:
            self.parked.remove(entry)
            self.go_on(entry[0], entry[1])
        return bool(ready)

    def part(self, warps, pc=0):
        """A new team of the chosen warps (bool array), which goes on at `pc`. Takes along what is still of use."""
        team = Team(self.batch, self.block[warps], self.warp[warps])
        threads = np.repeat(warps, 32)
        for i in self.program.live.get(self.pc, ()):
            if self.registers[i] is not None:
                team.registers[i] = self.registers[i][threads]
        team.copies = [[copy.part(threads) for copy in group] for group in self.copies]
        team.open_copies = [copy.part(threads) for copy in self.open_copies]
        team.pending_mma = self.pending_mma and self.pending_mma.part(threads)
        team.local = None if self.local is None else self.local.part(threads)
        team.paths = {pc: None}
        return team


STOP = object()  # what a control instruction returns when the path does not simply go on
