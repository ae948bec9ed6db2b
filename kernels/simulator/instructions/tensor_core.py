"""mma.sync, ldmatrix, stmatrix, movmatrix: a warp multiplies and moves 8x8 tiles that its 32 threads hold together.

In a fragment, lane 4g + t holds of row g the elements t*e ... t*e + e - 1, where e is how many fit 32 bits. Matrices
are multiplied in float32; the tensor cores' own order of summation and truncation are not modelled.
"""

import re

import numpy as np

from ..numerics import bf16_to_f32, f32_to_tf32
from ..operands import reader, writer
from .memory_access import address_reader, items
from .registry import instruction, unknown

_TILE_BYTES = 128  # 8 rows of 16 bytes


def shape_of(inst):
    """(m, n, k) of the modifier m16n8k16."""
    name = next(m for m in inst.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m))
    return tuple(int(n) for n in re.findall(r"\d+", name))


def unpack(words, kind):
    """uint32 words (..., r) of a PTX operand type -> float32 elements (..., r * elements per word)."""
    words = np.ascontiguousarray(words)
    if kind == "tf32":
        return f32_to_tf32(words.view(np.float32))
    if kind == "bf16":
        return bf16_to_f32(words.view(np.uint16))
    return words.view(np.float16).astype(np.float32)


def fragments_to_rows(fragments, tiles_down, tiles_across):
    """(warps, 32, registers, e) elements -> (warps, rows, columns); register r is tile (r % down, r // down)."""
    warps, _, _, e = fragments.shape
    tiles = fragments.reshape(warps, 8, 4, tiles_across, tiles_down, e)
    return np.ascontiguousarray(tiles.transpose(0, 4, 1, 3, 2, 5)).reshape(warps, 8 * tiles_down, 4 * e * tiles_across)


def read_words(team, readers):
    """The registers' words as (warps, 32, registers)."""
    words = np.empty((team.size, len(readers)), np.uint32)
    for k, read in enumerate(readers):
        words[:, k] = read(team)
    return words.reshape(-1, 32, len(readers))


@instruction("mma")
def mma(inst, kernel):
    """mma.sync.aligned.mMnNkK.row.col.dtype.atype.btype.ctype: d = a b + c."""
    m, n, k = shape_of(inst)
    d_type, a_type, b_type, c_type = inst.modifiers[-4:]
    elements = {"f16": 2, "bf16": 2, "tf32": 1}.get(a_type)
    if (m, n) != (16, 8) or elements is None or a_type != b_type or (d_type, c_type) != ("f32", "f32"):
        raise unknown(inst)
    if k % (4 * elements) or inst.predicate is not None or not inst.has("row") or not inst.has("col"):
        raise unknown(inst)
    across = k // (4 * elements)
    d, a, b, c = (items(operand) for operand in inst.operands)
    read_a, read_b = ([reader(r, "b32", kernel) for r in group] for group in (a, b))
    read_c, write_d = [reader(r, "f32", kernel) for r in c], [writer(r, "f32") for r in d]
    if (len(a), len(b), len(c), len(d)) != (2 * across, across, 4, 4):
        raise unknown(inst)

    def execute(team):
        left = unpack(read_words(team, read_a), a_type).reshape(team.warps, 32, 2 * across, elements)
        right = unpack(read_words(team, read_b), b_type).reshape(team.warps, 32, across, elements)
        product = multiply(fragments_to_rows(left, 2, across), fragments_to_rows(right, 1, across))
        # rows 8h + g, columns 2t + e -> one array per register 2h + e
        parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, team.size)
        for q in range(4):
            write_d[q](team, parts[q] + read_c[q](team), team.mask)

    return execute


def multiply(left, right):
    """(batch, m, k) x (batch, n, k) -> (batch, m, n), fp32: sums of exact products, rounded once.

    In fp32 a processor's library adds in an order that depends on an element's place in the matrix; the matrix units of
    a GPU do not, and so bits that are the same there would differ here.
    """
    with np.errstate(over="ignore"):
        return np.matmul(left.astype(np.float64), right.swapaxes(1, 2).astype(np.float64)).astype(np.float32)


def _matrix_access(inst, kernel, address, count):
    """A function of the team, and of what it stores if it does: byte offsets (warps, count, 8) of the rows, checked."""
    where = address_reader(address, "u32", kernel)
    pointing = np.arange(32) < 8 * count

    def offsets(team, values=None):
        threads = np.flatnonzero(
            np.tile(pointing, team.warps) if team.mask is None else np.tile(pointing, team.warps) & team.mask
        )
        if len(threads) != team.warps * 8 * count:
            raise unknown(inst)
        addresses = where(team)[threads]
        rows = team.shared.locate(team, addresses, 16, threads)
        if values is None:
            team.races.read_by(team, inst, rows, 16, threads)
        else:
            team.races.written_by(team, inst, rows, 16, threads, values)
        team.counters.shared(team.pattern(addresses, 16, threads))
        return rows.reshape(team.warps, count, 8)

    return offsets


@instruction("ldmatrix")
def ldmatrix(inst, kernel):
    """Lane 8i + r gives the address of row r of tile i; each lane gets two elements of each tile."""
    if not inst.has("m8n8") or inst.type != "b16" or inst.predicate is not None:
        raise unknown(inst)
    targets, transposed = items(inst.operands[0]), inst.has("trans")
    count = len(targets)
    rows_of = _matrix_access(inst, kernel, inst.operands[1], count)
    write = [writer(t, "b32") for t in targets]

    def execute(team):
        rows = rows_of(team)
        tiles = team.shared.load(rows, 2, 8)  # warps, tile, row, column
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        words = np.ascontiguousarray(tiles.swapaxes(0, 1)).view(np.uint32).reshape(count, team.size)
        for put, word in zip(write, words):
            put(team, word, team.mask)

    return execute


@instruction("stmatrix")
def stmatrix(inst, kernel):
    """The inverse of ldmatrix."""
    if not inst.has("m8n8") or inst.type != "b16" or inst.predicate is not None:
        raise unknown(inst)
    sources, transposed = items(inst.operands[1]), inst.has("trans")
    rows_of = _matrix_access(inst, kernel, inst.operands[0], len(sources))
    read = [reader(s, "b32", kernel) for s in sources]

    def execute(team):
        words = np.ascontiguousarray(read_words(team, read).swapaxes(1, 2))  # warps, tile, lane
        tiles = words.view(np.uint16).reshape(team.warps, len(read), 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        rows = rows_of(team, tiles.reshape(-1, 8).view(np.uint8))
        team.shared.store(rows, tiles, 2, 8)

    return execute


@instruction("movmatrix")
def movmatrix(inst, kernel):
    """Transposes one 8x8 tile of 16-bit elements across the warp."""
    read, write = reader(inst.operands[1], "b32", kernel), writer(inst.operands[0], "b32")

    def execute(team):
        tiles = np.ascontiguousarray(np.broadcast_to(read(team), team.size)).view(np.uint16).reshape(-1, 8, 8)
        write(team, np.ascontiguousarray(tiles.swapaxes(1, 2)).view(np.uint32).reshape(-1), team.mask)

    return execute
