"""Tuning: what is tried, what is left out and why, what is chosen, and that the table's file keeps all else."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copy

import pytest
import torch
from optional import needs

from bench import tune
from bench.lib.clock import Block
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
def test_candidates_are_a_grid_with_the_present_shape_first(itemsize):
    tried = tune.candidates(AttentionConfig(48, 64, 4, 3), itemsize)
    assert tried[0] == AttentionConfig(48, 64, 4, 3)
    assert len(set(tried)) == len(tried) == 1 + 3 * 3 * 2 * 4
    assert all(c.BLOCK_N % 16 == 0 and c.BLOCK_M % 16 == 0 for c in tried)
    near = tune.candidates(PRESENT, itemsize, quick=True)
    assert PRESENT in near
    assert len(near) < 10


def test_accumulators_are_those_of_the_kernels():
    config = AttentionConfig(128, 64, 4, 3)
    assert tune.accumulators("forward", config, 64) == (128 * 64 + 128 * 64) // 128  # acc, s
    assert tune.accumulators("dq", config, 64) == (128 * 64 + 2 * 128 * 64) // 128  # dq, s, dp
    assert tune.accumulators("dkdv", config, 64) == (2 * 64 * 64 + 2 * 128 * 64) // 128  # dk, dv, s, dp


class FakeTrial:
    """A device on which the time of a config is known, and some cannot run."""

    dtype, head_dim, itemsize, device = "bfloat16", 64, 2, torch.device("cpu")

    def __init__(self, statuses):
        self.statuses, self.used, self.timed = statuses, PRESENT, []

    def present(self, direction):
        return self.used

    def use(self, direction, config):
        self.used = config

    def check(self, direction, config):
        return 0.001, self.statuses.get(config, "ok")

    def make(self, direction, config):
        self.used = config
        return config


class FakeClock:
    def __init__(self, times):
        self.times, self.blocks = times, []

    def block(self, make, budget_ms, is_warm=False):
        config = make()
        self.blocks.append((config, budget_ms))
        return Block([self.times(config)])


def test_a_row_is_tuned_in_two_rounds(monkeypatch):
    monkeypatch.setattr(tune, "active_arch", lambda: 90)
    fast, wrong = AttentionConfig(64, 128, 8, 2), AttentionConfig(64, 64, 8, 4)
    trial = FakeTrial({wrong: "failed: error of o is 1.0e+00, allowed 1.0e-03"})
    clock = FakeClock(lambda config: {fast: 1.0, wrong: 0.1, PRESENT: 2.0}.get(config, 3.0 + config.num_stages))
    chosen, record = tune.tune(trial, "forward", clock=clock)
    assert chosen == fast
    assert trial.used == PRESENT  # the caller decides
    rows = {tuple(row[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")): row for row in record}
    assert [row["chosen"] for row in record].count(True) == 1
    assert rows[64, 128, 8, 2]["chosen"]
    assert rows[64, 64, 8, 4]["median_ms"] is None
    assert rows[64, 64, 8, 4]["status"].startswith("failed: error of o")
    briefly = {config for config, budget in clock.blocks if budget == 20.0}
    thoroughly = {config for config, budget in clock.blocks if budget == 60.0}
    assert len(briefly) == len(record) - 1
    assert len(thoroughly) == 4
    assert {fast, PRESENT} <= thoroughly
    assert wrong not in briefly


def test_a_row_of_which_nothing_runs_keeps_its_shape(monkeypatch):
    monkeypatch.setattr(tune, "active_arch", lambda: 90)
    trial = FakeTrial(dict.fromkeys(tune.candidates(PRESENT, 2), "left out: spills 9 registers"))
    chosen, record = tune.tune(trial, "dq", clock=FakeClock(lambda config: pytest.fail("timed")))
    assert chosen == PRESENT
    assert {row["status"] for row in record} == {"left out: spills 9 registers"}


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
    assert trial.spilled == {("forward", config): 0}
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
    _, status = trial.check("dkdv", AttentionConfig(128, 128, 4, 1))
    assert status == "left out: 384 registers a thread for its accumulators alone, of 255"

    _, status = trial.check("forward", AttentionConfig(64, 128, 8, 8))
    assert status.startswith("left out: error: OutOfResources: out of resource: shared memory, Required: ")

    monkeypatch.setattr(tune, "check", lambda *_: (0.5, "failed: error of o is 5.0e-01, allowed 1.0e-02"))
    assert trial.check("forward", present) == (0.5, "failed: error of o is 5.0e-01, allowed 1.0e-02")

    monkeypatch.setattr(tune, "check", lambda *_: (0.001, "ok"))
    load = trial._counting(lambda name, *_: ("module", "function", 255, 12, 1024))  # Triton's order: registers, spilled
    assert load("_attention_forward_kernel", b"", 0, 0) == ("module", "function", 255, 12, 1024)
    assert trial.check("forward", present) == (0.001, "left out: spills 12 registers")
    assert trial.check("dq", trial.present("dq")) == (0.001, "ok")
    assert trial.present("forward") == present


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
    source = tune.rewritten(SOURCE, family, key, {limit: new}, "NVIDIA H100 80GB HBM3, bfloat16, T = 2048")
    assert table_of(source) == expected
    assert (
        tune.with_notes(source, family, key)[0].strip() == f"# D = {limit}: NVIDIA H100 80GB HBM3, bfloat16, T = 2048"
    )
    before, after = SOURCE.splitlines(), source.splitlines()
    assert len(set(after) - set(before)) == 2  # the note and the row
    assert len(set(before) - set(after)) <= 1


def test_a_note_is_replaced_and_the_others_stay():
    key = "forward", 2
    source = tune.rewritten(SOURCE, "sm_90", key, {64: PRESENT, 128: OTHER}, "an H100, yesterday")
    source = tune.rewritten(source, "sm_90", key, {128: PRESENT}, "an H200, today")
    *notes, row = (line.strip() for line in tune.with_notes(source, "sm_90", key))
    assert notes == ["# D = 64: an H100, yesterday", "# D = 128: an H200, today"]
    assert row.startswith('("forward", 2): {64: C(')
    assert "128: C(128, 64, 4, 3)" in row
    assert tune.rewritten(source, "sm_90", key, {128: PRESENT}, "an H200, today") == source


@pytest.fixture
def command(tmp_path, monkeypatch):
    """conclude() on a copy of the table's file: (arguments, environment, the copy)."""
    file = Path(copy(configs.__file__, tmp_path / "configs.py"))
    monkeypatch.setattr(configs, "__file__", str(file))
    args = argparse.Namespace(out=tmp_path, dtype=["bfloat16", "float32"], seq_len=2048, dry_run=False)
    environment = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "date": "2026-03-01T10:00:00+00:00"}
    return args, environment, file


