"""Tuning: what is tried, what is left out and why, what is chosen, and that the table's file keeps all else."""

import argparse
import copy
import json
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from shutil import copy as copy_file
from types import SimpleNamespace

import pytest
import torch
from optional import needs
from triton.backends.compiler import GPUTarget

from bench import tune
from bench.lib.clock import Block, DeviceLost
from bench.lib.compile_only import compile_only
from bench.lib.processes import NO_TIME, Processes
from bench.lib.record import Record, sources
from bench.lib.rewriting import rewritten, with_notes
from kernels import configs
from kernels.configs import ATTENTION, AttentionConfig
from kernels.simulator import simulate

PRESENT = AttentionConfig(128, 64, 4, 3)
OTHER = AttentionConfig(64, 64, 4, 2)
ROOT = Path(tune.__file__).parents[1]


def timing(median, p80=None):
    return {"median_ms": median, "p20_ms": median, "p80_ms": median if p80 is None else p80, "status": "ok"}


NOTHING = {"median_ms": None, "p20_ms": None, "p80_ms": None, "status": "out of memory"}


# The choice


@pytest.mark.parametrize(
    ("timings", "chosen"),
    [
        ({PRESENT: timing(1.0), OTHER: timing(0.9)}, OTHER),
        ({PRESENT: timing(1.0), OTHER: timing(0.99)}, PRESENT),
        ({PRESENT: timing(1.0), OTHER: timing(0.9, p80=1.1)}, PRESENT),
        ({PRESENT: timing(1.0), OTHER: timing(1.5)}, PRESENT),
        ({PRESENT: NOTHING, OTHER: timing(1.5)}, OTHER),
        ({OTHER: timing(1.5)}, OTHER),
        ({PRESENT: timing(1.0), OTHER: NOTHING}, PRESENT),
        ({PRESENT: NOTHING}, PRESENT),
        ({}, PRESENT),
    ],
    ids=["faster", "within the margin", "noisy", "slower", "no room for the present one", "the present one is out"]
    + ["no room for the other", "no room", "nothing"],
)
def test_the_present_shape_gives_way_to_what_is_clearly_faster(timings, chosen):
    assert tune.choose(PRESENT, timings) == chosen


@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_are_a_grid_with_the_nearest_to_the_present_shape_first(itemsize):
    present = AttentionConfig(48, 64, 4, 3)
    tried = tune.candidates(present, itemsize)
    assert tried[0] == present
    assert len(set(tried)) == len(tried) == 1 + 3 * 3 * 2 * 4
    assert all(c.BLOCK_N % 16 == 0 and c.BLOCK_M % 16 == 0 for c in tried)
    distances = [sum(a != b for a, b in zip(astuple(c), astuple(present))) for c in tried]
    assert distances == sorted(distances)
    near = tune.candidates(PRESENT, itemsize, quick=True)
    assert near[0] == PRESENT
    assert len(near) < 10


# The model


def test_accumulators_are_those_of_the_kernels():
    config = AttentionConfig(128, 64, 4, 3)
    assert tune.accumulators("forward", config, 64) == (128 * 64 + 128 * 64) // 128  # acc, s
    assert tune.accumulators("dq", config, 64) == (128 * 64 + 2 * 128 * 64) // 128  # dq, s, dp
    assert tune.accumulators("dkdv", config, 64) == (2 * 64 * 64 + 2 * 128 * 64) // 128  # dk, dv, s, dp


def test_the_model_leaves_out_what_cannot_fit():
    H100 = 227 * 1024
    registers = "left out: 384 registers a thread for its accumulators alone, of 255"
    assert tune.modelled("dkdv", AttentionConfig(128, 128, 4, 1), 64, 2, H100) == registers
    shared = "left out: 393216 bytes of tiles in flight, of 232448 of shared memory"
    assert tune.modelled("forward", AttentionConfig(64, 128, 8, 4), 256, 2, H100) == shared
    assert tune.modelled("forward", AttentionConfig(64, 128, 8, 4), 64, 2, H100) is None
    assert tune.modelled("forward", AttentionConfig(16, 64, 4, 4), 256, 4, 99 * 1024) is None  # fp32


