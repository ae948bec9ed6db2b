"""mbarrier: init, inval, arrive, expect_tx, try_wait.

A thread that waits is parked until the phase has ended, however often the kernel's loop would have asked.
"""

import numpy as np

from ..mbarriers import Wait
from ..operands import reader, writer
from ..ptx import Immediate
from .memory_access import active, address_reader
from .registry import guard_of, instruction, unknown

_BYTES = 8


@instruction("mbarrier")
def mbarrier(inst, kernel):
    if not inst.has("shared") or inst.type != "b64":
        raise unknown(inst)
    modifiers = [m for m in inst.modifiers if m not in ("shared", "b64", "release", "acquire", "cta")]
    forms = {
        ("init",): _init,
        ("inval",): _invalidate,
        ("arrive",): _arrive,
        ("arrive", "expect_tx"): _arrive,
        ("try_wait", "parity"): _try_wait,
    }
    if tuple(modifiers) not in forms:
        raise unknown(inst)
    return forms[tuple(modifiers)](inst, kernel)


def _places(inst, address, kernel):
    """A function of the team: the threads that execute `inst`, and the offset of the mbarrier of each."""
    where, guard = address_reader(address, "u32", kernel), guard_of(inst, kernel)

    def find(team):
        threads = active(guard(team))
        threads = np.arange(team.size) if threads is None else threads
        return threads, team.shared.locate(team, where(team)[threads], _BYTES, threads) if len(threads) else threads

    return find


def _init(inst, kernel):
    places, count = _places(inst, inst.operands[0], kernel), reader(inst.operands[1], "u32", kernel)

    def execute(team):
        threads, offsets = places(team)
        if len(threads):
            team.races.written_by(team, inst, offsets, _BYTES, threads)
            counts = np.broadcast_to(count(team), team.size)[threads]
            for thread, offset, n in zip(threads, offsets, counts):
                team.mbarriers.init(team, offset, thread, n)

    return execute


def _invalidate(inst, kernel):
    places = _places(inst, inst.operands[0], kernel)

    def execute(team):
        threads, offsets = places(team)
        if len(threads):
            team.races.written_by(team, inst, offsets, _BYTES, threads)
            for offset in offsets:
                team.mbarriers.forget(offset)

    return execute


def _arrive(inst, kernel):
    """arrive _, [addr] {, count}; arrive.expect_tx _, [addr], bytes: one arrival."""
    result, address, *rest = inst.operands
    if getattr(result, "name", None) != "_" or len(rest) > 1:
        raise unknown(inst)
    places, expects = _places(inst, address, kernel), inst.has("expect_tx")
    number = reader(rest[0] if rest else Immediate(1), "u32", kernel)

    def execute(team):
        threads, offsets = places(team)
        if not len(threads):
            return
        team.races.read_by(team, inst, offsets, _BYTES, threads)
        numbers = np.broadcast_to(number(team), team.size)[threads]
        for thread, offset, n in zip(threads, offsets, numbers):
            found = team.mbarriers.find(team, offset, thread)
            team.mbarriers.arrive(team, found, int(thread), 1 if expects else int(n), int(n) if expects else 0)

    return execute


def _try_wait(inst, kernel):
    """try_wait.parity complete, [addr], parity: true, once the phase of that parity has ended."""
    if len(inst.operands) != 3:
        raise unknown(inst)
    places, parity = _places(inst, inst.operands[1], kernel), reader(inst.operands[2], "u32", kernel)
    write, guard = writer(inst.operands[0], "pred"), guard_of(inst, kernel)

    def execute(team):
        threads, offsets = places(team)
        if not len(threads):
            return None
        parities = np.broadcast_to(parity(team), team.size)[threads]
        asked = np.unique(np.stack([offsets, parities.astype(np.int64) & 1, team.thread_warp[threads]]), axis=1)
        found = {int(o): team.mbarriers.find(team, o, threads[np.flatnonzero(offsets == o)[0]]) for o in set(asked[0])}
        pairs = {(int(o), int(p)): (found[int(o)], int(p)) for o, p, _ in asked.T}
        if not all(m.complete(p) for m, p in pairs.values()):
            team.counters.executed[team.pc] -= team._active_warps()
            return team.park(Wait(list(pairs.values())), team.pc)
        team.races.read_by(team, inst, offsets, _BYTES, threads)
        for offset, _, warp in asked.T:
            seen = found[int(offset)]
            team.batch.hear(seen.block, int(warp), seen.told)
            for phase, ticket in seen.tickets:
                if phase < seen.phase:
                    team.races.observe(ticket, int(warp))
        write(team, np.ones(team.size, bool), guard(team))
        return None

    return execute
