"""Warps that run different code: named barriers, mbarriers that warps arrive at, registers handed over, TMA stores."""

import re
from dataclasses import replace

import pytest
import torch

from kernels.simulator import AsyncHazard, BarrierDeadlock, OutOfBounds, SharedMemoryRace, SimulatorError, simulate
from simulator import snippets
from simulator.replay import recording, same
from simulator.warp_specialised import attention

pytestmark = pytest.mark.simulate

WAIT = r"waitLoop:\s*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"


@pytest.fixture(scope="module")
def launch():
    """128 queries and three tiles of keys, so that a slot is filled twice."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 64).bfloat16() for rows in (128, 192, 192))
    with pytest.MonkeyPatch.context() as patch, recording(patch) as run, simulate("sm_90"):
        attention(q, k, v)
    return run[0]


@pytest.fixture(scope="module")
def good(launch):
    return launch.run()


def fault(launch, text):
    try:
        return launch.run(text)
    except SimulatorError as error:
        return error


def faults(launch, pattern, change=lambda match: ""):
    """What became of each place that matches, changed alone: the error, or what the tensors then hold."""
    return [fault(launch, launch.replaced(match, change(match))) for match in launch.find(pattern)]


def test_each_warp_runs_its_own_code_and_no_order_changes_a_bit(launch, good):
    q, k, v = (good[name].double() for name in ("q_desc", "k_desc", "v_desc"))
    exact = (q @ k.T / 8).softmax(-1) @ v
    assert (good["o_desc"].double() - exact).abs().max() < 4e-3
    assert all(same(launch.run(seed=seed), good) for seed in (1, 2))


def test_an_arrival_that_is_missing(launch):
    found = faults(launch, r"@%p\d+ mbarrier\.arrive\.shared[^;]*;")
    assert [type(error) for error in found] == [BarrierDeadlock] * 5
    assert all("lacks 1 arrivals" in str(error) for error in found)


def test_a_wait_that_is_missing(launch, good):
    """Missed: those for a turn, which keep no data right, and the second consumer's for what the first, whose turn came
    before, has waited for.
    """
    found = faults(launch, WAIT)
    missed = [error for error in found if isinstance(error, dict)]
    assert (len(found), len(missed)) == (7, 3)
    assert all(same(tensors, good) for tensors in missed)


def test_a_slot_filled_again_while_a_product_reads_it(launch):
    """A consumer lets go of its slot before its product has been waited for, and the next copy overwrites it."""
    waits = launch.find(r"wgmma\.wait_group\.sync\.aligned 0;")
    with pytest.raises(AsyncHazard, match="overwrites shared memory that a wgmma still reads"):
        launch.run(launch.replaced(waits[-1], "wgmma.wait_group.sync.aligned 1;"))


def test_named_barriers(launch):
    bars = launch.find(r"bar\.sync\s+2, 128;")
    with pytest.raises(BarrierDeadlock, match="more than the 96 threads of barrier 2 come to it"):
        launch.run(launch.replaced(bars[0], "bar.sync 2, 96;"))
    with pytest.raises(BarrierDeadlock, match="128 of 160 threads wait at barrier 2"):
        launch.run(launch.replaced(bars[0], "bar.sync 2, 160;"))
    # Behind the product that reads a slot, and behind the rows that the copy engine stores.
    for match in (bars[3], bars[5]):
        with pytest.raises(SharedMemoryRace):
            launch.run(launch.without(match))


def test_registers_that_warps_hand_over(launch):
    kept = launch.find(r"setmaxnreg\.inc[^;]*\s200;")[0]
    with pytest.raises(AsyncHazard, match=r"registers beyond setmaxnreg: 40 are kept, but \d+ hold values at .*py:\d+"):
        launch.run(launch.replaced(kept, "setmaxnreg.dec.sync.aligned.u32 40;"))
    given = next(m for m in launch.find(r"setmaxnreg\.dec[^;]*\s120;"))
    with pytest.raises(BarrierDeadlock, match=r"warps wait for \d+ registers, of which 0 are free"):
        launch.run(launch.without(given))
    with pytest.raises(AsyncHazard, match="setmaxnreg to 120 where a thread holds 168: inc cannot give any back"):
        launch.run(launch.replaced(given, "setmaxnreg.inc.sync.aligned.u32 120;"))


def test_what_a_bulk_store_needs(launch):
    with pytest.raises(AsyncHazard, match=r"with no fence\.proxy\.async between"):
        launch.run(launch.without(launch.find(r"fence\.proxy\.async[^;]*;")[-1]))
    for kind in ("wait_group", "commit_group"):
        with pytest.raises(AsyncHazard, match="may still read its shared memory: its wait is missing"):
            launch.run(launch.without(launch.find(rf"cp\.async\.bulk\.{kind}[^;]*;")[-1]))


def test_a_tensor_map_that_goes_out_of_its_tensor(launch):
    """For a store and for a load: 64 rows more than there are."""
    for number, rows in ((0, 128), (3, 128)):
        maps = [i for i, a in enumerate(launch.arguments) if hasattr(a, "box")]
        arguments = list(launch.arguments)
        made = arguments[maps[number]]
        arguments[maps[number]] = replace(made, shape=(rows + 64, 64), address=0)
        wider = replace(launch, arguments=arguments, grid=(2, 1, 1))
        with pytest.raises(OutOfBounds, match="past the end of"):
            wider.run()


STORE = """
mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; mov.u32 %r2, global_smem;
shl.b32 %r3, %r1, 4; add.u32 %r3, %r3, %r2; setp.eq.u32 %p1, %r1, 0;
st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};
fence.proxy.async.shared::cta;
bar.sync 0;
"""


def stored(rest, *, seed=None, threads=64):
    """What 64 rows of 16 bytes hold after `rest`; shared memory holds each thread's number."""
    out = torch.ones(64 * 4, dtype=torch.int32)
    bytes_ = out.view(torch.uint8)
    snippets.launch(STORE + rest, [bytes_], threads=threads, seed=seed)
    return bytes_.view(torch.int32).view(64, 4)


