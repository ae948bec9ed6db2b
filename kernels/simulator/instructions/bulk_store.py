"""cp.async.bulk and cp.reduce.async.bulk from shared to global memory, of a box of a tensor or of a row of bytes."""

import numpy as np

from ..bulk_stores import BulkStore
from ..errors import Misaligned, Unimplemented
from ..operands import MAPS_BASE, reader
from ..ptx import Box, Immediate
from ..tensor_maps import CHUNK
from .memory_access import active, address_reader
from .registry import guard_of, unknown

_ALIGNMENT = 128  # of a box in shared memory
_ADDED = ("f32", "f16", "bf16", "u32", "s32", "u64")


def store(inst, kernel):
    """cp{.reduce}.async.bulk.tensor.Nd.global.shared{.add}.bulk_group [map, {coordinates}], [from]
    cp{.reduce}.async.bulk.global.shared.bulk_group{.add.type} [to], [from], size
    """
    known = {"reduce", "async", "bulk", "tensor", "global", "shared", "tile", "add", "bulk_group", "noftz"}
    others = [m for m in inst.modifiers if m not in known]
    is_box = isinstance(inst.operands[0], Box)
    adds = inst.has("add")
    expected = [f"{len(inst.operands[0].coordinates)}d"] if is_box else [inst.type] if adds else []
    if (
        others != expected
        or len(inst.operands) != (2 if is_box else 3)
        or (others and adds and not is_box and inst.type not in _ADDED)
    ):
        raise unknown(inst)
    source, guard = address_reader(inst.operands[1], "u32", kernel), guard_of(inst, kernel)
    places_of = _box(inst, kernel) if is_box else _row(inst, kernel)

    def execute(team):
        threads = active(guard(team))
        threads = np.arange(team.size) if threads is None else threads
        for thread in threads.tolist():
            _issue(team, inst, thread, source(team), *places_of(team, thread), adds)

    return execute


def _box(inst, kernel):
    """A function (team, thread) -> (a function from a start in shared memory to offsets, addresses, inside, type)."""
    box = inst.operands[0]
    where = reader(box.map, "u64", kernel)
    read = [reader(coordinate, "s32", kernel) for coordinate in reversed(box.coordinates)]

    def find(team, thread):
        number = int(np.broadcast_to(where(team), team.size)[thread]) - MAPS_BASE
        tensor_map = team.batch.launch.maps[number // 128]
        coordinates = [int(np.broadcast_to(get(team), team.size)[thread]) for get in read]
        return tensor_map.destination, *tensor_map.source(coordinates), tensor_map.kind, _ALIGNMENT

    return find


def _row(inst, kernel):
    to, size = address_reader(inst.operands[0], "u64", kernel), reader(inst.operands[2], "u32", kernel)

    def find(team, thread):
        length = int(np.broadcast_to(size(team), team.size)[thread])
        if length % CHUNK or not length:
            what = f"a bulk store of {length} bytes; a positive multiple of {CHUNK} is required"
            raise team.fault(Misaligned, what, thread)
        steps = np.arange(0, length, CHUNK)
        addresses = int(np.broadcast_to(to(team), team.size)[thread]) + steps
        return lambda start: start + steps, addresses, np.ones(len(steps), bool), inst.type, CHUNK

    return find


def _issue(team, inst, thread, sources, offsets_of, addresses, inside, kind, alignment, adds):
    """One thread's store."""
    if int(sources[thread]) % alignment:
        what = f"a bulk store from shared memory that does not begin at a multiple of {alignment}"
        raise team.fault(Misaligned, what, thread, address=int(sources[thread]))
    if adds and kind not in _ADDED:
        raise Unimplemented(f"a bulk addition of {kind}")
    one = np.array([thread])
    base = int(team.shared_base[thread])
    last = sources[one] + np.uint32(len(addresses) * CHUNK - CHUNK)
    start = int(team.shared.locate(team, sources[one], CHUNK, one)[0]) - base
    team.shared.locate(team, last, CHUNK, one)
    offsets = offsets_of(start) + base
    number = team.races.begin_bulk_read(team, inst, offsets, CHUNK, thread)
    places = np.empty(0, np.int64)
    if inside.any():
        many = np.full(int(inside.sum()), thread)
        places = team.memory.locate(team, addresses[inside].astype(np.uint64), CHUNK, many)
    data = team.shared.load(offsets, 1, CHUNK)[inside]
    if len(places):
        team.counters.bulk_wrote(places, CHUNK, adds)
        if adds:
            team.global_races.atomic_by(team, inst, places, CHUNK, many)
        else:
            team.global_races.written_by(team, inst, places, CHUNK, many, data)
    block = int(team.thread_block[thread])
    team.batch.stores.issue(team, BulkStore(inst, block, thread, offsets, number, places, data, kind if adds else None))


def commit(inst, kernel):
    """cp.async.bulk.commit_group: the thread's stores since the last one are its newest group."""
    guard = guard_of(inst, kernel)

    def execute(team):
        threads = active(guard(team))
        team.batch.stores.commit(team, np.arange(team.size) if threads is None else threads)

    return execute


def wait(inst, kernel):
    """cp.async.bulk.wait_group{.read} n"""
    if not isinstance(inst.operands[0], Immediate):
        raise unknown(inst)
    guard, pending, only_read = guard_of(inst, kernel), inst.operands[0].value, inst.has("read")

    def execute(team):
        threads = active(guard(team))
        threads = np.arange(team.size) if threads is None else threads
        team.batch.stores.wait(team, threads, pending, only_read)

    return execute
