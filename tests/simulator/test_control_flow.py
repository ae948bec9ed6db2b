"""Branches, divergence within and between warps, barriers."""

import numpy as np
import pytest

from kernels.simulator import BarrierDeadlock, KernelError, machine
from kernels.simulator.control_flow import live_registers, read, written
from kernels.simulator.ptx import parse
from simulator.snippets import launch, module, tensor

HEAD = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\nmad.lo.u32 %r4, %r2, %r3, %r1;\n"
TAIL = "ld.param.u64 %rd1, [p0];\nmad.wide.u32 %rd2, %r4, 4, %rd1;\nst.global.b32 [%rd2], %r5;\n"
SEEDS = [None, 0, 3]


def run(body, threads=64, blocks=3, seed=None):
    out = tensor(np.zeros(threads * blocks, np.uint32))
    count = launch(HEAD + body + TAIL, [out], threads=threads, blocks=blocks, seed=seed)
    return out.numpy().view(np.uint32).reshape(blocks, threads), count


def loop(bound):
    """Counts to a bound that differs from thread to thread, or from block to block."""
    return (
        f"mov.b32 %r5, 0;\n{bound}\n$TOP:\nsetp.ge.u32 %p1, %r5, %r6;\n@%p1 bra $END;\nadd.u32 %r5, %r5, 1;\n"
        "bra $TOP;\n$END:\n"
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("and.b32 %r6, %r1, 7;", lambda b, t: t % 8),
        ("shr.u32 %r6, %r1, 5;", lambda b, t: t // 32),
        ("mul.lo.u32 %r6, %r2, 5;", lambda b, t: 5 * b),
        ("mad.lo.u32 %r6, %r2, 3, %r1;", lambda b, t: 3 * b + t),
    ],
    ids=["lanes", "warps", "blocks", "all"],
)
def test_loops_of_different_lengths(bound, expected, seed):
    got, _ = run(loop(bound), seed=seed)
    assert got.tolist() == [[expected(b, t) for t in range(64)] for b in range(3)]


def test_paths_meet_again_after_a_branch():
    body = (
        "and.b32 %r6, %r1, 1;\nsetp.eq.u32 %p1, %r6, 0;\n@%p1 bra $EVEN;\nmov.b32 %r5, 10;\nbra $JOIN;\n"
        "$EVEN:\nmov.b32 %r5, 20;\n$JOIN:\n"
    )
    got, launched = run(body + "add.u32 %r5, %r5, 1;\n", blocks=1)
    assert got[0].tolist() == [21, 11] * 32
    instructions = launched.program.kernel.instructions
    executed = {inst.text: int(n) for inst, n in zip(instructions, launched.counters.executed)}
    assert executed["add.u32 %r5, %r5, 1"] == 2  # once per warp: the paths had met
    assert executed["mov.b32 %r5, 10"] == executed["mov.b32 %r5, 20"] == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_waits_for_paths_that_come_later(seed):
    body = (
        "mov.u32 %r9, global_smem;\nshr.u32 %r6, %r1, 5;\nsetp.eq.u32 %p1, %r6, 0;\n@%p1 bra $FIRST;\n"
        "bar.sync 0;\nld.shared.b32 %r5, [%r9];\nbra $DONE;\n"
        "$FIRST:\nst.shared.b32 [%r9], 9;\nbar.sync 0;\nmov.b32 %r5, 1;\n$DONE:\n"
    )
    got, _ = run(body, seed=seed)
    assert got.tolist() == [[1] * 32 + [9] * 32] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_leave_early(seed):
    got, _ = run("mov.b32 %r5, 4;\nsetp.lt.u32 %p1, %r1, 10;\n@%p1 ret;\n", seed=seed)
    assert got.tolist() == [[0] * 10 + [4] * 54] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_deadlock_says_who_waits_where(seed):
    with pytest.raises(BarrierDeadlock, match=r"32 of 64 threads wait at barrier 0 \(snippet.py:1\)"):
        run("setp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;\nmov.b32 %r5, 1;\n", seed=seed)


LOCK = (
    "ld.param.u64 %rd5, [p1];\n$TRY:\natom.global.acquire.gpu.cas.b32 %r7, [%rd5], 0, 1;\nsetp.ne.u32 %p1, %r7, 0;\n"
    "@%p1 bra $TRY;\nld.global.b32 %r5, [%rd5+4];\nadd.u32 %r5, %r5, 1;\nst.global.b32 [%rd5+4], %r5;\n"
    "atom.global.release.gpu.exch.b32 %r7, [%rd5], 0;\n"
)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_spin_for_a_lock(seed):
    """One thread per block takes a lock, counts, and lets go: each gets a number of its own."""
    cells = tensor(np.zeros(2, np.uint32))
    out = tensor(np.zeros(5 * 32, np.uint32))
    only_first = "setp.ne.u32 %p2, %r1, 0;\n@%p2 bra $OUT;\n"
    launch(HEAD + only_first + LOCK + TAIL + "$OUT:\n", [out, cells], blocks=5, seed=seed)
    assert sorted(out.numpy().view(np.uint32).reshape(5, 32)[:, 0]) == [1, 2, 3, 4, 5]
    assert cells.numpy().view(np.uint32).tolist() == [0, 5]


def test_a_lock_that_no_one_opens_is_an_error(monkeypatch):
    monkeypatch.setattr(machine, "MOST_TURNS", 3)
    cells = tensor(np.ones(2, np.uint32))
    with pytest.raises(KernelError, match="goes on and on"):
        launch(HEAD + LOCK + TAIL, [tensor(np.zeros(32, np.uint32)), cells])


def test_trap_is_a_device_assertion():
    with pytest.raises(KernelError, match=r"trapped.*thread 40"):
        run("mov.b32 %r5, 0;\nsetp.eq.u32 %p1, %r1, 40;\n@%p1 trap;\n")


def test_liveness():
    body = "mov.b32 %r5, 1;\n$TOP:\nadd.u32 %r6, %r5, %r4;\nsetp.lt.u32 %p1, %r6, 9;\n@%p1 bra $TOP;\n"
    kernel = parse(module(HEAD + body + TAIL, 1, 32))
    live = live_registers(kernel)
    top = next(inst for inst in kernel.instructions if inst.text.startswith("add.u32 %r6"))
    names = {r.name for r in kernel.registers if live[top.index] >> r.index & 1}
    assert names == {"%r4", "%r5"}
    assert {kernel.registers[i].name for i in read(top)} == {"%r4", "%r5"}
    assert {kernel.registers[i].name for i in written(top)} == {"%r6"}
