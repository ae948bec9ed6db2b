"""Calls in processes of their own: whatever becomes of one of them, the others are answered, and nothing stays."""

import os
import time
from pathlib import Path

import pytest

from bench.lib.processes import NO_TIME, Processes


def outcomes(processes, *whats, seconds=60.0):
    requests = [{"what": what} for what in whats]
    found = {i: (value, status) for i, value, status in processes.map(requests, time.monotonic() + seconds)}
    assert found.keys() == set(range(len(whats)))
    return [found[i] for i in range(len(whats))]


def test_an_exception_a_death_and_a_hang_are_each_the_status_of_one_call(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whats = ("pass", "raise", "pass", "abort", "exit", "hang", "pass")
    with Processes("tests.bench.faulty_stage:compiled", 1, call_s=5.0) as processes:
        first, raised, again, aborted, exited, hung, last = outcomes(processes, *whats)
    assert first[1] == again[1] == last[1] == "ok"
    assert first[0]["interpreted"] == "0"  # the compiler runs even where this process interprets
    assert first[0]["pid"] == again[0]["pid"] != last[0]["pid"]
    assert raised == (None, "error: ZeroDivisionError: of its own making")
    assert aborted == (None, "error: its process ended by signal 6: LLVM ERROR: of its own making")
    assert exited == (None, "error: its process ended by exit code 3: it printed nothing")
    assert hung == (None, "error: stopped after 5 s")


def test_when_the_time_is_up_what_has_not_ended_says_so_and_the_next_calls_are_answered():
    with Processes("tests.bench.faulty_stage:compiled", 2) as processes:
        began = time.monotonic()
        assert outcomes(processes, "hang", "hang", "pass", seconds=1.0) == 3 * [(None, NO_TIME)]
        assert time.monotonic() - began < 30  # and not the 300 s that they would take
        assert [status for _, status in outcomes(processes, "pass", "pass", "pass")] == 3 * ["ok"]
        assert outcomes(processes, "pass", seconds=-1) == [(None, NO_TIME)]
        pids = [worker.process.pid for worker in processes.workers]
    assert len(set(pids)) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids if pid != os.getpid())


def test_a_function_that_cannot_be_imported_is_each_calls_error():
    with Processes("tests.bench.faulty_stage:missing", 1) as processes:
        ((value, status),) = outcomes(processes, "pass")
    assert value is None
    assert status.startswith("error: its process ended by exit code 1: AttributeError: ")


@pytest.mark.parametrize("count", [None, 3])
def test_there_are_as_many_processes_as_cores(monkeypatch, count):
    monkeypatch.setattr("bench.lib.processes._Worker", lambda function: None)
    assert len(Processes("a:b", count).workers) == (count or len(os.sched_getaffinity(0)))
