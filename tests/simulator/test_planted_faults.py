"""The attention kernels with faults put in: the simulator must see them.

A deleted barrier that is not reported must be redundant: the kernel then gives the same bits in lock step and in random
orders of its warps, with no race in any of them.
"""

import re

import pytest
import torch

from kernels.attention import flash_attention
from kernels.simulator import AsyncHazard, Misaligned, OutOfBounds, SimulatorError, simulate
from simulator.replay import recording, same

CHIPS = ("sm_80", "sm_90")
KERNELS = ("forward", "dq", "dkdv")
CASES = [pytest.param(chip, kernel, id=f"{chip}-{kernel}") for chip in CHIPS for kernel in KERNELS]
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def launches():
    """{(chip, kernel): the recorded launch} of bf16 attention, forward and backward, three ragged tiles of keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 150, 32).bfloat16().requires_grad_() for _ in range(3))
    recorded = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for chip in CHIPS:
            with recording(monkeypatch) as run, simulate(chip):
                flash_attention(q, k, v).backward(torch.randn(1, 1, 150, 32).bfloat16())
            for kernel in KERNELS:
                recorded[chip, kernel] = next(r for r in run if r.kernel == f"_attention_{kernel}_kernel")
    return recorded


def caught(launch, text, good):
    """What became of a faulty text: the error's name, "wrong values", or None."""
    try:
        return None if same(launch.run(text), good) else "wrong values"
    except SimulatorError as error:
        return type(error).__name__


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_each_barrier_is_needed_or_redundant(launches, chip, kernel, record_property):
    launch = launches[chip, kernel]
    good = launch.run()
    barriers = launch.find(r"bar\.sync[^;]*;")
    outcomes = [caught(launch, launch.without(barrier), good) for barrier in barriers]
    record_property("reported", f"{sum(o is not None for o in outcomes)} of {len(outcomes)}")
    assert set(outcomes) <= {"SharedMemoryRace", None}
    assert sum(o is not None for o in outcomes) >= len(outcomes) / 2
    for barrier, outcome in zip(barriers, outcomes):
        if outcome is None:
            for seed in SEEDS:
                assert same(launch.run(launch.without(barrier), seed=seed), good)


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_results_do_not_depend_on_the_order_of_warps(launches, chip, kernel):
    launch = launches[chip, kernel]
    assert same(launch.run(seed=3), launch.run())


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_weakened_waits(launches, chip, kernel):
    """Each wait lets one group more be unfinished. The last one waits for empty groups: nothing is lost."""
    launch = launches[chip, kernel]
    good = launch.run()
    waits = launch.find(r"(cp\.async\.wait_group\s+)(\d+);")
    outcomes = [caught(launch, launch.replaced(w, f"{w[1]}{int(w[2]) + 1};"), good) for w in waits]
    assert outcomes[:-1] == ["AsyncHazard"] * (len(waits) - 1)
    assert len(waits) > 1


@pytest.mark.simulate
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", [r"(wgmma\.wait_group\.sync\.aligned )(\d+);"])
def test_weakened_wgmma_waits(launches, kernel, pattern):
    launch = launches["sm_90", kernel]
    good = launch.run()
    waits = launch.find(pattern)
    outcomes = [caught(launch, launch.replaced(w, f"{w[1]}{int(w[2]) + 1};"), good) for w in waits]
    assert set(outcomes) <= {"AsyncHazard", None}
    assert outcomes.count("AsyncHazard") >= 0.8 * len(outcomes)


@pytest.mark.simulate
@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_fences(launches, kernel):
    """No proxy fence at all, then no wgmma.fence at all. Single ones may be redundant: others cover for them."""
    launch = launches["sm_90", kernel]
    for pattern in (r"fence\.proxy\.async[^;]*;", r"wgmma\.fence[^;]*;"):
        with pytest.raises(AsyncHazard, match="fence"):
            launch.run(re.sub(pattern, "", launch.text))


# wgmma.fence deleted one at a time: how many of how many are reported. Others cover for the rest.
SINGLE_FENCES = {"forward": (4, 4), "dq": (2, 6), "dkdv": (2, 8)}


@pytest.mark.simulate
@pytest.mark.parametrize("kernel", KERNELS)
def test_single_missing_fences(launches, kernel):
    launch = launches["sm_90", kernel]
    good = launch.run()
    fences = launch.find(r"wgmma\.fence[^;]*;")
    outcomes = [caught(launch, launch.without(fence), good) for fence in fences]
    assert set(outcomes) <= {"AsyncHazard", None}
    assert (outcomes.count("AsyncHazard"), len(outcomes)) >= SINGLE_FENCES[kernel]


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_flipped_swizzles(launches, chip, kernel):
    """Where tiles are written to, or where the tensor cores read them from, with the swizzle's XOR changed."""
    launch = launches[chip, kernel]
    good = launch.run()
    if chip == "sm_90":  # the swizzle's width stands in bits 62 and 63 of the matrix descriptors
        flipped = re.sub(r"(?<=, )-?\d{19}(?=;)", lambda m: str(int(m[0]) % 2**64 ^ (3 << 62)), launch.text)
    else:  # the first XOR of an address that a copy or a store then uses
        target = next(
            m for m in launch.find(r"xor\.b32 \t(%r\d+), (%r\d+), (%r\d+);")
            if re.search(rf"add\.s32 \t%r\d+, %r\d+, {m[1]};", launch.text)
        )  # fmt: skip
        flipped = launch.replaced(target, target[0].replace("xor", "or"))
    assert flipped != launch.text
    assert caught(launch, flipped, good) is not None


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_dropped_masks(launches, chip, kernel):
    """All global loads and stores without their predicates: the ragged end is left."""
    launch = launches[chip, kernel]
    with pytest.raises(OutOfBounds, match="past the end of"):
        launch.run(re.sub(r"@%p\d+ (?=(ld|st)\.global)", "", launch.text))


@pytest.mark.simulate
@pytest.mark.parametrize(("chip", "kernel"), CASES)
def test_false_alignment_hints(launches, chip, kernel):
    """Compiled for 16-byte aligned tensors, run with one that begins two bytes later."""
    launch = launches[chip, kernel]
    with pytest.raises(Misaligned, match="misaligned 16-byte access to global memory"):
        launch.run(shift={"q_ptr": 2})
