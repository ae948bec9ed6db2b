"""The clock: its statistics and order, what it catches, and what it asks of a GPU."""

import time
from itertools import count

import pytest
import torch

from bench.lib import clock as module
from bench.lib.clock import TIMES, Block, Clock, DeviceLost, attempt, in_words, measure, peak_memory_mb, summary, timing


class FakeClock:
    """Gives each provider's call a time of its own and writes down who was called."""

    def __init__(self, times):
        self.times, self.order = times, []

    def block(self, make, budget_ms, is_warm):
        name = make()
        self.order.append(name)
        return Block(self.times[name])


def test_providers_take_turns():
    clock = FakeClock({"a": [1.0], "b": [2.0]})
    timings = measure({"a": lambda: "a", "b": lambda: "b"}, "cpu", clock=clock)
    assert clock.order == ["a", "b"] * 5
    assert timings["a"] == dict.fromkeys(TIMES) | {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "status": "ok"}
    assert timings["b"]["median_ms"] == 2.0


def test_percentiles_of_known_times():
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    assert summary([]) == {"median_ms": None, "p20_ms": None, "p80_ms": None}


def test_host_times_of_blocks_become_one():
    figures = timing([Block([1.0, 3.0], 10.0, 0.0), Block([2.0], 30.0, 0.5), Block([2.0], 12.0, 0.1)])
    assert figures["median_ms"] == 2.0
    assert figures["host_us"] == 12.0
    assert figures["host_behind"] == pytest.approx(0.2)
    assert tuple(figures) == tuple(timing([])) == TIMES
    assert set(timing([]).values()) == {None}


def test_the_cpu_clock_times_what_is_called_and_not_what_prepares_it():
    def make():
        time.sleep(0.05)
        return lambda: time.sleep(0.004)

    times = Clock("cpu").block(make, budget_ms=20).times
    assert 2 <= len(times) <= 5
    assert 4.0 <= sorted(times)[len(times) // 2] < 50.0


@pytest.mark.parametrize(("is_warm", "calls"), [(False, 2), (True, 1)])
def test_a_call_longer_than_the_budget_is_its_own_trial(is_warm, calls):
    made = []
    block = Clock("cpu").block(lambda: lambda: made.append(time.sleep(0.01)), budget_ms=5, is_warm=is_warm)
    assert len(block.times) == 1
    assert block.times[0] >= 10.0
    assert len(made) == calls


def test_a_slow_case_gets_two_rounds_and_no_more():
    clock = FakeClock({"a": [1.0]})
    measure({"a": lambda: "a"}, "cpu", clock=clock, limit_s=0.0)
    assert clock.order == ["a", "a"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ValueError("\nno such kernel\nand more"), "error: ValueError: no such kernel"),
        (AssertionError(), "error: AssertionError: no message"),
    ],
    ids=["cuda", "python", "cpu allocator", "any error", "without words"],
)
def test_an_error_is_a_status_and_spares_the_others(error, status):
    calls = {"broken": 0, "sound": 0}

    def broken():
        calls["broken"] += 1
        if calls["broken"] > 3:  # the first block passes
            raise error

    def sound():
        calls["sound"] += 1

    timings = measure({"broken": lambda: broken, "sound": lambda: sound}, "cpu", quick=True)
    assert timings["broken"] == dict.fromkeys(TIMES) | {"status": status}
    assert timings["sound"]["status"] == "ok"
    assert calls["broken"] == 4


def test_the_cpu_allocator_really_raises_what_counts_as_out_of_memory():
    assert attempt(torch.empty, 2**60, 1) == (None, "out of memory")


def test_a_user_who_interrupts_is_no_error_of_a_provider():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"a": lambda: interrupted}, "cpu", quick=True)


def test_a_gpu_that_does_not_survive_an_error_ends_the_run_and_names_the_provider(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match="error: RuntimeError: CUDA error: an illegal") as raised:
        measure({"sound": lambda: lambda: None, "broken": lambda: lost}, "cpu", quick=True)
    assert raised.value.provider == "broken"


def test_long_words_are_cut():
    assert len(in_words(RuntimeError("x" * 1000))) < 330


def test_peak_memory_of_a_cpu_is_not_measured():
    assert peak_memory_mb(lambda: pytest.fail("called"), "cpu") is None


class FakeEvents:
    """Stands for torch.cuda's events and spin: writes down what is asked of the device, and in which order."""

    def __init__(self, monkeypatch, passed=False):
        log = self.log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def query(self):
                return passed

            def elapsed_time(self, end):
                log.append("read")
                return 1.5

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("spin", cycles)), raising=False)
        monkeypatch.setattr(module.torch, "sum", lambda x, dim, out: log.append("flush"))

    def clock(self, ahead=True):
        clock = Clock("cpu", ahead)
        clock.device, clock.buffer, clock.sink = torch.device("cuda"), None, None
        return clock


def test_the_gpu_clock_reads_past_l2_before_each_call_and_the_events_after_all(monkeypatch):
    events = FakeEvents(monkeypatch)
    block = events.clock().times(lambda: events.log.append("call"), 2, spin_us=0.0)
    assert block.times == [1.5, 1.5]
    assert block.behind == 0.0
    each = ["flush", "record", "call", "record"]
    assert events.log == ["synchronize", *each, *each, "synchronize", "read", "read"]


def test_the_device_spins_for_as_long_as_the_host_needs(monkeypatch):
    ticks = count(step=100e-6)  # each look at the clock is 100 us after the last
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    events = FakeEvents(monkeypatch)
    block = events.clock().block(lambda: lambda: None, budget_ms=6.0)
    assert block.host_us == pytest.approx(100.0)
    spins = [entry[1] for entry in events.log if isinstance(entry, tuple)]
    assert spins == [int((20 + 125) * module.CYCLES_PER_US)] * 3  # 6 ms at 1.5 and a spin; none in the trials


@pytest.mark.parametrize("ahead", [True, False])
def test_a_call_begun_before_the_host_had_issued_it_is_counted(monkeypatch, ahead):
    events = FakeEvents(monkeypatch, passed=True)
    assert events.clock(ahead).block(lambda: lambda: None, budget_ms=6.0).behind == 1.0
    assert any(isinstance(entry, tuple) for entry in events.log) is ahead


def test_short_calls_are_timed_as_graphs_too_and_one_that_cannot_be_captured_says_why(monkeypatch):
    def captured(make, device):
        if make() == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing")
        return "replay"

    monkeypatch.setattr(module, "captured", captured)
    clock = FakeClock({"short": [0.5], "refuses": [0.5], "long": [5.0], "replay": [0.25]})
    clock.block = lambda make, budget_ms, is_warm=False: Block(clock.times[make()])
    timings = measure({name: lambda name=name: name for name in ("short", "refuses", "long")}, "cuda", clock=clock)
    assert timings["short"]["graph_ms"] == 0.25
    assert timings["refuses"]["graph_ms"] is None
    assert timings["refuses"]["graph_note"].startswith("not captured: error: RuntimeError: operation not permitted")
    assert (timings["refuses"]["status"], timings["refuses"]["median_ms"]) == ("ok", 0.5)
    assert timings["long"]["graph_ms"] is timings["long"]["graph_note"] is None