# What an H100 measured of shapes that Triton 3.7.1 compiled for it: us at T = 2048 (D = 256, 64) or 4096 (128), from
# bench/results/nvidia-h100-80gb-hbm3/second_visit, bytes spilled and instructions per score.
MEASURED = {
    ("dkdv", 64): [(260.5, 0, 12.38), (268.2, 0, 9.78), (287.0, 0, 9.5), (341.9, 0, 12.44), (343.1, 0, 9.47)]
    + [(449.9, 376, 11.33), (472.4, 440, 10.8), (627.7, 0, 19.5), (650.1, 88, 18.31)],
    ("dkdv", 128): [(412.7, 96, 12.84), (443.8, 16, 11.69), (468.7, 0, 15.38), (829.3, 0, 25.31), (1001.6, 0, 33.56)],
    ("dq", 128): [(300.7, 0, 9.69), (320.3, 0, 12.12), (351.3, 0, 9.16), (497.1, 0, 12.94), (704.0, 0, 21.31)],
    ("dq", 256): [(278.9, 32, 18.0), (440.1, 512, 39.56), (461.5, 0, 52.25)],
    ("dkdv", 256): [(516.3, 40, 64.38), (720.9, 0, 53.75), (754.4, 832, 62.62), (947.5, 0, 79.0)],
    ("forward", 128): [(233.8, 0, 10.34), (243.0, 0, 10.47), (263.1, 0, 10.94), (266.1, 0, 8.06), (289.7, 0, 10.72)]
    + [(346.8, 16, 8.62)],
    ("forward", 256): [(154.9, 0, 14.31), (183.4, 0, 23.88), (205.7, 104, 14.19), (292.8, 0, 31.0)],
}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0]} {row[1]}")
def test_what_the_compiler_says_leaves_out_nothing_that_was_fast(row):
    rows = [
        {"us": us, "spilled_bytes": spilled, "instructions_per_score": per_score, "status": "ok"}
        for us, spilled, per_score in MEASURED[row]
    ]
    tune.leave_out_compiled(rows)
    assert rows[0]["status"] == "ok"
    assert all(row["us"] > 1.4 * rows[0]["us"] for row in rows if row["status"] != "ok")


def test_small_spills_stay_and_large_ones_go():
    rows = [{"spilled_bytes": n, "instructions_per_score": 9.0, "status": "ok"} for n in (0, 128, 132)]
    rows += [{"spilled_bytes": None, "instructions_per_score": None, "status": "ok"}]  # a chip that is not NVIDIA's
    tune.leave_out_compiled(rows)
    assert [row["status"] for row in rows] == ["ok", "ok", "left out: spills 132 bytes a thread, more than 128", "ok"]


# The sieves, on a device on which everything is known


class FakeTrial:
    dtype, head_dim, itemsize, device = "bfloat16", 64, 2, torch.device("cpu")

    def __init__(self, statuses=None):
        self.statuses, self.used, self.checked = statuses or {}, PRESENT, []

    def present(self, direction):
        return self.used

    def use(self, direction, config):
        self.used = config

    def request(self, direction, config, target, shared_memory):
        return config

    def check(self, direction, config, provider):
        self.checked.append(config)
        status = self.statuses.get(config, "ok")
        if isinstance(status, BaseException):
            raise status
        return 0.001, status

    def make(self, direction, config):
        self.used = config
        return config


class FakeClock:
    def __init__(self, times):
        self.times, self.blocks = times, []

    def block(self, make, budget_ms, is_warm=False):
        config = make()
        self.blocks.append((config, budget_ms))
        time = self.times(config)
        if isinstance(time, Exception):
            raise time
        return Block([time])


class FakeProcesses:
    """Compiles in no time; some cannot be compiled."""

    def __init__(self, errors=None):
        self.errors, self.compiled = errors or {}, []

    def map(self, requests, until):
        made = {"registers": 1, "spilled_bytes": 0, "shared_bytes": 1, "instructions_per_score": 9.0}
        for i, config in enumerate(requests):
            self.compiled.append(config)
            yield i, *((None, self.errors[config]) if config in self.errors else (made, "ok"))


