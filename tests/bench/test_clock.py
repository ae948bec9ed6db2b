"""The clock: its statistics and order, and what it catches."""

import time

import pytest
import torch

from bench.lib.clock import Clock, attempt, measure, peak_memory_mb, summary


class FakeClock:
    """Gives each provider's call a time of its own and writes down who was called."""

    def __init__(self, times):
        self.times, self.order = times, []

    def block(self, make, budget_ms, is_warm):
        name = make()
        self.order.append(name)
        return self.times[name]


def test_providers_take_turns():
    clock = FakeClock({"a": [1.0], "b": [2.0]})
    timings = measure({"a": lambda: "a", "b": lambda: "b"}, "cpu", clock=clock)
    assert clock.order == ["a", "b"] * 5
    assert timings["a"] == {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "status": "ok"}
    assert timings["b"]["median_ms"] == 2.0


def test_percentiles_of_known_times():
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    assert summary([]) == {"median_ms": None, "p20_ms": None, "p80_ms": None}


def test_the_cpu_clock_times_what_is_called_and_not_what_prepares_it():
    def make():
        time.sleep(0.05)
        return lambda: time.sleep(0.004)

    times = Clock("cpu").block(make, budget_ms=20)
    assert 2 <= len(times) <= 5
    assert 4.0 <= sorted(times)[len(times) // 2] < 50.0


@pytest.mark.parametrize(("is_warm", "calls"), [(False, 2), (True, 1)])
def test_a_call_longer_than_the_budget_is_its_own_trial(is_warm, calls):
    made = []
    times = Clock("cpu").block(lambda: lambda: made.append(time.sleep(0.01)), budget_ms=5, is_warm=is_warm)
    assert len(times) == 1
    assert times[0] >= 10.0
    assert len(made) == calls


def test_a_slow_case_gets_two_rounds_and_no_more():
    clock = FakeClock({"a": [1.0]})
    measure({"a": lambda: "a"}, "cpu", clock=clock, limit_s=0.0)
    assert clock.order == ["a", "a"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "python", "cpu allocator"],
)
def test_out_of_memory_is_a_value_and_spares_the_others(error):
    calls = {"greedy": 0, "modest": 0}

    def greedy():
        calls["greedy"] += 1
        if calls["greedy"] > 3:  # the first block passes
            raise error

    def modest():
        calls["modest"] += 1

    timings = measure({"greedy": lambda: greedy, "modest": lambda: modest}, "cpu", quick=True)
    assert timings["greedy"] == {"median_ms": None, "p20_ms": None, "p80_ms": None, "status": "out of memory"}
    assert timings["modest"]["status"] == "ok"
    assert calls["greedy"] == 4


def test_the_cpu_allocator_really_raises_what_counts_as_out_of_memory():
    value, status = attempt(torch.empty, 2**60, 1)
    assert (value, status) == (None, "out of memory")


def test_any_other_error_is_raised():
    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure({"broken": lambda: broken}, "cpu", quick=True)


def test_peak_memory_of_a_cpu_is_not_measured():
    assert peak_memory_mb(lambda: pytest.fail("called"), "cpu") is None


def test_the_gpu_clock_flushes_before_each_call_and_reads_after_all(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            log.append("read")
            return 1.5

    clock = Clock("cpu")
    clock.flush = type("Flush", (), {"zero_": lambda self: log.append("flush")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    assert clock._times_cuda(lambda: log.append("call"), 2) == [1.5, 1.5]
    assert log == ["flush", "record", "call", "record"] * 2 + ["synchronize", "read", "read"]
