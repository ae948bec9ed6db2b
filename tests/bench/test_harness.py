"""The harness: its clock's statistics and order, what it catches, the gate, the record, its errors."""

import json
import os
import stat
import time

import numerics
import pytest
import torch

from bench import harness


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
    timings = harness.measure({"a": lambda: "a", "b": lambda: "b"}, "cpu", clock=clock)
    assert clock.order == ["a", "b"] * 5
    assert timings["a"] == {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "status": "ok"}
    assert timings["b"]["median_ms"] == 2.0


def test_percentiles_of_known_times():
    assert harness.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    assert harness.summary([]) == {"median_ms": None, "p20_ms": None, "p80_ms": None}


def test_the_cpu_clock_times_what_is_called_and_not_what_prepares_it():
    def make():
        time.sleep(0.05)
        return lambda: time.sleep(0.004)

    times = harness.Clock("cpu").block(make, budget_ms=20)
    assert 2 <= len(times) <= 5
    assert 4.0 <= sorted(times)[len(times) // 2] < 50.0


@pytest.mark.parametrize(("is_warm", "calls"), [(False, 2), (True, 1)])
def test_a_call_longer_than_the_budget_is_its_own_trial(is_warm, calls):
    made = []
    times = harness.Clock("cpu").block(lambda: lambda: made.append(time.sleep(0.01)), budget_ms=5, is_warm=is_warm)
    assert len(times) == 1
    assert times[0] >= 10.0
    assert len(made) == calls


def test_a_slow_case_gets_two_rounds_and_no_more():
    clock = FakeClock({"a": [1.0]})
    harness.measure({"a": lambda: "a"}, "cpu", clock=clock, limit_s=0.0)
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

    timings = harness.measure({"greedy": lambda: greedy, "modest": lambda: modest}, "cpu", quick=True)
    assert timings["greedy"] == {"median_ms": None, "p20_ms": None, "p80_ms": None, "status": "out of memory"}
    assert timings["modest"]["status"] == "ok"
    assert calls["greedy"] == 4


def test_the_cpu_allocator_really_raises_what_counts_as_out_of_memory():
    value, status = harness.attempt(torch.empty, 2**60, 1)
    assert (value, status) == (None, "out of memory")


def test_any_other_error_is_raised():
    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        harness.measure({"broken": lambda: broken}, "cpu", quick=True)


def test_the_gate_is_the_rule_of_the_tests():
    for constant in ("FORWARD_FACTOR", "GRADIENT_FACTOR", "FLOOR_ULPS"):
        assert getattr(harness, constant) == getattr(numerics, constant)


@pytest.mark.parametrize("excess", [0.5, 0.999, 1.001, 100.0])
def test_the_gate_decides_as_assert_close_does(excess):
    oracle = torch.linspace(-3, 3, 64, dtype=torch.float64)
    baseline = (oracle + 1e-4).float()
    bound = 2 * numerics.max_error(baseline, oracle) + numerics.floor(torch.float32, oracle)
    actual = oracle.float()
    actual[63] = 3 + excess * bound

    error, status = harness.judge({"o": (actual, baseline, oracle)}, factor=harness.FORWARD_FACTOR)
    assert error == numerics.max_error(actual, oracle)
    if excess < 1:
        assert status == "ok"
        numerics.assert_close(actual, baseline, oracle)
    else:
        assert status.startswith("failed: error of o is")
        with pytest.raises(AssertionError):
            numerics.assert_close(actual, baseline, oracle)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails_the_gate(bad):
    oracle = torch.zeros(4, dtype=torch.float64)
    actual = torch.tensor([0.0, bad, 0.0, 0.0])
    status = (None, "failed: dq holds NaN or infinity")
    assert harness.judge({"dq": (actual, oracle.float(), oracle)}, factor=3.0) == status


def test_the_environment_says_where_a_number_is_from():
    record = harness.environment("cpu", "python bench/x.py --quick")
    assert record["torch"] == torch.__version__
    assert record["device"] == record["cpu"]
    assert record["threads"] == torch.get_num_threads()
    assert record["command"] == "python bench/x.py --quick"
    assert record["date"].endswith("+00:00")
    assert record["commit"] is None or len(record["commit"]) == 40
    json.dumps(record, allow_nan=False)


def test_peak_memory_of_a_cpu_is_not_measured():
    assert harness.peak_memory_mb(lambda: pytest.fail("called"), "cpu") is None


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = harness.save(tmp_path / "x.json", {"device": "d"}, [{"T": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        harness.save(path, {}, [{"T": float("nan")}])
    assert json.loads(path.read_text()) == {"environment": {"device": "d"}, "rows": [{"T": 1}]}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_table_is_aligned_and_says_what_was_not_measured():
    rows = [{"name": "a", "ms": 12.3456, "ok": True}, {"name": "longer", "ms": None, "ok": False}]
    assert harness.table(rows, ("name", "ms", "ok")).splitlines() == [
        "name              ms   ok",
        "------  ------------  ---",
        "a              12.35  yes",
        "longer  not measured   no",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(1.23e-7, "1.2e-07"), (0.0, "0.000"), (12345.6, "12346"), (128, "128"), (0.01234, "0.01234")]
)
def test_cells(value, text):
    assert harness.cell(value) == text


def test_a_directory_that_cannot_be_written_is_found_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(harness.UsageError, match=r"--out .*file/below: Not a directory; a directory that can be"):
        harness.output_directory(tmp_path / "file" / "below")
    with pytest.raises(harness.UsageError, match=r"--out /proc: .*; a directory that can be written is required"):
        harness.output_directory("/proc")  # it is there, and nobody can write to it
    made = harness.output_directory(tmp_path / "a" / "b")
    assert stat.S_ISDIR(made.stat().st_mode)
    assert os.listdir(made) == []


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(harness.UsageError, match="the interpreter is never timed"):
        harness.resolve_device("auto")
    assert harness.resolve_device("cpu") == torch.device("cpu")


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

    clock = harness.Clock("cpu")
    clock.flush = type("Flush", (), {"zero_": lambda self: log.append("flush")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    assert clock._times_cuda(lambda: log.append("call"), 2) == [1.5, 1.5]
    assert log == ["flush", "record", "call", "record"] * 2 + ["synchronize", "read", "read"]
