"""cp.async.bulk.tensor: one thread has a box of a tensor copied into shared memory, counted by an mbarrier."""

import numpy as np

from ..errors import Misaligned
from ..mbarriers import BulkCopy
from ..operands import MAPS_BASE, POISON, reader
from ..ptx import Box
from ..tensor_maps import CHUNK
from .memory_access import active, address_reader
from .registry import guard_of, unknown

_ALIGNMENT = 128  # of a box in shared memory


def load_box(inst, kernel):
    """cp.async.bulk.tensor.Nd.shared.global.mbarrier::complete_tx::bytes [to], [map, {coordinates}], [mbarrier]"""
    expected = {"async", "bulk", "tensor", "shared", "global", "tile", "mbarrier::complete_tx::bytes"}
    others = [m for m in inst.modifiers if m not in expected]
    box = inst.operands[1] if len(inst.operands) == 3 else None
    if (
        inst.modifiers[4:6] != ("shared", "global")
        or not isinstance(box, Box)
        or others != [f"{len(box.coordinates)}d"]
    ):
        raise unknown(inst)
    to, mbarrier = (address_reader(inst.operands[i], "u32", kernel) for i in (0, 2))
    where = reader(box.map, "u64", kernel)
    read = [reader(coordinate, "s32", kernel) for coordinate in reversed(box.coordinates)]
    guard = guard_of(inst, kernel)

    def execute(team):
        threads = active(guard(team))
        threads = np.arange(team.size) if threads is None else threads
        if not len(threads):
            return
        targets, counted_by = to(team), mbarrier(team)
        maps = np.broadcast_to(where(team), team.size)
        coordinates = np.stack([np.broadcast_to(get(team), team.size) for get in read], 1)
        for thread in threads:
            tensor_map = team.batch.launch.maps[(int(maps[thread]) - MAPS_BASE) // 128]
            _issue(team, inst, int(thread), tensor_map, coordinates[thread], targets, counted_by)

    return execute


def _issue(team, inst, thread, tensor_map, coordinates, targets, counted_by):
    """One thread's copy."""
    one = np.array([thread])
    if int(targets[thread]) % _ALIGNMENT:
        what = f"a box in shared memory that does not begin at a multiple of {_ALIGNMENT}"
        raise team.fault(Misaligned, what, thread, address=int(targets[thread]))
    at = int(team.shared.locate(team, counted_by[one], 8, one)[0])
    found = team.mbarriers.find(team, at, thread)
    team.races.check_fenced(team, inst, at, 8, thread)
    # The whole box lies inside: its first and its last byte do.
    last = targets[one] + np.uint32(tensor_map.bytes - CHUNK)
    base = int(team.shared_base[thread])
    start = int(team.shared.locate(team, targets[one], CHUNK, one)[0]) - base
    team.shared.locate(team, last, CHUNK, one)
    offsets = tensor_map.destination(start) + base
    addresses, inside = tensor_map.source(coordinates)
    data = np.zeros((len(offsets), CHUNK), np.uint8)
    if inside.any():
        many = np.full(int(inside.sum()), thread)
        places = team.memory.locate(team, addresses[inside].astype(np.uint64), CHUNK, many)
        data[inside] = team.memory.load(places, 1, CHUNK)
        team.counters.bulk_read(places, CHUNK)
        team.global_races.read_by(team, inst, places, CHUNK, many)
    team.races.begin_bulk(team, inst, offsets, CHUNK, thread)
    team.shared.store(offsets, np.full_like(data, POISON), 1, CHUNK)
    team.mbarriers.in_flight.append(BulkCopy(inst, int(team.thread_block[thread]), found, offsets, data))