FAST, WRONG, BROKEN = AttentionConfig(64, 128, 8, 2), AttentionConfig(64, 64, 8, 4), AttentionConfig(64, 64, 4, 4)
SLOW = FakeClock(lambda config: {FAST: 1.0, PRESENT: 2.0}.get(config, 3.0 + config.num_stages)).times


@pytest.fixture
def tuning_of(monkeypatch):
    monkeypatch.setattr(tune, "active_arch", lambda: 90)
    monkeypatch.setattr(tune, "chip_at_hand", lambda: (("cuda", 90, 32), 227 * 1024))

    def tuning_of(trial, rows=None, seconds=60.0, clock=None, **options):
        clock, rows = clock or FakeClock(SLOW), {} if rows is None else rows
        options = {"save": lambda: None} | options
        return tune.Tuning(trial, "forward", rows, until=time.monotonic() + seconds, clock=clock, **options)

    return tuning_of


def test_a_row_goes_through_the_sieves_and_half_of_it_through_each_round(tuning_of):
    trial = FakeTrial({WRONG: "failed: error of o is 1.0e+00, allowed 1.0e-03"})
    processes = FakeProcesses({BROKEN: "error: OutOfResources: out of resource: shared memory"})
    clock = FakeClock(SLOW)
    tuning = tuning_of(trial, clock=clock)
    assert tuning.run(processes) == FAST
    assert trial.used == PRESENT  # the caller decides
    rows = tuning.rows
    assert [c for c, row in rows.items() if row["chosen"]] == [FAST]
    assert len(processes.compiled) == len(set(processes.compiled)) == len(rows)  # at this head dim all may fit
    assert rows[BROKEN]["status"] == "left out: error: OutOfResources: out of resource: shared memory"
    assert BROKEN not in trial.checked
    assert rows[WRONG]["status"].startswith("failed: error of o")
    assert rows[WRONG]["median_ms"] is None
    in_round = {ms: {c for c, budget in clock.blocks if budget == ms} for ms in (4.0, 8.0, 16.0, 32.0, 64.0, 60.0)}
    assert in_round[4.0] == rows.keys() - {WRONG, BROKEN}
    assert list(map(len, in_round.values())) == [70, 35, 17, 8, 4, 4]
    assert {FAST, PRESENT} <= in_round[60.0]  # thoroughly


def test_a_row_of_which_nothing_runs_keeps_its_shape(tuning_of):
    words = "left out: error: its process ended by signal 6: LLVM ERROR: of its own making"
    processes = FakeProcesses(dict.fromkeys(tune.candidates(PRESENT, 2), words.removeprefix("left out: ")))
    tuning = tuning_of(FakeTrial(), clock=FakeClock(lambda config: pytest.fail("timed")))
    assert tuning.run(processes) == PRESENT
    assert {row["status"] for row in tuning.rows.values()} == {words}


def test_an_error_of_the_clock_is_the_candidates_own(tuning_of):
    error = RuntimeError("CUDA error: an illegal instruction")
    clock = FakeClock(lambda config: error if config == OTHER else SLOW(config))
    tuning = tuning_of(FakeTrial(), clock=clock)
    assert tuning.run(FakeProcesses()) == FAST
    assert tuning.rows[OTHER]["status"] == "left out: error: RuntimeError: CUDA error: an illegal instruction"