CHOSEN = {("forward", 2): {64: OTHER}, ("dq", 4): {64: OTHER, 128: OTHER}}
RECORD = [
    {"direction": "forward", "dtype": "bfloat16", "D": 64, "error": 0.001, "chosen": True, "status": "ok"}
    | vars(OTHER)
    | {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}
]


@needs("ruff")
def test_what_was_measured_is_written_as_ruff_wants_it(command, capsys):
    args, environment, file = command
    tune.conclude(args, environment, "sm_90", CHOSEN, RECORD)
    source = file.read_text()
    assert "# D = 64: NVIDIA H100 80GB HBM3, bfloat16, T = 2048, triton 3.7.1, 2026-03-01\n" in source
    assert "# D = 128: NVIDIA H100 80GB HBM3, float32, T = 2048, triton 3.7.1, 2026-03-01\n" in source
    table = table_of(source)
    assert table["sm_90"]["forward", 2][64] == (64, 64, 4, 2)
    assert table["sm_90"]["dq", 4] == table_of(SOURCE)["sm_90"]["dq", 4] | dict.fromkeys((64, 128), (64, 64, 4, 2))
    assert table["sm_80"] == table_of(SOURCE)["sm_80"]
    for tool in (["format", "--check"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *tool, "--config", ROOT / "pyproject.toml", file], check=True)
    assert json.loads((args.out / "tune_attention.json").read_text())["rows"] == RECORD
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {file}"
    assert sorted(path.name for path in args.out.iterdir()) == ["configs.py", "tune_attention.json"]


def test_a_dry_run_prints_the_rows_and_leaves_the_file(command, capsys):
    args, environment, file = command
    args.dry_run = True
    tune.conclude(args, environment, "sm_90", CHOSEN, RECORD)
    assert file.read_text() == SOURCE
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("{")[0].strip() for line in printed if line.strip().startswith("(")] == [
        '("forward", 2):',
        '("dq", 4):',
    ]


def test_each_direction_is_tuned_with_what_was_chosen_before(monkeypatch):
    """tune_all() passes the winners on, and groups them by the rows of the table."""
    in_use = {}

    class Recording(FakeTrial):
        def __init__(self, device, dtype, head_dim, seq_len):
            self.head_dim, self.itemsize = head_dim, 2

        def key(self, direction):
            return direction, self.itemsize

        def use(self, direction, config):
            in_use[direction] = config

    def fake_tune(trial, direction, quick, clock):
        order.append((trial.head_dim, direction, dict(in_use)))
        return replace(PRESENT, num_stages=trial.head_dim), [direction]

    order = []
    monkeypatch.setattr(tune, "Trial", Recording)
    monkeypatch.setattr(tune, "tune", fake_tune)
    args = argparse.Namespace(device="cuda", dtype=["bfloat16"], head_dims=[128, 64], seq_len=8, quick=True)
    chosen, record = tune.tune_all(args, None)
    first, second = (replace(PRESENT, num_stages=D) for D in (64, 128))
    assert order[:3] == [
        (64, "forward", {}),
        (64, "dq", {"forward": first}),
        (64, "dkdv", {"forward": first, "dq": first}),
    ]
    assert chosen == {(direction, 2): {64: first, 128: second} for direction in ("forward", "dq", "dkdv")}
    assert record == ["forward", "dq", "dkdv"] * 2


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cuda", "--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)"),
        ("", "--device cpu: tile shapes are chosen by times on a GPU; --device cuda is required"),
        ("--op gelu", "argument --op: invalid choice: 'gelu'"),
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
    rows = json.loads((tmp_path / "tune_attention.json").read_text())["rows"]
    assert {row["direction"] for row in rows if row["chosen"]} == set(tune.DIRECTIONS)
    assert all(row["median_ms"] > 0 for row in rows if row["status"] == "ok")
    assert Path(configs.__file__).read_text() == SOURCE
