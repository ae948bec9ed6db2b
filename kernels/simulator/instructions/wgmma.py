"""wgmma: four warps multiply matrices in shared memory, asynchronously.

The product is computed when the instruction is issued, and the accumulator registers get it at once. That is right only
because nobody may look before the wait that covers it: until then `PendingMma` watches the registers and the race
detector the shared operands.
"""

from functools import cache

import numpy as np

from ..control_flow import predecessors, read, registers_in, written
from ..errors import AsyncHazard, Unimplemented
from ..operands import reader, writer
from ..ptx import Immediate, Vector
from .memory_access import items
from .registry import instruction, unknown
from .tensor_core import fragments_to_rows, multiply, read_words, shape_of, unpack

_THREADS = 128  # of a warpgroup
_CHUNK = 16  # bytes: swizzles move pieces of this size
# Bits 62 and 63 of a descriptor: the width in bytes over which rows are swizzled.
_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


class PendingMma:
    """What a team's unfinished wgmma instructions still use, by group; the newest group is open until it is
    committed."""

    def __init__(self):
        self.groups = [[]]  # of (instruction, ticket of the race detector)

    def part(self, kept):
        """The share of the threads in `kept` (bool per thread)."""
        mine = PendingMma()
        mine.groups = [
            [(inst, [ticket.part(kept) for ticket in tickets]) for inst, tickets in group] for group in self.groups
        ]
        return mine

    def moved(self, position):
        """The same, after thread i has become thread position[i]."""
        mine = PendingMma()
        mine.groups = [
            [(inst, [t.moved(position) for t in tickets]) for inst, tickets in group] for group in self.groups
        ]
        return mine

    def joined(self, others):
        """What several teams have pending, which issued the same instructions."""
        mine = PendingMma()
        mine.groups = [
            [entry for group in groups for entry in group]
            for groups in zip(self.groups, *(o.groups for o in others), strict=True)
        ]
        return mine

    def issue(self, inst, tickets):
        self.groups[-1].append((inst, tickets))

    def commit(self):
        self.groups.append([])

    def wait(self, team, pending):
        """All but the newest `pending` committed groups are done."""
        done = self.groups[: max(len(self.groups) - 1 - pending, 0)]
        self.groups = self.groups[len(done) :]
        for group in done:
            for inst, tickets in group:
                for ticket in tickets:
                    team.races.end_async_read(team, inst, ticket)
        if self.groups == [[]]:
            team.pending_mma = None

    def check_registers(self, team, start, end):
        """Raises AsyncHazard if an instruction of the stretch touches registers that are in flight."""
        in_flight = [inst for group in self.groups for inst, _ in group]
        accumulators = set().union(*(written(inst) for inst in in_flight)) if in_flight else set()
        operands = set().union(*map(used_registers, in_flight)) if in_flight else set()
        for inst in team.program.kernel.instructions[start:end]:
            reads, writes = read(inst), written(inst)
            if inst.opcode == "wgmma":
                # Accumulating on is in order; reading an accumulator as A is not.
                reads = used_registers(inst) - writes if inst.has("mma_async") else set()
                writes = set()
            for verb, touched in (("reads", reads & accumulators), ("overwrites", writes & (accumulators | operands))):
                if touched:
                    team.pc = inst.index
                    register = team.program.kernel.registers[min(touched)].name
                    owner = next(i for i in in_flight if min(touched) in used_registers(i))
                    where = team.program.kernel.where(owner)
                    raise team.fault(
                        AsyncHazard, f"{verb} {register} while the wgmma at {where} uses it: its wait is missing"
                    )


@cache
def used_registers(inst):
    """The registers that a wgmma works on after it was issued: the accumulator, and A where it is in registers."""
    if not inst.has("mma_async"):
        return set()
    accumulator, a = inst.operands[:2]
    return registers_in(accumulator) | (registers_in(a) if isinstance(a, Vector) else set())


@instruction("wgmma")
def wgmma(inst, kernel):
    if inst.has("mma_async"):
        return _multiply(inst, kernel)
    if inst.has("fence"):
        return lambda team: None  # mma_async looks for it when it is decoded
    if inst.has("commit_group"):

        def commit(team):
            if team.pending_mma:
                team.pending_mma.commit()

        return commit
    if inst.has("wait_group") and isinstance(inst.operands[0], Immediate):
        pending = inst.operands[0].value

        def wait(team):
            if team.pending_mma:
                team.pending_mma.wait(team, pending)

        return wait
    raise unknown(inst)


def _fence_before(inst, kernel):
    """Whether on every path a wgmma.fence stands between `inst` and the last other wgmma, if ordinary instructions
    touch its accumulator in between.

    The manual asks for the fence after those instructions, and after those that produce A in registers. LLVM moves the
    constants, copies and arithmetic that make an accumulator or A past Triton's fence, and ptxas, which sees the
    registers, orders them all the same: so they may stand on either side of it.
    """
    accumulator = registers_in(inst.operands[0])
    before = predecessors(kernel)
    seen, paths = set(), [(i, False) for i in before[inst.index]]
    if not paths:
        return False
    while paths:
        index, touched = paths.pop()
        if (index, touched) in seen:
            continue
        seen.add((index, touched))
        other = kernel.instructions[index]
        if other.opcode == "wgmma":
            if other.has("fence"):
                continue
            if touched:
                return False
        elif (read(other) | written(other)) & accumulator:
            touched = True
        if not before[index]:  # the kernel's beginning
            return False
        paths += [(i, touched) for i in before[index]]
    return True