@pytest.mark.parametrize("at", ["compiling", "checking", "timing"])
def test_a_row_keeps_to_its_time(tuning_of, monkeypatch, at):
    """The clock of the machine jumps to the end in one of the sieves: what was not reached says so."""
    now, begun = time.monotonic(), []
    monkeypatch.setattr(tune.time, "monotonic", lambda: now + (100 if len(begun) > 3 else 0))

    class Trial(FakeTrial):
        def check(self, direction, config, provider):
            begun.extend([config] if at == "checking" else [])
            return super().check(direction, config, provider)

    def timed(config):
        begun.extend([config] if at == "timing" else [])
        return SLOW(config)

    class Processes(FakeProcesses):
        def map(self, requests, until):
            for i, value, status in super().map(requests, until):
                begun.extend([i] if at == "compiling" else [])
                yield i, value, status if tune.time.monotonic() < until else NO_TIME

    clock = FakeClock(timed)
    tuning = tuning_of(Trial(), clock=clock)
    chosen = tuning.run(Processes())
    statuses = [row["status"] for row in tuning.rows.values()]
    if at == "timing":
        assert len(clock.blocks) == statuses.count("ok") == 4
        assert statuses.count(tune.NOT_REACHED) == len(statuses) - 4
        assert tuning.rows[chosen]["median_ms"] is not None
    else:
        assert clock.blocks == []
        assert chosen == PRESENT
        assert {NO_TIME, tune.NOT_REACHED} >= set(statuses)


def test_what_a_killed_run_was_at_is_left_out_and_the_rest_goes_on(tuning_of):
    """The file as it stands while a candidate is checked, taken up by a second run."""
    files, rows = [], {}
    tuning = tuning_of(FakeTrial(), rows, save=lambda: files.append(copy.deepcopy(rows)))
    tuning.run(FakeProcesses())
    killed = next(
        file
        for file in files
        if [r["status"] for r in file.values()].count(tune.RUNNING) and file[OTHER]["status"] == tune.RUNNING
    )
    trial, processes = FakeTrial(), FakeProcesses()
    tuning = tuning_of(trial, copy.deepcopy(killed))
    assert tuning.run(processes) == FAST
    assert processes.compiled == []  # that lies on disk
    assert tuning.rows[OTHER]["status"] == tune.RUNNING
    assert set(trial.checked) == tuning.rows.keys() - {OTHER}


def test_ctrl_c_blames_no_candidate(tuning_of):
    rows = {}
    with pytest.raises(KeyboardInterrupt):
        tuning_of(FakeTrial({OTHER: KeyboardInterrupt()}), rows).run(FakeProcesses())
    assert rows[OTHER]["status"] == tune.NOT_REACHED


def test_what_took_the_gpu_with_it_is_not_run_again(tuning_of):
    words = "error: AcceleratorError: CUDA error: unspecified launch failure"
    lost = FakeTrial({OTHER: DeviceLost(words, str(OTHER))})
    with pytest.raises(DeviceLost):
        tuning_of(lost).run(FakeProcesses())
    trial = FakeTrial()
    tuning = tuning_of(trial, lost=lambda config: words if config == OTHER else None)
    assert tuning.run(FakeProcesses()) == FAST
    assert tuning.rows[OTHER]["status"] == words
    assert OTHER not in trial.checked


# A trial on a simulated chip


@pytest.fixture
def trial(monkeypatch):
    for name, value in {"TOKENS": 32, "WIDTH": 16, "ODD_T": 19}.items():
        monkeypatch.setattr(tune, name, value)
    with simulate("sm_80"):
        rows = dict(ATTENTION["sm_80"])
        yield tune.Trial(torch.device("cpu"), "bfloat16", 64, 32)
    assert ATTENTION["sm_80"] == rows


@pytest.mark.simulate
def test_a_trial_runs_the_kernel_with_the_candidates_tiles(trial, monkeypatch):
    seen, real = [], tune.check
    monkeypatch.setattr(tune, "check", lambda *arguments: seen.append(trial.present("forward")) or real(*arguments))
    config = AttentionConfig(16, 16, 4, 1)
    error, status = trial.check("forward", config)
    assert (status, seen) == ("ok", [config, config])  # at both shapes
    assert 0 < error < 0.05
    assert trial.present("forward") == ATTENTION["sm_80"]["forward", 2][64] != config


