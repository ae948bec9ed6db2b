"""kernels/decode/persistent.py: one launch has the bits of five a layer and the choice, and faults in it show.

Simulated on a grid of a few programs: each then has more rows than it holds at a time, or none.
"""

import copy
import re

import pytest
import torch
from lanes import across_lanes
from numerics import assert_close
from test_decode import F16, F32, SPLIT, V, build, by_model, held_cache

from kernels.decode import choose, persistent
from kernels.decode.persistent import COUNTERS
from kernels.simulator import EndlessWait, GlobalMemoryRace, GridTooLarge, SharedMemoryRace, SimulatorError, simulate
from model.generation.fused import FusedStep

BF16 = torch.bfloat16
CAPACITY = 2 * SPLIT


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch, request):
    if "gpu" not in request.node.keywords:
        monkeypatch.setattr(persistent, "PROGRAMS", 2)
        monkeypatch.setattr(persistent, "BYTES", 4)  # of two bytes two groups of rows at a time
    yield
    persistent._launch_step.known.clear()  # a launch is remembered with its grid


class Said:
    """A step of `ids` behind `lengths` tokens, and all that it wrote."""

    def __init__(self, model, ids, lengths, is_persistent, weights="model", steps=1):
        device, B = model.device, len(lengths)
        self.step = FusedStep(model, B, CAPACITY, 1, weights, persistent=is_persistent)
        self.ids = torch.tensor(ids, device=device)[:, None]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.said = torch.full((B, CAPACITY), -7, device=device)
        self.data = held_cache(model, lengths)
        self.logits = torch.full((B, model.config.vocab_size), torch.nan, device=device)
        for _ in range(steps):
            self.step.say(self.ids, self.lengths, self.data, self.logits, self.said)

    def __eq__(self, other):
        pairs = [(getattr(x, name) for x in (self, other)) for name in ("ids", "lengths", "said", "data", "logits")]
        return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def second_step(said):
    """What the second of two steps was given: ids, the cache, lengths."""
    lengths = [length - 1 for length in said.lengths.tolist()]
    return [row[length - 1].item() for row, length in zip(said.said, lengths)], said.data.double(), lengths


@across_lanes(F32, F16, BF16, lanes=("sm_90", "gpu"))
def test_one_launch_has_the_bits_of_five_a_layer(lane, dtype):
    """Rows on both sides of a split, and in an empty cache; the second step reads what the first one chose.

    Down to PTX: on a GPU ptxas may yet join a product and a sum in one kernel and not in the other.
    """
    n_layer = 2 if dtype == F16 else 1
    model, ids, lengths = build(dtype, lane.device, n_embd=64, n_layer=n_layer), [3, 77], [SPLIT - 1, 0]
    one, five = (Said(model, ids, lengths, is_persistent, steps=2) for is_persistent in (True, False))
    if lane.name == "gpu":
        oracle = by_model(copy.deepcopy(model).double(), *second_step(five))[0]
        assert_close(one.logits.to(dtype), five.logits.to(dtype), oracle)
        assert torch.equal(one.said, five.said)
    else:
        assert one == five
    assert one.lengths.tolist() == [SPLIT + 1, 2]
    assert torch.equal(one.ids[:, 0], one.logits.argmax(1))
    assert not one.step.grid.counters.any()


