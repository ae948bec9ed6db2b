"""Dependent launches and cooperative grids: what is touched before a wait is reported, and what nobody waits for."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.simulator import (
    DependentLaunchRace,
    EndlessWait,
    GlobalMemoryRace,
    GridTooLarge,
    simulate,
)
from simulator.test_global_races import BLOCKS, WIDTH, counter, rows
from simulator.test_global_races import _two_phases_kernel as two_phases

N = 256


@triton.jit
def _double_kernel(x_ptr, y_ptr, N: tl.constexpr, ASK: tl.constexpr, WAIT: tl.constexpr):
    """y = 2 x. WAIT: 0 never, 1 before the load, 2 after it, 3 after the store."""
    offs = tl.program_id(0) * N + tl.arange(0, N)
    if ASK:
        gdc_launch_dependents()
    if WAIT == 1:
        gdc_wait()
    x = tl.load(x_ptr + offs)
    if WAIT == 2:
        gdc_wait()
    tl.store(y_ptr + offs, 2 * x)
    if WAIT == 3:
        gdc_wait()


@pytest.fixture(params=[None, 1], ids=["lock step", "seed 1"])
def chip(request):
    with simulate("sm_90", seed=request.param) as gpu:
        yield gpu


def double(x, y, ask=True, wait=1, ahead=True, N=N):
    _double_kernel[(len(x) // N,)](x, y, N, ask, wait, launch_pdl=ahead)


def numbers():
    return torch.arange(2 * N, dtype=torch.float32)


@pytest.mark.simulate
class TestDependentLaunches:
    def test_a_chain_that_waits_is_right(self, chip):
        x, y, z = numbers(), numbers(), numbers()
        double(x, y)
        double(y, z)
        double(z, x)
        assert torch.equal(x, 8 * numbers())

    def test_what_the_kernel_before_wrote_is_read_before_the_wait(self, chip):
        x, y, z = numbers(), numbers(), numbers()
        for ask in (False, True):  # a kernel that does not ask has ended, but its writes may be under way
            double(x, y, ask)
            with pytest.raises(DependentLaunchRace) as info:
                double(y, z, wait=2)
            message = str(info.value)
            assert "dependent launch: reads 0x" in message
            assert "of x_ptr, which _double_kernel, launched before, wrote" in message
            assert len(re.findall(r"test_dependent.py:\d+", message)) == 2  # both lines
        double(x, y)
        double(x, z, wait=2)  # nobody wrote x

    def test_what_the_kernel_before_wrote_or_reads_is_overwritten_before_the_wait(self, chip):
        x, y, z = numbers(), numbers(), numbers()
        double(x, y)
        with pytest.raises(DependentLaunchRace, match=r"overwrites .* wrote"):
            double(z, y, wait=3)
        double(x, y)
        with pytest.raises(DependentLaunchRace, match=r"overwrites .* read, and"):
            double(z, x, wait=3)
        double(x, y, ask=False)
        double(z, x, wait=3)  # it has ended: it reads no more
        double(x[:N], y[:N])
        double(z[:N], x[N:], wait=3)  # another part of the same tensor

    def test_a_kernel_that_never_waited_may_leave_the_one_before_it_running(self, chip):
        x, y, z, w = numbers(), numbers(), numbers(), numbers()
        double(x, y)
        double(x, z, wait=0)
        with pytest.raises(DependentLaunchRace, match=r"of x_ptr, which _double_kernel, launched before, wrote"):
            double(y, w, wait=2)
        double(x, y)
        double(x, z, wait=2)
        double(y, w, wait=2)  # the kernel between waited for the end of the one that wrote y

    def test_an_ordinary_launch_waits_for_everything(self, chip):
        x, y, z = numbers(), numbers(), numbers()
        double(x, y)
        double(x, z, wait=0)
        double(y, z, wait=0, ahead=False)
        assert torch.equal(z, 4 * numbers())


@triton.jit
def _warps_kernel(x_ptr, y_ptr, N: tl.constexpr, BARRIER: tl.constexpr):
    """The warps of threads that wait are those of one branch."""
    offs = tl.arange(0, N)
    gdc_wait()
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@pytest.mark.simulate
@pytest.mark.parametrize("barrier", [False, True])
def test_a_wait_counts_for_the_warps_that_execute_it_and_at_a_barrier_for_the_block(barrier):
    def first_warp_alone(text):
        wait = "griddepcontrol.wait;"
        if "_warps_kernel" not in text:
            return text
        declared = ".reg .pred %pw;\n.reg .b32 %rw;\nmov.u32 %rw, %tid.x;\nsetp.lt.u32 %pw, %rw, 32;\n"
        return text.replace(wait, f"{declared}@!%pw bra PAST;\n{wait}\nPAST:")

    x, y, z = (torch.zeros(N) for _ in range(3))
    with simulate("sm_90", transform=first_warp_alone):
        double(x, y)
        if barrier:
            _warps_kernel[(1,)](y, z, N, True, launch_pdl=True)
        else:
            with pytest.raises(DependentLaunchRace):
                _warps_kernel[(1,)](y, z, N, False, launch_pdl=True)


@pytest.mark.simulate
class TestCooperativeGrids:
    def test_blocks_of_several_batches_meet(self):
        blocks = 100  # of 4 warps: more than the simulator runs at a time otherwise
        with simulate("sm_90"):
            x = rows(blocks)
            two_phases[(blocks,)](x, counter(), blocks, WIDTH, 0, launch_cooperative_grid=True)
            assert torch.equal(x[3], blocks * torch.arange(WIDTH, dtype=torch.int32) + blocks * (blocks - 1) // 2)

    def test_a_grid_that_does_not_fit_is_refused(self):
        with simulate("sm_90"), pytest.raises(GridTooLarge, match=r"grid of 5000 blocks; sm_90 holds \d+ of them"):
            two_phases[(5000,)](rows(5000), counter(), 5000, WIDTH, 0, launch_cooperative_grid=True)

    def test_a_skipped_arrival_never_ends_and_a_doubled_one_is_a_race(self, monkeypatch):
        monkeypatch.setattr("kernels.simulator.machine.MOST_TURNS", 20)
        missing, doubled = counter(), counter()
        missing[0], doubled[0] = -1, 1
        with simulate("sm_90"), pytest.raises(EndlessWait, match="goes on and on, as where an arrival is missing"):
            two_phases[(BLOCKS,)](rows(), missing, BLOCKS, WIDTH, 0, launch_cooperative_grid=True)
        for seed in (1, 3, 4):  # 11 of the seeds 0 to 11; in lock step all arrive before the first one looks
            with simulate("sm_90", seed=seed), pytest.raises(GlobalMemoryRace):
                two_phases[(BLOCKS,)](rows(), doubled.clone(), BLOCKS, WIDTH, 0, launch_cooperative_grid=True)
            x = rows()
            with simulate("sm_90", seed=seed):
                two_phases[(BLOCKS,)](x, counter(), BLOCKS, WIDTH, 0, launch_cooperative_grid=True)
            assert torch.equal(x[3], BLOCKS * torch.arange(WIDTH, dtype=torch.int32) + 28)