@pytest.mark.simulate
@pytest.mark.parametrize(("T", "row"), [(32, "short forward"), (1056, "forward")])
def test_a_trial_tunes_the_row_that_serves_its_length(T, row, monkeypatch):
    for name, value in {"TOKENS": T, "WIDTH": 16, "ODD_T": 19}.items():
        monkeypatch.setattr(tune, name, value)
    before = dict(ATTENTION["sm_90"])
    with simulate("sm_90"):
        trial = tune.Trial(torch.device("cpu"), "bfloat16", 64, T)
        assert trial.key("forward") == (row, 2)
        assert trial.present("forward") == before[row, 2][64]
        trial.use("forward", AttentionConfig(16, 16, 4, 1))
        assert trial.present("forward") == AttentionConfig(16, 16, 4, 1)
        trial.use("forward", before[row, 2][64])
    assert ATTENTION["sm_90"] == before


@pytest.mark.simulate
def test_a_trial_says_why_a_candidate_is_left_out(trial, monkeypatch):
    present = trial.present("forward")
    _, status = trial.check("forward", AttentionConfig(64, 128, 8, 8))
    assert status.startswith("left out: error: OutOfResources: out of resource: shared memory, Required: ")

    monkeypatch.setattr(tune, "check", lambda *_: (0.5, "failed: error of o is 5.0e-01, allowed 1.0e-02"))
    assert trial.check("forward", present) == (0.5, "failed: error of o is 5.0e-01, allowed 1.0e-02")
    assert trial.present("forward") == present


# Compiling in processes of their own


@pytest.mark.compile
def test_what_the_processes_compile_is_what_a_call_then_finds_on_disk(tmp_path, monkeypatch):
    """Each candidate is compiled once, and both gates, at the timed length and at the other, take what was compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, value in {"TOKENS": 48, "WIDTH": 128, "ODD_T": 80}.items():
        monkeypatch.setattr(tune, name, value)
    target = GPUTarget("cuda", 90, 32)
    monkeypatch.setitem(ATTENTION["sm_90"], ("short forward", 2), {64: PRESENT})
    with compile_only(target, 227 * 1024), monkeypatch.context() as patch:
        patch.setattr(
            tune, "gates", lambda case, inputs, names: {tune.OURS: SimpleNamespace(options=case.options("cpu"))}
        )
        trial = tune.Trial(torch.device("cpu"), "bfloat16", 64, 48)
        large = AttentionConfig(64, 64, 4, 4)
        requests = [trial.request("forward", c, ("cuda", 90, 32), 50_000) for c in (OTHER, large)]
        with Processes("bench.tune:compiled", 1) as processes:
            made = [outcome for _, *outcome in processes.map(requests, time.monotonic() + 60)]
        before = sorted(tmp_path.rglob("*.cubin"))
        trial.use("forward", OTHER)
        for inputs, _ in trial.gates:
            tune.make_call("forward", tune.OURS, inputs, {"causal": True})()
    assert len(before) == 2
    assert sorted(tmp_path.rglob("*.cubin")) == before
    values, status = made[0]
    assert status == "ok"
    assert values["shared_bytes"] == 64 * 64 * 2 + 2 * 2 * 64 * 64 * 2  # q, and k and v of two stages
    assert 100 <= values["registers"] <= 160
    assert values["spilled_bytes"] <= 128
    assert 7 < values["instructions_per_score"] < 12
    assert made[1][1].startswith("error: OutOfResources: out of resource: shared memory, Required: 73728, Hardware")


# The table's file


def table_of(source):
    namespace = {"__name__": "a copy of kernels.configs"}
    exec(source, namespace)
    return {
        family: {key: {limit: tuple(vars(c).values()) for limit, c in row.items()} for key, row in rows.items()}
        for family, rows in namespace["ATTENTION"].items()
    }


SOURCE = Path(configs.__file__).read_text()


@pytest.mark.parametrize(
    ("family", "key", "limit"),
    [("sm_90", ("forward", 2), 64), ("sm_80", ("dkdv", 2), 256), ("sm_90", ("dq", 4), 128), ("gfx942", ("dq", 4), 64)],
    ids=["a row", "its last head dim", "a row that families share", "of another maker"],
)
def test_one_row_of_one_family_changes(family, key, limit):
    new = AttentionConfig(16, 128, 8, 4)
    expected = table_of(SOURCE)
    expected[family][key] = expected[family][key] | {limit: (16, 128, 8, 4)}
    source = rewritten(SOURCE, family, key, {limit: new}, "NVIDIA H100 80GB HBM3, bfloat16, T = 2048")
    assert table_of(source) == expected
    assert with_notes(source, family, key)[0].strip() == f"# D = {limit}: NVIDIA H100 80GB HBM3, bfloat16, T = 2048"
    before, after = SOURCE.splitlines(), source.splitlines()
    assert len(set(after) - set(before)) == 2  # the note and the row
    assert len(set(before) - set(after)) <= 1


def test_a_note_is_replaced_and_the_others_stay():
    key = "forward", 2
    source = rewritten(SOURCE, "sm_90", key, {64: PRESENT, 128: OTHER}, "an H100, yesterday")
    source = rewritten(source, "sm_90", key, {128: PRESENT}, "an H200, today")
    *notes, row = (line.strip() for line in with_notes(source, "sm_90", key))
    assert notes == ["# D = 64: an H100, yesterday", "# D = 128: an H200, today"]
    assert row.startswith('("forward", 2): {64: C(')
    assert "128: C(128, 64, 4, 3)" in row
    assert rewritten(source, "sm_90", key, {128: PRESENT}, "an H200, today") == source


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    """A copy of the table's file in its place."""
    file = Path(copy_file(configs.__file__, tmp_path / "configs.py"))
    monkeypatch.setattr(configs, "__file__", str(file))
    monkeypatch.setattr(tune, "active_arch", lambda: 90)
    return file