ROW = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 1024;"
ADD = "@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [%r2], 1024;"
COMMIT, WAIT_READ = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;"
OVERWRITE = "bar.sync 0; st.shared.b32 [%r3], 7;"


@pytest.mark.parametrize("seed", [None, 1])
def test_rows_are_stored_and_added(seed):
    numbers = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 4)
    end = COMMIT + WAIT_READ + OVERWRITE
    assert torch.equal(stored(ROW + end, seed=seed), numbers)
    assert torch.equal(stored(ADD + ADD + end, seed=seed), 2 * numbers + 1)


@pytest.mark.parametrize("what", [ROW, ADD], ids=["store", "add"])
def test_shared_memory_overwritten_while_the_copy_engine_reads_it(what):
    with pytest.raises(AsyncHazard, match="overwrites shared memory that a bulk store still reads"):
        stored(what + COMMIT + OVERWRITE)
    # Of two groups the newer one may be left by this wait.
    with pytest.raises(AsyncHazard, match="overwrites shared memory that a bulk store still reads"):
        stored(what + COMMIT + what + COMMIT + "cp.async.bulk.wait_group.read 1;" + OVERWRITE)
    with pytest.raises(SharedMemoryRace, match="overwrites what warp 0 read"):
        stored(what + COMMIT + WAIT_READ + "st.shared.b32 [%r3], 7;")


def test_what_is_stored_is_there_once_it_has_been_waited_for():
    """.read alone leaves the row on its way."""
    back = "@%p1 ld.global.b32 %r9, [%rd1+16]; add.u32 %r9, %r9, 5; @%p1 st.global.b32 [%rd1], %r9;"
    late = stored(ROW + COMMIT + WAIT_READ + back + "")
    there = stored(ROW + COMMIT + "cp.async.bulk.wait_group 0;" + back)
    assert (int(late[0, 0]), int(there[0, 0])) == (0, 6)


def test_a_branch_through_a_table():
    body = """
    mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; shr.u32 %r2, %r1, 5;
    and.b32 %r4, %r1, 1; add.u32 %r2, %r2, %r4;
    $L_brx_0: .branchtargets
        $A,
        $B,
        $C;
    brx.idx %r2, $L_brx_0;
    $A: mov.b32 %r3, 10; bra.uni $END;
    $B: mov.b32 %r3, 20; bra.uni $END;
    $C: mov.b32 %r3, 30;
    $END: st.global.b32 [%rd2], %r3;
    """
    for seed in (None, 1):
        out = torch.zeros(64, dtype=torch.int32)
        snippets.launch(body, [out.view(torch.uint8)], threads=64, seed=seed)
        assert out.tolist() == [10 * (1 + i // 32 + i % 2) for i in range(64)]
    with pytest.raises(SimulatorError, match="a branch to label 3 of a table of 3"):
        snippets.launch(body, [torch.zeros(512, dtype=torch.uint8)], threads=96)


def test_an_arrival_at_a_named_barrier_does_not_wait():
    """Warp 1 writes and arrives, warp 0 meets it and reads; without the meeting that is a race."""
    body = """
    mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; mov.u32 %r2, global_smem;
    and.b32 %r4, %r1, 31; shl.b32 %r4, %r4, 2; add.u32 %r2, %r2, %r4; setp.lt.u32 %p1, %r1, 32;
    @%p1 bra $FIRST;
    st.shared.b32 [%r2], %r1;
    bar.arrive 3, 64;
    bra.uni $END;
    $FIRST: bar.sync 3, 64;
    ld.shared.b32 %r5, [%r2];
    st.global.b32 [%rd2], %r5;
    $END:
    """
    out = torch.zeros(32, dtype=torch.int32)
    for seed in (None, 1, 2):
        snippets.launch(body, [out.view(torch.uint8)], threads=64, seed=seed)
        assert out.tolist() == list(range(32, 64))
    racing = re.sub(r"bar\.arrive 3, 64;", "bar.arrive 4, 64;", body).replace("bar.sync 3, 64;", "bar.sync 3, 32;")
    with pytest.raises(SharedMemoryRace):
        snippets.launch(racing, [out.view(torch.uint8)], threads=64)
    with pytest.raises(BarrierDeadlock, match="barrier 3 is taken for one of 64 threads here, of 96 by who came"):
        snippets.launch(body.replace("arrive 3, 64", "arrive 3, 96"), [out.view(torch.uint8)], threads=64)
