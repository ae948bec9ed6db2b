"""A visit to a GPU: a stage that fails, hangs or dies is a line and the next begins; what is left when; refusals."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import run_all
from bench.lib import published, report, stages
from bench.lib.record import ROOT, environment_of
from bench.lib.stages import STAGES, Outcome, Stage, Visit, load_outcomes, run, save_outcomes


def faulty(what, limit_s=20.0):
    return Stage(what, f"a stage that will {what}", "tests.bench.faulty_stage", (what,), limit_s)


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def outcomes_of(tmp_path, monkeypatch):
    """Runs stages with little patience: {name: Outcome}."""
    monkeypatch.setattr(stages, "GRACE_S", 0.5)
    monkeypatch.setattr(stages, "LEAST_S", 0.1)

    def outcomes_of(*todo, seconds=60.0):
        outcomes = {}
        run(todo, Visit(tmp_path, time.monotonic() + seconds), outcomes)
        return outcomes

    return outcomes_of


def test_a_stage_that_fails_hangs_or_dies_is_a_line_and_the_next_begins(outcomes_of, tmp_path):
    todo = [faulty("fail"), faulty("hang", 0.75), faulty("deaf", 0.75), faulty("die"), faulty("pass")]
    outcomes = outcomes_of(*todo)
    assert [outcome.status for outcome in outcomes.values()] == [
        "ended with code 1: ZeroDivisionError: of its own making",
        "stopped at its limit of 2 s",
        "stopped at its limit of 2 s",
        "ended with code -11: die begins",
        "ok",
    ]
    # What hung could save what it had; what did not hear is gone as well, with what it had started.
    assert (tmp_path / "hang" / "saved.json").exists()
    for name in ("hang", "deaf"):
        assert not any(map(is_alive, (tmp_path / name / "children").read_text().split()))


def test_a_bench_that_lost_the_gpu_goes_on_in_a_new_process(outcomes_of):
    assert outcomes_of(faulty("lose"))["lose"].status == "ok; begun again 1 times after the GPU was lost"


def test_a_stage_for_which_no_time_is_left_is_not_begun(outcomes_of, tmp_path):
    outcomes = outcomes_of(faulty("hang"), faulty("pass"), seconds=1.5)
    assert outcomes["hang"].status.startswith("stopped at its limit of ")
    assert outcomes["pass"].status == "not begun: no time was left"
    assert not (tmp_path / "pass" / "log.txt").exists() or not (tmp_path / "pass" / "log.txt").read_text()


@pytest.mark.parametrize("minutes", [4, 9])
@pytest.mark.parametrize("takes", [0.5, 1.0, 1.2])
def test_the_stages_are_one_visit_and_each_gets_its_turn(monkeypatch, tmp_path, minutes, takes):
    """Whether stages end early, or take all that they are given and some more."""
    clock = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    visit = Visit(tmp_path, 60 * minutes - run_all.RESERVE_S, share=run_all.share_of(minutes))
    assert sum(stage.limit_s for stage in STAGES) <= 9 * 60 - run_all.RESERVE_S
    for i, stage in enumerate(STAGES):
        limit = visit.limit(stage, STAGES[i + 1 :])
        assert limit >= stages.LEAST_S, (stage.name, clock)
        clock[0] += takes * min(limit, 1.5 * stage.limit_s * visit.share)


VISIT = """
import sys
from bench import run_all
from bench.lib import stages
sys.path.insert(0, "tests/bench")
from test_run_all import faulty
run_all.STAGES = (faulty("pass"), faulty("hang"))
run_all.NAMES = ("pass", "hang")
run_all.PACK_EVERY_S = 0.2
sys.exit(run_all.main(["--rehearse", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_the_visit_what_is_known_lies_there_and_nothing_runs_on(number, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    visit = subprocess.Popen([sys.executable, "-c", VISIT, tmp_path / "out"], cwd=ROOT, env=environment)
    try:
        children = wait_for(lambda: next(iter(tmp_path.glob("gpt2-bench-*/hang/children")), None))
        pids = wait_for(lambda: children.read_text().split())
        wait_for(lambda: "| pass |" in (tmp_path / "out" / "README.md").read_text())
        visit.send_signal(number)
        code = visit.wait(30)
    finally:
        visit.kill()
    assert code == (-9 if number == signal.SIGKILL else 130)
    wait_for(lambda: not any(map(is_alive, pids)))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "everything.tar.gz", "results.json"]
    known = {
        stage["name"]: stage["status"]
        for stage in json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    }
    assert known == {"pass": "ok"} | ({} if number == signal.SIGKILL else {"hang": "stopped by the user"})
    with tarfile.open(tmp_path / "out" / "everything.tar.gz") as archive:
        assert {"stages.json", "pass/log.txt", "hang/log.txt"} <= set(archive.getnames())


def wait_for(condition, seconds=40):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


# Requests that are refused before any work


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda of a machine with one free GPU; its answers can be changed."""
    answers = {"capability": (9, 0), "free": 80 * 2**30}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: answers["capability"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (answers["free"], 80 * 2**30))
    monkeypatch.setattr(run_all, "visit", lambda *_: 0)
    return answers


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        run_all.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("bench/run_all.py: ")
    assert error.count("\n") == 1
    return error.removeprefix("bench/run_all.py: ").strip()


def test_an_unknown_stage(capsys):
    assert refusal(["--only", "everything"], capsys).startswith("argument --only: invalid choice: 'everything' (choose")


@pytest.mark.parametrize("number", ["0", "-1", "nine", "nan"])
def test_no_number_of_minutes(number, capsys):
    message = f"argument --minutes: invalid number of minutes from 0.5 to 600 value: '{number}'"
    assert refusal(["--minutes", number], capsys) == message


def test_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU here" in refusal([], capsys)


def test_a_gpu_that_is_too_old(gpu, capsys):
    gpu["capability"] = (7, 5)
    assert refusal([], capsys) == "a GPU has compute capability 7.5; 8.0 or newer is required"


def test_a_gpu_without_free_memory(gpu, capsys):
    gpu["free"] = 2**30
    assert refusal([], capsys).startswith("1.0 of 80.0 GiB of the GPU's memory are free; 12 are required")


def test_interpreted_kernels(gpu, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "the interpreter is never timed" in refusal([], capsys)


def test_a_directory_that_cannot_be_written(gpu, capsys):
    assert refusal(["--out", "/proc"], capsys).endswith("a directory that can be written is required")


def test_two_directories(gpu, capsys):
    assert "give one of them" in refusal(["--out", "a", "--resume", "b"], capsys)


def test_resuming_nothing(gpu, capsys, tmp_path):
    assert "there is no everything.tar.gz" in refusal(["--resume", str(tmp_path)], capsys)


def test_resuming_what_is_no_archive(gpu, capsys, tmp_path):
    (tmp_path / report.REST).write_bytes(b"not an archive")
    assert "cannot be gone on with" in refusal(["--rehearse", "--resume", str(tmp_path)], capsys)


@pytest.mark.parametrize("key", run_all.SAME)
def test_resuming_what_was_measured_elsewhere(gpu, capsys, tmp_path, key):
    work = tmp_path / "work"
    work.mkdir()
    environment = environment_of("cpu", "")
    environment["device"] = f"rehearsal on {environment['cpu']}: no figure means anything"
    save_outcomes(work / report.STAGES, environment | {key: "another"}, {})
    report.pack(work, tmp_path / report.REST)
    assert f"it is of another {key}: another, not " in refusal(["--rehearse", "--resume", str(tmp_path)], capsys)


def test_a_resumed_visit_takes_the_stages_that_are_missing(tmp_path, monkeypatch):
    outcomes = {stage.name: Outcome(stage.name, stage.what, "") for stage in STAGES}
    for name in ("tests", "lengths"):
        outcomes[name].status = "ok"
    begun = []
    monkeypatch.setattr(run_all, "run", lambda todo, *_: begun.extend(stage.name for stage in todo))
    args = SimpleNamespace(
        only=["tests", "tune"], resume=tmp_path, minutes=9, quick=False, rehearse=True, commit=None, out=tmp_path
    )
    run_all.visit(args, tmp_path, environment_of("cpu", "a command"), outcomes, time.monotonic())
    assert begun == ["tune"]


# The report


def test_the_report_says_what_failed_and_stands_beside_what_is_published(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "lengths").mkdir(parents=True)
    (work / "tests").mkdir()
    out.mkdir()
    shape = {
        "scenario": "lengths",
        "mode": "forward",
        "dtype": "float16",
        "B": 16,
        "H": 12,
        "T": 1024,
        "T_k": 1024,
        "D": 64,
    }
    shape |= {"causal": True, "padding": "none", "valid": 1.0, "dropout_p": 0.0}
    rows = [
        shape
        | {
            "backend": "triton",
            "median_ms": 0.5,
            "tflops": 301.5,
            "status": "ok",
            "graph_note": "not captured: error: X",
        },
        shape | {"backend": "sdpa", "median_ms": None, "tflops": None, "status": "error: RuntimeError: no | way"},
    ]
    data = {"environment": {}, "rows": rows, "failed": [["a case", "error: ValueError: of its own"]]}
    (work / "lengths" / "attention_sweep.json").write_text(json.dumps(data))
    entries = [
        {
            "nodeid": "tests/a.py::test_b",
            "outcome": "failed",
            "report": "def test_b():\n>   assert 1 == 2\nE   assert 1 == 2",
        },
        {"nodeid": "tests/a.py::test_c", "outcome": "passed"},
    ]
    (work / "tests" / "tests.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"nodeid": "half')
    (work / "lengths" / "log.txt").write_text("x" * 2**20 + "the end")
    (work / "tests" / "broken.json").write_text('{"rows": [')
    outcomes = {
        "lengths": Outcome("lengths", "attention", "", "ok", 3.0),
        "tests": Outcome("tests", "tests", "", "tests failed"),
    }
    save_outcomes(work / report.STAGES, {}, outcomes)
    report.write(work, out, environment_of("cpu", "a command"), outcomes)

    text = (out / "README.md").read_text()
    assert "| lengths | attention | ok | 3 | 1 ok, 1 error, 1 cases without rows |" in text
    assert "| tests | tests | tests failed | 0 | 1 failed, 1 passed |" in text
    assert "- `tests/a.py::test_b`: assert 1 == 2" in text
    assert "- lengths/attention_sweep.json: sdpa, forward: error: RuntimeError: no | way" in text
    assert "triton: not captured: error: X" in text
    assert "a case gave no rows: error: ValueError: of its own" in text
    assert "| triton, here (H = 12, float16) | - | 301.5 |" in text
    assert "| FlashAttention-3, H100 SXM [1] | 197 | 265 |" in text
    for n, source in enumerate(dict.fromkeys(row.source for row in published.ATTENTION), 1):
        assert f"\n{n}. {source}" in text
    assert "| forward | 1024 | 0.5000 (302) | error |" in text
    assert len(json.loads((out / "results.json").read_text())["tests"]) == 2

    again = tmp_path / "again"
    again.mkdir()
    report.unpack(out, again)
    assert load_outcomes(again / report.STAGES) == ({}, outcomes)
    log = (again / "lengths" / "log.txt").read_text()
    assert len(log) < 2**19
    assert log.endswith("the end")


def test_each_published_figure_has_its_source_and_all_are_shown():
    assert {row.source for row in (*published.ATTENTION, *published.OTHERS)} == set(published.SOURCES.values())
    for row in published.ATTENTION:
        assert re.search(r"arXiv:\d{4}\.\d{5}, figure \d: ", row.source)
        assert row.gpu.split()[0] in row.source
        assert row.mode.split()[0] in row.source
        assert list(row.tflops) == [512, 1024, 2048, 4096, 8192, 16384]
    shown = report.ceilings(
        {"ceilings/x.json": {"rows": [{"what": "a", "dtype": "b", "size": 1, "value": 1.0, "unit": "c"}]}}
    )
    for figure in published.OTHERS:
        assert f"| {figure.what} | {figure.value:g} | {figure.unit} | {figure.gpu}: {figure.source} |" in shown


def test_the_report_says_what_tuning_chose():
    row = {
        "direction": "dq",
        "dtype": "bfloat16",
        "D": 64,
        "BLOCK_M": 64,
        "BLOCK_N": 32,
        "num_warps": 4,
        "num_stages": 2,
    }
    rows = [
        row | {"chosen": True, "median_ms": 0.25, "status": "ok"},
        row | {"chosen": False, "median_ms": None, "status": "left out: spills 200 bytes a thread, more than 128"},
        row | {"direction": "dkdv", "chosen": False, "median_ms": None, "status": "not reached: the time was up"},
    ]
    text = report.tuning({"tune/tune_attention.json": {"rows": rows}, "lengths/x.json": {"rows": [{}]}})
    assert "| dq | bfloat16, D = 64 | [64, 32, 4, 2] | 0.2500 | 1 ok, 1 left out |" in text
    assert "| dkdv | bfloat16, D = 64 | - | - | 1 not reached |" in text
    assert report.tuning({}) == ""


# The rehearsal


def test_the_whole_visit_is_rehearsed_without_a_gpu(tmp_path):
    """Every stage with the arguments of a visit, on the stand-in: nothing fails, and all fits what may come back."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "bench" / "run_all.py", "--rehearse", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert done.returncode == 0, text[:6000] + done.stderr
    assert "## What failed\n\nNothing.\n" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in results["stages"]] == [(stage.name, "ok") for stage in STAGES]
    rows = {name.split("/")[0]: data["rows"] for name, data in results["results"].items()}
    assert {stage.name for stage in STAGES} - rows.keys() == {"tests"}
    for name, mine in rows.items():
        statuses = {row["status"].split(":")[0] for row in mine}
        assert "ok" in statuses, name
        assert statuses <= {"ok", "not supported"}, name
    assert any(row.get("graph_ms") for row in rows["lengths"])
    assert {entry["outcome"] for entry in results["tests"]} == {"passed"}
    files = list((tmp_path / "out").rglob("*"))
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size < 16 * 2**20 for path in files)


def test_a_chart_that_is_no_longer_among_the_first_leaves(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    environment = environment_of("cpu", "python bench/run_all.py")
    (work / "lengths").mkdir(parents=True)
    out.mkdir()
    for name in ("attention_a", "attention_b", "attention_c", "attention_d"):
        (work / "lengths" / f"{name}.png").write_bytes(b"a chart")
    report.write(work, out, environment, {})
    assert len(list(out.glob("*.png"))) == report.CHARTS == 4
    (work / "lengths" / "attention_packed.png").write_bytes(b"a better one")
    report.write(work, out, environment, {})
    assert {path.stem for path in out.glob("*.png")} == {
        "attention_a",
        "attention_b",
        "attention_c",
        "attention_packed",
    }