ENVIRONMENT = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "date": "2026-03-01T10:00:00+00:00"}


class Keyed:
    def __init__(self, dtype, head_dim, itemsize):
        self.dtype, self.head_dim, self.itemsize = dtype, head_dim, itemsize

    def key(self, direction):
        return direction, self.itemsize


@needs("ruff")
def test_what_was_chosen_is_written_at_once_as_ruff_wants_it(table_file, capsys):
    args, environment = argparse.Namespace(seq_len=2048, dry_run=False), dict(ENVIRONMENT)
    tune.decided(args, environment, Keyed("bfloat16", 64, 2), "forward", OTHER)
    first = environment["sources"]
    assert first == sources()  # of the code as it is now: --resume goes on
    for head_dim in (64, 128):
        tune.decided(args, environment, Keyed("float32", head_dim, 4), "dq", OTHER)
    source = table_file.read_text()
    assert "# D = 64: NVIDIA H100 80GB HBM3, bfloat16, T = 2048, triton 3.7.1, 2026-03-01\n" in source
    assert "# D = 128: NVIDIA H100 80GB HBM3, float32, T = 2048, triton 3.7.1, 2026-03-01\n" in source
    table = table_of(source)
    assert table["sm_90"]["forward", 2][64] == (64, 64, 4, 2)
    assert table["sm_90"]["dq", 4] == table_of(SOURCE)["sm_90"]["dq", 4] | dict.fromkeys((64, 128), (64, 64, 4, 2))
    assert table["sm_80"] == table_of(SOURCE)["sm_80"]
    for tool in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *tool, "--config", ROOT / "pyproject.toml", table_file]
        subprocess.run(command, check=True)
    assert capsys.readouterr().out == 3 * f"wrote {table_file}\n"


def test_a_dry_run_prints_the_rows_and_leaves_the_file(table_file, capsys):
    args = argparse.Namespace(seq_len=2048, dry_run=True)
    for direction in ("forward", "dq"):
        tune.decided(args, dict(ENVIRONMENT), Keyed("bfloat16", 64, 2), direction, OTHER)
    assert table_file.read_text() == SOURCE
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("{")[0].strip() for line in printed if line.strip().startswith("(")] == [
        '("forward", 2):',
        '("dq", 2):',
    ]


