"""Warps that run together: their registers, where they are, and what they wait for.

Each instruction is one numpy operation over all threads of a team. Where whole blocks part ways at a branch, the team
splits in two that go on independently. Where threads of one block part, the team keeps them all and runs the paths one
after the other under a mask, lowest address first, so that they meet again where the paths do.
"""

import numpy as np

from .errors import KernelError
from .operands import POISON
from .races import bit_set


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
        self.block_bits = bit_set(block)
        self.lane = np.tile(np.arange(32), self.warps)
        self.thread = (self.thread_block * batch.launch.num_warps + self.thread_warp) * 32 + self.lane  # of the batch
        self.shared_base = self.thread_block * batch.shared.stride
        self.registers = [None] * len(self.program.types)
        self.carry = 0  # the flag of each thread, see instructions/carry.py
        self.mask = None
        self.paths = {0: None}  # instruction to go on from -> threads (None: all)
        self.parked = []  # (instruction, threads, barrier ticket)
        self.copies = []  # groups of asynchronous copies, oldest first: see instructions/async_copy.py
        self.open_copies = []
        self.pending_mma = None  # see instructions/wgmma.py
        self.pc = 0

    # What instructions use

    @property
    def memory(self):
        return self.batch.launch.memory

    @property
    def shared(self):
        return self.batch.shared

    @property
    def local(self):
        return self.batch.local

    @property
    def races(self):
        return self.batch.races

    @property
    def mbarriers(self):
        return self.batch.mbarriers

    @property
    def global_races(self):
        return self.batch.launch.global_races

    @property
    def counters(self):
        return self.batch.launch.counters

    def pattern(self, addresses, size, threads):
        """What a request to shared memory looks like: see patterns.py."""
        return self.program.patterns.find(self, addresses, size, threads)

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
        constants = {"ntid": (32 * launch.num_warps, 1, 1), "nctaid": launch.grid}
        if register not in constants:
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
        """Runs until every path waits or has ended, or for a turn if one goes on and on. False if none could move."""
        moved, self.stretches, self.patient = False, 0, True
        while (self._unpark() or self.paths) and self.stretches < TURN:
            moved = True
            self._run(min(self.paths))
        if self.stretches == TURN:  # the path may be spinning for another path: give each a run before the next turn
            self.batch.count_turn(self)
            self.patient = False
            for pc in [pc for pc in self.paths if pc != self.pc]:
                if pc in self.paths:
                    self.stretches = 0
                    self._run(pc)
        return moved

    def _run(self, pc):
        self.pc, self.mask = pc, self.paths.pop(pc)
        try:
            self._run_path()
        except KernelError as error:
            kernel = self.program.kernel
            raise error.locate(kernel, kernel.instructions[self.pc]) from None

    def _run_path(self):
        """Runs from self.pc until the path ends, waits or forks, or (if patient) another path is further behind."""
        code, stretch_end, executed = self.program.code, self.program.stretch_end, self.counters.executed
        while self.pc < len(code):
            end = stretch_end[self.pc]
            self.stretches += 1
            if self.stretches == TURN:
                return self.go_on(self.pc, self.mask)
            if self.paths and self.patient:
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

    def fork(self, *ways):
        """ways: (threads, where they go on); no set is empty, together they are all the active threads."""
        if self.mask is None and not self.parked and all(self._may_leave(taken) for taken, _ in ways):
            self.batch.teams += [self.part(taken[::32], pc) for taken, pc in ways]
            return STOP
        for taken, pc in ways:
            self.go_on(pc, taken)
        return STOP

    def _may_leave(self, taken):
        """Whether these threads can be a team of their own: whole blocks, or whole warps where warps run code of their
        own.
        """
        whole, any_taken = taken.reshape(-1, 32).all(1), taken.reshape(-1, 32).any(1)
        if self.program.is_specialised:
            return bool((whole == any_taken).all())
        blocks = len(self.batch.coordinates)
        size = np.bincount(self.block, minlength=blocks)
        by_block, any_of_block = (np.bincount(self.block, chosen, blocks) for chosen in (whole, any_taken))
        return bool(((by_block == size) | (any_of_block == 0)).all())

    def park(self, ticket, pc=None):
        """The active threads wait for a barrier, and go on at `pc`, or behind this instruction."""
        pc = self.pc + 1 if pc is None else pc
        self.parked.append((pc, self.mask, ticket))
        if self.batch.scheduled and not self.paths and len(self.parked) == 1 and self.mask is None:
            self.parked.clear()
            for team in self.by_warp(pc):
                team.paths.clear()
                team.parked.append((pc, None, ticket))
                self.batch.teams.append(team)
        return STOP

    def meet_warpgroup(self):
        """Some warps of a warpgroup wait until all four have come; they go on from this instruction as one team."""
        self.counters.executed[self.pc] -= self.warps
        self.batch.meet(self)
        return STOP

    def _unpark(self):
        ready = [entry for entry in self.parked if self.batch.passed(entry[2])]
        for entry in ready:
            self.parked.remove(entry)
            self.go_on(entry[0], entry[1])
        return bool(ready)

    # Splitting and merging

    def by_warp(self, pc=0):
        """One team for each warp number, each going on at `pc`."""
        return [self.part(self.warp == number, pc) for number in np.unique(self.warp)]

    def part(self, warps, pc):
        """A new team of the chosen warps (bool array), which goes on at `pc` with the registers that live there."""
        team = Team(self.batch, self.block[warps], self.warp[warps])
        threads = np.repeat(warps, 32)
        for i in self.program.live(pc):
            if self.registers[i] is not None:
                team.registers[i] = self.registers[i][threads]
        team.copies = [[copy.part(threads) for copy in group] for group in self.copies]
        team.open_copies = [copy.part(threads) for copy in self.open_copies]
        team.pending_mma = self.pending_mma and self.pending_mma.part(threads)
        team.paths = {pc: None}
        return team

    @classmethod
    def merged(cls, teams, pc):
        """The inverse of `part`: one team of all these teams' warps, which goes on at `pc`."""
        block, warp = (np.concatenate([getattr(team, name) for team in teams]) for name in ("block", "warp"))
        order = np.lexsort((warp, block))
        team = cls(teams[0].batch, block[order], warp[order])
        threads = (order[:, None] * 32 + np.arange(32)).reshape(-1)
        for i in team.program.live(pc):
            parts = [t.registers[i] for t in teams]
            if any(part is not None for part in parts):
                unsigned = f"u{team.program.types[i].itemsize}"
                parts = [t.poison(i, team.program.types[i]) if p is None else p for t, p in zip(teams, parts)]
                parts = parts if parts[0].dtype.kind == "b" else [part.view(unsigned) for part in parts]
                team.registers[i] = np.concatenate(parts)[threads]
        # Where each team's threads are now.
        position = np.split(np.argsort(threads), np.cumsum([t.size for t in teams])[:-1])
        team.copies = [
            [copy.moved(position[k]) for k, group in enumerate(groups) for copy in group]
            for groups in zip(*(t.copies for t in teams), strict=True)
        ]
        team.open_copies = [copy.moved(position[k]) for k, t in enumerate(teams) for copy in t.open_copies]
        pending = [t.pending_mma and t.pending_mma.moved(position[k]) for k, t in enumerate(teams)]
        team.pending_mma = pending[0] and pending[0].joined(pending[1:])
        team.paths = {pc: None}
        return team


TURN = 1024  # straight-line stretches, after which the other teams may run
STOP = object()  # what a control instruction returns when the path does not simply go on
