"""What a launch did, counted exactly: the same on every machine, so kernels and commits can be compared. Not times."""

from collections import Counter

import numpy as np

SECTOR = 32  # bytes: the unit in which global memory is moved

_CLASSES = {
    "mma": {"mma", "wgmma"},
    "special": {"ex2", "lg2", "sqrt", "rsqrt", "rcp", "sin", "cos", "tanh"},
    "shuffle": {"shfl", "vote", "redux", "match", "elect", "activemask", "movmatrix"},
    "convert": {"cvt"},
    "move": {"mov", "selp", "cvta"},
    "branch": {"bra", "ret", "exit"},
    "barrier": {"bar", "barrier", "mbarrier", "fence", "membar"},
    "matrix_move": {"ldmatrix", "stmatrix"},
    "copy": {"cp"},
    "atomic": {"atom", "red"},
}
_OF_OPCODE = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}
_FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")


def class_of(inst):
    """The class under which an instruction is counted."""
    if inst.opcode == "wgmma" and not inst.has("mma_async"):
        return "barrier"
    if inst.opcode in _OF_OPCODE:
        return _OF_OPCODE[inst.opcode]
    if inst.opcode in ("ld", "st"):
        return next(
            (f"{space}_{inst.opcode}" for space in ("global", "shared", "local", "param") if inst.has(space)), "memory"
        )
    return "float" if inst.modifiers and inst.type in _FLOATS else "integer"


class Counters:
    """Counts of one launch. An instruction counts once per warp that executes it, predicated off or not.

    executed         int64 array: warps that executed each instruction
    global_read      bytes that threads asked for; global_written likewise; global_atomic likewise
    sectors_read     32-byte sectors that each warp's request touched, summed; sectors_written likewise
    requests_read    warp requests to global memory; requests_written likewise
    shared_requests  warp requests to shared memory; shared_wavefronts: the passes that their banks need;
    bank_conflicts   passes beyond the fewest that the requested bytes need
    """

    NAMES = (
        "global_read",
        "global_written",
        "global_atomic",
        "sectors_read",
        "sectors_written",
        "requests_read",
        "requests_written",
        "shared_requests",
        "shared_wavefronts",
        "bank_conflicts",
        "tensor_flops",
    )

    def __init__(self, kernel):
        self._kernel = kernel
        self.executed = np.zeros(len(kernel.instructions), np.int64)
        self.global_read = self.global_written = self.global_atomic = 0
        self.sectors_read = self.sectors_written = self.requests_read = self.requests_written = 0
        self.shared_requests = self.shared_wavefronts = self.bank_conflicts = 0

    @property
    def instructions(self):
        """Executed warp instructions by class."""
        counts = Counter()
        for inst, count in zip(self._kernel.instructions, self.executed):
            if count:
                counts[class_of(inst)] += int(count)
        return dict(counts)

    @property
    def tensor_flops(self):
        """Floating-point operations of the tensor cores, a multiply-add counting as two."""
        from .instructions.tensor_core import shape_of

        total = 0
        for inst, count in zip(self._kernel.instructions, self.executed):
            if count and class_of(inst) == "mma":
                m, n, k = shape_of(inst)
                total += 2 * m * n * k * int(count) // (4 if inst.opcode == "wgmma" else 1)
        return total

    def as_dict(self):
        """All counts as plain numbers, for a report."""
        return {"instructions": self.instructions} | {name: int(getattr(self, name)) for name in self.NAMES}

    def __repr__(self):
        return f"Counters({self.as_dict()})"

    # Recording

    def read(self, team, inst, offsets, size, threads):
        requests, sectors = _sectors(team, offsets, size, threads)
        self.global_read += len(offsets) * size
        self.requests_read += requests
        self.sectors_read += int(sectors)

    def bulk_read(self, offsets, size):
        """The copy engine reads whole pieces of `size` bytes, as one request."""
        self.global_read += len(offsets) * size
        self.requests_read += 1
        self.sectors_read += len(np.unique(offsets // SECTOR))

    def bulk_wrote(self, offsets, size, adds):
        """The same, for what it stores or adds."""
        if adds:
            self.global_atomic += len(offsets) * size
        else:
            self.global_written += len(offsets) * size
            self.requests_written += 1
            self.sectors_written += len(np.unique(offsets // SECTOR))

    def wrote(self, team, inst, offsets, size, threads):
        requests, sectors = _sectors(team, offsets, size, threads)
        self.global_written += len(offsets) * size
        self.requests_written += requests
        self.sectors_written += sectors

    def atomic(self, team, inst, offsets, size, threads):
        self.global_atomic += len(offsets) * size

    def shared(self, pattern):
        self.shared_requests += pattern.requests
        self.shared_wavefronts += pattern.wavefronts
        self.bank_conflicts += pattern.conflicts


def _sectors(team, offsets, size, threads):
    """(warp requests, 32-byte sectors that they touch)."""
    warps = _WARPS_OF[: team.size] if threads is None else threads // 32
    key = (warps << 40) + offsets // SECTOR
    steps = np.diff(key)
    if np.count_nonzero(steps < 0):
        steps = np.diff(np.sort(key))
    return 1 + np.count_nonzero(np.diff(warps)), 1 + np.count_nonzero(steps)


_WARPS_OF = np.arange(1 << 16) // 32