def test_each_direction_is_tuned_with_what_was_chosen_before_also_by_a_run_that_goes_on(monkeypatch, tmp_path):
    """tune_all() passes the winners on, decides each at once, and takes those of an earlier run from its file."""
    in_use, order, decisions = {}, [], []

    class Recording(FakeTrial):
        def __init__(self, device, dtype, head_dim, seq_len):
            self.dtype, self.head_dim, self.itemsize = dtype, head_dim, 2

        def use(self, direction, config):
            in_use[direction] = config

    class Fake:
        def __init__(self, trial, direction, rows, **_):
            self.trial, self.direction, self.rows = trial, direction, rows

        def run(self, processes):
            order.append((self.trial.head_dim, self.direction, dict(in_use)))
            if len(order) == 5:
                raise KeyboardInterrupt
            chosen = replace(PRESENT, num_stages=self.trial.head_dim)
            entry = {"dtype": self.trial.dtype, "D": self.trial.head_dim, "direction": self.direction, "chosen": True}
            self.rows[chosen] = dict.fromkeys(tune.COLUMNS) | entry | vars(chosen) | {"status": "ok"}
            return chosen

    monkeypatch.setattr(tune, "Trial", Recording)
    monkeypatch.setattr(tune, "Tuning", Fake)
    path = tmp_path / "tune_attention.json"

    def run(earlier):
        args = argparse.Namespace(device="cuda", dtype=["bfloat16"], head_dims=[128, 64], seq_len=8, quick=True)
        args.__dict__ |= {"path": path, "environment": {}, "earlier": earlier, "no_charts": True, "minutes": 1.0}
        decide = lambda trial, direction, config: decisions.append((trial.head_dim, direction, config))  # noqa: E731
        with Record(args, columns=tune.COLUMNS, charts=False) as record:
            tune.tune_all(args, record, None, None, decide)

    with pytest.raises(SystemExit, match="130"):
        run(None)
    first, second = (replace(PRESENT, num_stages=D) for D in (64, 128))
    assert order[:3] == [
        (64, "forward", {}),
        (64, "dq", {"forward": first}),
        (64, "dkdv", {"forward": first, "dq": first}),
    ]
    left = json.loads(path.read_text())
    assert left["done"] == [
        f"bfloat16, D = {D}, {name}" for D, name in [(64, n) for n in tune.DIRECTIONS] + [(128, "forward")]
    ]
    in_use.clear()
    del order[:4]  # and the one that was interrupted stays, so that the fifth is not met again
    run(left)
    assert order[1:] == [(128, "dq", {"forward": second}), (128, "dkdv", {"forward": second, "dq": second})]
    assert decisions == [(D, name, c) for D, c in ((64, first), (128, second)) for name in tune.DIRECTIONS]
    assert len(json.loads(path.read_text())["rows"]) == 6


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda", "--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)"),
        ("", "--device cpu: tile shapes are chosen by times on a GPU; --device cuda is required"),
        ("--op gelu", "argument --op: invalid choice: 'gelu'"),
        ("--minutes 0", "argument --minutes: invalid number of minutes, at most 60, value: '0'"),
    ],
)
def test_without_a_gpu_it_says_so_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        tune.main(arguments.split())
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench/tune.py: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": ["float16", "bfloat16"]}, "they share their rows of the table; give one of them"),
        ({"dtype": ["float16"], "file": "/proc/version"}, "/proc/version cannot be written; --dry-run prints the rows"),
    ],
)
def test_requests_that_a_gpu_does_not_help(changes, message, monkeypatch):
    monkeypatch.setattr(tune, "refusal", lambda *_: None)
    monkeypatch.setattr(tune.os, "access", lambda path, mode: False)
    monkeypatch.setattr(configs, "__file__", changes.pop("file", configs.__file__))
    args = argparse.Namespace(device=torch.device("cuda"), head_dims=[64], dry_run=False, **changes)
    with pytest.raises(tune.UsageError, match=message):
        tune.complete(args)


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu(tmp_path, capsys):
    tune.main(["--device", "cuda", "--quick", "--dry-run", "--head-dims", "64", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "tune_attention_quick.json").read_text())["rows"]
    assert {row["direction"] for row in rows if row["chosen"]} == set(tune.DIRECTIONS)
    assert all(row["median_ms"] > 0 for row in rows if row["status"] == "ok")
    assert not [row["status"] for row in rows if row["status"].startswith(("failed", "not "))]
    assert Path(configs.__file__).read_text() == SOURCE
