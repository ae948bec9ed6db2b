"""bra bar ret exit trap and the fences: where threads go, wait and meet."""

from ..errors import KernelError
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
        return team.fork(taken, staying, target) if staying.any() else target

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
    """bar.sync id: all threads of the block meet; `bar.warp.sync` orders a warp, which is always in order here."""
    if inst.modifiers[0] == "warp":
        return lambda team: None
    barrier = inst.operands[0]
    modifiers = set(inst.modifiers) - {"cta", "aligned"}
    if (
        modifiers != {"sync"}
        or not isinstance(barrier, Immediate)
        or inst.predicate is not None
        or len(inst.operands) > 1
    ):
        raise unknown(inst)

    def execute(team):
        ticket = team.batch.arrive(team, team.mask, barrier.value)
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


@instruction("nanosleep", "prefetch", "setmaxnreg", "discard", "applypriority", "brkpt")
def hint(inst, kernel):
    """Changes when something happens, not what."""
    return lambda team: None