@across_lanes(F16, lanes=("sm_90", "gpu"))
@pytest.mark.parametrize(
    "fields",
    [
        {"n_embd": 260, "n_head": 13, "n_inner": 36, "n_layer": 1},
        {"n_embd": 40, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_widths_of_any_kind(lane, dtype, fields):
    """What is no multiple of 16 is loaded in other pieces than by the five kernels: the last bits may differ."""
    model, ids, lengths = build(dtype, lane.device, **fields), [3], [5]
    data = held_cache(model, lengths)
    baseline = by_model(model, ids, data, lengths)[0]
    oracle = by_model(copy.deepcopy(model).double(), ids, data.double(), lengths)[0]
    assert_close(Said(model, ids, lengths, True).logits.to(dtype), baseline, oracle)


@pytest.mark.simulate
@pytest.mark.parametrize(("arch", "seed", "weights"), [("sm_80", 1, "model"), ("sm_90", 2, "int8")])
def test_no_order_of_programs_and_warps_changes_a_bit(arch, seed, weights):
    model, row = build(F16, "cpu", n_embd=64, n_layer=1), ([9], [SPLIT + 6])
    with simulate(arch):
        expected = Said(model, *row, False, weights)
    with simulate(arch, seed=seed) as gpu:
        assert Said(model, *row, True, weights) == expected
    assert [x.kernel for x in gpu.launches if x.kernel.startswith("_decode_")] == ["_decode_persistent_kernel"]


RELEASE = r"@%p\d+ atom\.global\.gpu\.(?:release|acq_rel)\.add\.u32 (%r\d+), [^;]*;"
WAIT = r"@%p\d+ ld\.global\.gpu\.acquire\.b32 (%r\d+), [^;]*;"


def without_barrier(text, i):
    arrival = list(re.finditer(RELEASE, text))[i]
    barrier = list(re.finditer(r"bar\.sync\s+0;", text[: arrival.start()]))[-1]
    return text[: barrier.start()] + text[barrier.end() :]


def without_wait(text, i):
    """The loads behind the wait may go before it."""
    wait = list(re.finditer(WAIT, text))[i]
    return f"{text[: wait.start()]}mov.u32 {wait[1]}, 0x7fffffff;{text[wait.end() :]}"


def without_arrival(text, i):
    arrival = list(re.finditer(RELEASE, text))[i]
    return f"{text[: arrival.start()]}mov.u32 {arrival[1]}, 0;{text[arrival.end() :]}"


def arriving_twice(text, i):
    arrival = list(re.finditer(RELEASE, text))[i]
    return text[: arrival.end()] + arrival[0] + text[arrival.end() :]


@pytest.fixture(scope="module")
def faulty():
    """faulty(fault, i, ...): the error that the i-th place with this fault raises, or what the step said."""

    def run(fault, i, seed=None, n_layer=1):
        model = build(F16, "cpu", n_embd=64, n_head=1, n_layer=n_layer)

        def plant(text):
            return fault(text, i) if ".entry _decode_persistent_kernel" in text else text

        with simulate("sm_90", seed=seed, transform=plant):
            try:
                return Said(model, [9], [SPLIT + 6], True)
            except SimulatorError as error:
                return type(error)

    return run


@pytest.mark.simulate
class TestPlantedFaults:
    """Five arrivals a layer and the one that counts programs that are done; the last layer's wait is a sixth."""

    def test_a_load_above_its_wait(self, faulty):
        assert [faulty(without_wait, i, n_layer=2) for i in range(6)] == [GlobalMemoryRace] * 6

    def test_a_barrier_deleted_before_a_release(self, faulty):
        """Attention's output is stored by two warps, what the others make by one: as compiled, theirs are redundant."""
        good = faulty(lambda text, i: text, 0)
        found = [faulty(without_barrier, i) for i in range(6)]
        assert found[1] is GlobalMemoryRace
        assert found[5] is SharedMemoryRace
        assert all(said == good for said in (found[0], *found[2:5]))
        assert faulty(without_barrier, 0, seed=1) == good

    def test_an_arrival_left_out(self, faulty, monkeypatch):
        monkeypatch.setattr("kernels.simulator.machine.MOST_TURNS", 2)
        assert [faulty(without_arrival, i) for i in range(5)] == [EndlessWait] * 5

    def test_an_arrival_made_twice(self, faulty):
        """Reported by random schedules; in lock step all programs arrive before the first one looks."""
        assert [faulty(arriving_twice, i, seed=1) for i in (0, 3, 5)] == [GlobalMemoryRace] * 3

    def test_a_grid_that_does_not_fit(self, monkeypatch):
        monkeypatch.setattr(persistent, "PROGRAMS", 5000)
        model = build(F16, "cpu", n_embd=64, n_head=1, n_layer=1)
        with simulate("sm_90"), pytest.raises(GridTooLarge, match=r"grid of 5000 blocks; sm_90 holds \d+ of them"):
            Said(model, [3], [5], True)


@across_lanes()
def test_the_next_id_is_torchs_arg_max(lane):
    """Ties, both zeros, infinities, NaN; and what there is no token for."""
    rows = torch.randn(8, V, generator=torch.Generator().manual_seed(0)).to(lane.device)
    rows[1, [4, 90]] = 7.0
    rows[2] = -rows[2].abs() - 1e-3
    rows[2, 5], rows[2, 9] = -0.0, 0.0
    rows[3, 100] = torch.inf
    rows[4, :] = -torch.inf
    rows[4, 3] = -3e38
    rows[5], rows[6, [7, 50]], rows[7] = -torch.inf, torch.nan, 0.0
    ids, said = torch.full((8, 1), 9, device=lane.device), torch.full((8, 4), -7, device=lane.device)
    lengths = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3], dtype=torch.int32, device=lane.device)
    before = lengths.long()
    choose(rows, ids, lengths, said)
    expected = rows.argmax(1)
    assert expected.tolist()[1:5] == [4, 5, 100, 3]
    expected[5:7] = -1
    assert torch.equal(said[torch.arange(8), before], expected)
    assert said.eq(-7).sum() == 8 * 3
    assert torch.equal(ids[:, 0], expected.clamp(min=0))
    assert torch.equal(lengths.long(), before + 1)
    wide = torch.zeros(2, 20011, device=lane.device)  # several tiles of a row
    wide[0, [18000, 3]], wide[1, 20010] = 1.0, 1.0
    choose(wide, ids[:2], lengths[:2], said[:2])
    assert ids[:2, 0].tolist() == [3, 20010]


def test_the_counters_begin_at_zero():
    model = build(F16, "cpu", n_layer=1, n_embd=32)
    grid = FusedStep(model, 2, CAPACITY, persistent=True).grid
    assert grid.counters.tolist() == [0] * COUNTERS.value
    assert grid.scores.dtype == F32
