"""bra brx bar ret exit trap and the fences: where threads go, wait and meet."""

import numpy as np

from ..errors import KernelError
from ..operands import reader
from ..ptx import Immediate
from ..team import STOP
from .registry import guard_of, instruction, unknown


@instruction("bra")
def bra(inst, kernel):
    target = inst.target
    if inst.predicate is None:
        return lambda team: target
    guard = guard_of(inst, kernel)

    def execute(team):
        taken = guard(team)
        if taken is None:
            return target
        if not taken.any():
            return None
        staying = ~taken if team.mask is None else team.mask & ~taken
        return team.fork((taken, target), (staying, team.pc + 1)) if staying.any() else target

    return execute


@instruction("brx")
def brx(inst, kernel):
    """brx.idx index, table: to the label of the table that the index says."""
    if inst.modifiers != ("idx",) or inst.predicate is not None:
        raise unknown(inst)
    index = reader(inst.operands[0], "u32", kernel)

    def execute(team):
        active = np.ones(team.size, bool) if team.mask is None else team.mask
        chosen = np.broadcast_to(index(team), team.size)
        beyond = active & (chosen >= len(inst.targets))
        if beyond.any():
            at = int(beyond.argmax())
            what = f"a branch to label {int(chosen[at])} of a table of {len(inst.targets)}"
            raise team.fault(KernelError, what, at)
        places = np.array(inst.targets)[np.where(active, chosen, 0)]
        ways = [(active & (places == place), int(place)) for place in np.unique(places[active])]
        return team.fork(*ways) if len(ways) > 1 else ways[0][1]

    return execute


@instruction("ret", "exit")
def ret(inst, kernel):
    guard = guard_of(inst, kernel)

    def execute(team):
        leaving = guard(team)
        if inst.predicate is not None and leaving is not None:
            staying = ~leaving if team.mask is None else team.mask & ~leaving
            if staying.any():
                team.go_on(team.pc + 1, staying)
        return STOP

    return execute


@instruction("trap")
def trap(inst, kernel):
    guard = guard_of(inst, kernel)

    def execute(team):
        hit = guard(team)
        if hit is None or hit.any():
            raise team.fault(
                KernelError, "the kernel trapped (a device assertion failed)", 0 if hit is None else int(hit.argmax())
            )

    return execute


@instruction("bar", "barrier")
def bar(inst, kernel):
    """bar.sync id: all threads of the block meet, or with bar.sync id, n: any n threads. bar.arrive id, n: these are
    among the n, but do not wait. `bar.warp.sync` orders a warp, which is always in order here.
    """
    if inst.modifiers[0] == "warp":
        return lambda team: None
    modifiers = set(inst.modifiers) - {"cta", "aligned"}
    if (
        modifiers not in ({"sync"}, {"arrive"})
        or any(not isinstance(operand, Immediate) for operand in inst.operands)
        or inst.predicate is not None
        or len(inst.operands) > 2
    ):
        raise unknown(inst)
    barrier, threads = ([operand.value for operand in inst.operands] + [None])[:2]
    waits = inst.has("sync")
    if not waits and threads is None:
        raise unknown(inst)

    def execute(team):
        ticket = team.batch.arrive(team, team.mask, barrier, threads, waits)
        if not waits:
            return None
        in_step = team.mask is None and not team.batch.scheduled
        return None if in_step and team.batch.passed(ticket) else team.park(ticket)

    return execute


@instruction("fence", "membar")
def fence(inst, kernel):
    """fence.proxy.async shows ordinary writes to asynchronous readers; the others order global memory."""
    if inst.modifiers[:2] == ("proxy", "async"):
        return lambda team: team.races.proxy_fence(team)
    if inst.modifiers[0] == "proxy":
        raise unknown(inst)
    if inst.has("cta"):
        return lambda team: None
    return lambda team: team.global_races.fence(team)


@instruction("griddepcontrol")
def griddepcontrol(inst, kernel):
    """wait: until the kernels before have ended; launch_dependents lets the next one begin."""
    if inst.modifiers == ("wait",):
        return lambda team: team.global_races.wait(team)
    if inst.modifiers == ("launch_dependents",):
        return lambda team: None
    raise unknown(inst)


@instruction("setmaxnreg")
def setmaxnreg(inst, kernel):
    """setmaxnreg.inc/dec.sync.aligned.u32 n: the warp takes registers from its block's pool, or gives some back."""
    count, grows = inst.operands[0], inst.has("inc")
    if not isinstance(count, Immediate) or inst.predicate is not None or grows == inst.has("dec"):
        raise unknown(inst)

    def execute(team):
        wait = team.batch.registers.change(team, count.value, grows)
        if wait is None:
            return None
        team.counters.executed[team.pc] -= team.warps
        return team.park(wait, team.pc)

    return execute


@instruction("nanosleep", "prefetch", "discard", "applypriority", "brkpt")
def hint(inst, kernel):
    """Changes when something happens, not what."""
    return lambda team: None