def _multiply(inst, kernel):
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.a.b d, a, b, scale-d, 1, 1 [, a is MN-major] [, b is MN-major]"""
    _, n, k = shape_of(inst)
    d_type, a_type, b_type = inst.modifiers[-3:]
    elements = {"f16": 2, "bf16": 2, "tf32": 1}.get(a_type)
    d, a, b, scale, *immediates = inst.operands
    if d_type != "f32" or elements is None or a_type != b_type or k != 8 * elements:
        raise unknown(inst)
    if any(not isinstance(i, Immediate) for i in immediates) or [i.value for i in immediates[:2]] != [1, 1]:
        raise unknown(inst)
    transposes = [bool(i.value) for i in immediates[2:]]
    a_in_registers = isinstance(a, Vector)
    transpose_b = transposes[-1] if transposes else False
    transpose_a = transposes[0] if len(transposes) == 2 else False
    if elements == 1 and (transpose_a or transpose_b):
        raise unknown(inst)
    read_d, write_d = [reader(r, "f32", kernel) for r in d.items], [writer(r, "f32") for r in d.items]
    read_a = [reader(r, "b32" if a_in_registers else "u64", kernel) for r in items(a)]
    read_b, read_scale = reader(b, "u64", kernel), reader(scale, "pred", kernel)
    fenced = _fence_before(inst, kernel)

    def execute(team):
        if team.mask is not None:
            raise Unimplemented("wgmma executed by part of a warpgroup")
        if not _has_whole_warpgroups(team):
            return team.meet_warpgroup()
        if not fenced:
            raise team.fault(AsyncHazard, "the accumulator of this wgmma was touched since the last wgmma.fence")
        tickets = []
        groups = team.size // _THREADS
        if a_in_registers:
            words = unpack(read_words(team, read_a), a_type).reshape(team.warps, 32, 4, elements)
            left = fragments_to_rows(words, 2, 2).reshape(groups, 64, k)
        else:
            left = _load_matrix(team, inst, read_a[0](team)[::_THREADS], 64, transpose_a, a_type, tickets)
        right = _load_matrix(team, inst, read_b(team)[::_THREADS], n, transpose_b, b_type, tickets)
        product = multiply(left, right)
        # rows 16w + 8h + g, columns 8j + 2t + e -> one array per register 4j + 2h + e
        parts = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, team.size)
        accumulate = read_scale(team)
        keep_all = accumulate.all()
        for q, part in enumerate(parts):
            if keep_all:
                part = part + read_d[q](team)
            elif accumulate.any():
                part = part + np.where(accumulate, read_d[q](team), np.float32(0))
            write_d[q](team, part, None)
        if team.pending_mma is None:
            team.pending_mma = PendingMma()
        team.pending_mma.issue(inst, tickets)
        return None

    return execute


def _has_whole_warpgroups(team):
    return team.warps % 4 == 0 and bool((team.warp.reshape(-1, 4) % 4 == np.arange(4)).all())


def _load_matrix(team, inst, descriptors, rows, transposed, kind, tickets):
    """(warpgroups, rows, k) float32: the matrices that the warpgroups' descriptors point to."""
    chunks = np.empty((len(descriptors), 2 * rows), np.int64)
    for descriptor in np.unique(descriptors):
        chunks[descriptors == descriptor] = chunk_addresses(int(descriptor), rows, transposed)
    leaders = np.arange(0, team.size, _THREADS)
    threads = np.repeat(leaders, 2 * rows)
    offsets = team.shared.locate(team, chunks.reshape(-1), _CHUNK, threads)
    tickets.append(team.races.begin_async_read(team, inst, offsets, _CHUNK, threads))
    words = team.shared.load(offsets, 4, 4)
    if not transposed:  # two chunks hold a row
        return unpack(words, kind).reshape(len(descriptors), rows, -1)
    # a chunk holds eight rows of one column
    columns = unpack(words, kind).reshape(len(descriptors), rows // 8, 16, 8)
    return np.ascontiguousarray(columns.swapaxes(2, 3)).reshape(len(descriptors), rows, 16)


_CACHE = {}


def chunk_addresses(descriptor, rows, transposed):
    """Addresses of the 16-byte chunks of a rows x 32-byte operand, in the order in which `_load_matrix` wants them.

    PTX ISA, "Matrix descriptor" and "Strides": the matrix consists of 8-row atoms of the swizzle's width. K-major atoms
    follow each other down the rows at the stride byte offset; MN-major atoms down the columns at the stride byte offset
    and down the rows at the leading byte offset. Within an atom the chunk's number is XORed with the row's.
    """
    key = (descriptor, rows, transposed)
    if key in _CACHE:
        return _CACHE[key]
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = _SWIZZLE_BYTES[descriptor >> 62]
    if (descriptor >> 49) & 7:
        raise Unimplemented("wgmma descriptor with a base offset")
    if not transposed:
        row, chunk = np.arange(rows)[:, None], np.arange(2)
        across = chunk * (leading if width == 16 else _CHUNK)
        address = start + row // 8 * stride + row % 8 * width + across
    else:
        if width == 16:
            raise Unimplemented("wgmma descriptor of an MN-major operand without swizzle")
        row, column = np.arange(0, rows, 8)[:, None], np.arange(16)
        per_atom = width // 2  # elements
        address = start + row // per_atom * leading + column // 8 * stride + column % 8 * width + row % per_atom * 2
    if width > 16:
        address = address ^ ((address >> 3) & (width - _CHUNK))
    return _CACHE.setdefault(key, address.reshape(-1))
