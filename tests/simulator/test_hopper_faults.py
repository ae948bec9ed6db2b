"""The Gluon attention kernel with faults put in: what only TMA, mbarriers and overlapped WGMMA can do wrong."""

import re

import pytest
import torch
from hopper import long_rows

from kernels.attention import flash_attention
from kernels.simulator import AsyncHazard, BarrierDeadlock, SharedMemoryRace, SimulatorError, simulate
from simulator.replay import recording, same

pytestmark = pytest.mark.simulate

WAIT = r"waitLoop:\s*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"
EXPECT = r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;"
COPY = r"@%p\d+ cp\.async\.bulk[^;]*;"


@pytest.fixture(scope="module")
def launch():
    """Causal attention of 450 queries in bf16: up to four tiles of keys, so that every slot is filled twice."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 450, 64).bfloat16() for _ in range(3))
    with pytest.MonkeyPatch.context() as patch, recording(patch) as run, long_rows(), simulate("sm_90"):
        flash_attention(q, k, v, kernel="hopper")
    return run[0]


@pytest.fixture(scope="module")
def good(launch):
    return launch.run()


def faults(launch, pattern, change=lambda match: ""):
    """What became of each place that matches, changed alone: the error, or what the tensors then hold."""
    return [fault(launch, launch.replaced(match, change(match))) for match in launch.find(pattern)]


def fault(launch, text):
    try:
        return launch.run(text)
    except SimulatorError as error:
        return error


def kinds(found):
    return {type(error) for error in found}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_results_do_not_depend_on_when_warps_run_and_copies_land(launch, good, seed):
    assert same(launch.run(seed=seed), good)


def test_data_used_before_its_phase_has_ended(launch):
    """A wait deleted, in lock step and in a random order; a parity flipped."""
    without = faults(launch, WAIT)
    flipped = faults(launch, r"(mbarrier\.try_wait[^;]*, )(%r\d+);", lambda m: f"xor.b32 %r1, {m[2]}, 1;\n{m[1]}%r1;")
    assert kinds(without) == kinds(flipped) == {AsyncHazard}
    assert len(without) == len(flipped) == 7
    for match in launch.find(WAIT):
        with pytest.raises(AsyncHazard, match=r"without having seen its mbarrier's phase end|still fills"):
            launch.run(launch.without(match), seed=1)


@pytest.mark.parametrize(
    ("pattern", "change", "lacks"),
    [
        (COPY, lambda m: "", r"lacks \d+ bytes"),
        (EXPECT, lambda m: "", r"lacks 1 arrivals, counted \d+ bytes more than expected"),
        (r"(expect_tx[^;]*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) - 16};", "counted 16 bytes more than expected"),
        (r"(expect_tx[^;]*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 16};", "lacks 16 bytes"),
        (r"(mbarrier\.init[^;]*, )1;", lambda m: f"{m[1]}2;", "lacks 1 arrivals"),
    ],
    ids=["no-copy", "no-expectation", "fewer-bytes", "more-bytes", "more-arrivals"],
)
def test_a_wrong_count_is_a_deadlock_that_says_who_waits_for_what(launch, pattern, change, lacks):
    found = faults(launch, pattern, change)
    assert kinds(found) == {BarrierDeadlock}
    for error in found:
        assert re.search(rf"warps 0, 1, 2, 3 wait for parity [01] of the mbarrier at byte \d+, .* {lacks}", str(error))


def test_an_arrival_too_many(launch):
    def twice(match):
        predicate, barrier = re.match(r"(@%p\d+).*(\[%r\d+\])", match[0]).groups()
        return f"{match[0]}\n{predicate} mbarrier.arrive.shared::cta.b64 _, {barrier};"

    found = faults(launch, EXPECT, twice)
    assert kinds(found) == {AsyncHazard}
    assert all("arrives once too often" in str(error) for error in found)


def test_an_mbarrier_that_is_not_there_or_not_fenced(launch):
    found = faults(launch, r"@%p\d+ mbarrier\.init[^;]*;")
    assert kinds(found) == {AsyncHazard}
    assert all("no mbarrier was initialised at byte" in str(error) for error in found)
    (unfenced,) = faults(launch, r"fence\.proxy\.async[^;]*;")
    assert "with no fence.proxy.async between" in str(unfenced)


def test_a_product_that_is_not_waited_for(launch):
    found = faults(launch, r"(wgmma\.wait_group\.sync\.aligned )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};")
    assert kinds(found) == {AsyncHazard}
    assert len(found) == 6


def test_an_operand_in_registers_overwritten_while_its_product_is_in_flight(launch):
    """p(j) made before the wait for p(j-1) v(j-1): right numbers where operands are read at once, luck on hardware."""
    products = launch.find(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16[^{]*\{[^}]*\}, \{(%r\d+)")
    wait = next(m for m in launch.find(r"wgmma\.wait_group\.sync\.aligned 0;") if m.start() > products[0].start())
    with pytest.raises(AsyncHazard, match=f"overwrites {products[0][1]} while the wgmma"):
        launch.run(launch.replaced(wait, f"mov.b32 {products[0][1]}, 0;\n{wait[0]}"))


def last_before(launch, pattern, end, count=1):
    return [m for m in launch.find(pattern) if m.end() < end][-count:]


def without(text, *matches):
    for match in reversed(matches):
        text = text[: match.start()] + text[match.end() :]
    return text


@pytest.mark.parametrize("slot", ["k", "v"])
def test_a_slot_filled_again_before_the_product_that_reads_it_is_waited_for(launch, slot):
    copy = launch.find(COPY)[-2 if slot == "k" else -1]
    (wait,) = last_before(launch, r"wgmma\.wait_group[^;]*;", copy.start())
    late = f"{launch.text[: copy.end()]}\n{wait[0]}{launch.text[copy.end() :]}"
    with pytest.raises(AsyncHazard):
        launch.run(without(late, wait))


@pytest.mark.parametrize("refill", range(5), ids=["half-k", "half-v", "first-k", "k", "v"])
def test_a_slot_filled_again_while_other_warps_may_still_read_it(launch, good, refill):
    """Triton puts a barrier on either side of `expect`. One of the two is enough; without both, the refill races."""
    copy = launch.find(COPY)[-5:][refill]
    first, second = last_before(launch, r"bar\.sync[^;]*;", copy.start(), 2)
    assert same(launch.run(without(launch.text, second)), good)
    with pytest.raises(SharedMemoryRace, match="overwrites what several warps read since the last barrier, `wgmma"):
        launch.run(without(launch.text, first, second))


def test_a_copy_in_flight_at_the_end(launch):
    """The last tile's copy for nobody: its predicate is that of the first."""
    copies, expects = launch.find(COPY), launch.find(EXPECT)
    first, guard = copies[0][0].split()[0], expects[0][0].split()[0]
    last, expect = copies[-1], expects[-1]
    text = launch.replaced(last, last[0].replace(last[0].split()[0], first, 1))
    text = text.replace(expect[0], expect[0].replace(expect[0].split()[0], guard, 1))
    with pytest.raises(AsyncHazard, match=r"the block ended while this copy was in flight|arrives once too often"):
        launch.run(text)


def test_flipped_swizzles(launch, good):
    """The matrix descriptors say another swizzle than the tensor maps."""
    flipped = re.sub(r"(?<=, )-?\d{19}(?=;)", lambda m: str(int(m[0]) % 2**64 ^ (3 << 62)), launch.text)
    assert flipped != launch.text
    assert not same(launch.run(flipped), good)


# The backward kernels, by the same means


@pytest.fixture(scope="module")
def backward():
    """dq, and dk and dv, of 300 queries in bf16: the slots are filled twice."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 1, 300, 64).bfloat16() for _ in range(4))
    with pytest.MonkeyPatch.context() as patch, recording(patch) as run, simulate("sm_90"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(flash_attention(*leaves, kernel="hopper"), leaves, do)
    return {"dq": run[1], "dkdv": run[2]}


both = pytest.mark.parametrize("name", ["dq", "dkdv"])


@both
@pytest.mark.parametrize("seed", [1, 2])
def test_gradients_do_not_depend_on_when_warps_run_and_copies_land(backward, name, seed):
    assert same(backward[name].run(seed=seed), backward[name].run())


@both
def test_each_wait_for_a_copy_is_needed_or_stands_again(backward, name):
    """Of the waits deleted one by one those are missed that only hold instructions back: their phase is long over."""
    launch = backward[name]
    found = [fault(launch, launch.without(match)) for match in launch.find(WAIT)]
    caught = [error for error in found if isinstance(error, AsyncHazard)]
    assert all(isinstance(error, AsyncHazard) or same(error, launch.run()) for error in found)
    # q and do or k and v, the first tile, and one in each form of the loop; two more in each hold.
    loops = 1 if name == "dq" else 2
    assert (len(caught), len(found)) == (2 + loops, 2 + 3 * loops)


@both
def test_a_product_of_the_backward_that_is_not_waited_for(backward, name):
    launch = backward[name]
    found = faults(launch, r"(wgmma\.wait_group\.sync\.aligned )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};")
    missed = [error for error in found if not isinstance(error, AsyncHazard)]
    assert all(same(error, launch.run()) for error in missed)
    loops = 1 if name == "dq" else 2
    assert (len(found), len(missed)) == (3 + 5 * loops, 2 * loops)  # missed: the waits of holds, which repeat one


@both
def test_a_slot_of_the_backward_filled_again_while_it_is_read(backward, name):
    """The last wait of the loop comes after the refill: the product behind the slot may still read it."""
    launch = backward[name]
    copy = launch.find(COPY)[-1]
    (wait,) = last_before(launch, r"wgmma\.wait_group[^;]*;", copy.start())
    late = f"{launch.text[: copy.end()]}\n{wait[0]}{launch.text[copy.end() :]}"
    with pytest.raises(AsyncHazard):
        launch.run(without(late, wait))


@both
def test_a_wrong_count_in_the_backward_is_a_deadlock(backward, name):
    launch = backward[name]
    assert kinds(faults(launch, COPY)) == {BarrierDeadlock}
    assert kinds(faults(launch, EXPECT)) == {BarrierDeadlock}
