"""The record: the environment, JSON rows, tables; what stays of a run that was stopped, and how it is gone on with."""

import json
import os

import pytest
import torch

from bench.lib import record as module
from bench.lib.cli import Parser
from bench.lib.clock import DeviceLost
from bench.lib.record import Record, cell, doubts, environment_of, save, sources, table


def test_the_environment_says_where_a_number_is_from():
    record = environment_of("cpu", "python bench/x.py --quick")
    assert record["torch"] == torch.__version__
    assert record["device"] == record["cpu"]
    assert record["threads"] == torch.get_num_threads()
    assert record["command"] == "python bench/x.py --quick"
    assert record["date"].endswith("+00:00")
    assert record["commit"] is None or len(record["commit"]) == 40
    json.dumps(record, allow_nan=False)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = save(tmp_path / "x.json", {"device": "d"}, [{"T": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        save(path, {}, [{"T": float("nan")}])
    assert json.loads(path.read_text()) == {"environment": {"device": "d"}, "rows": [{"T": 1}]}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_table_is_aligned_and_says_what_was_not_measured():
    rows = [{"name": "a", "ms": 12.3456, "ok": True}, {"name": "longer", "ms": None, "ok": False}]
    assert table(rows, ("name", "ms", "ok")).splitlines() == [
        "name              ms   ok",
        "------  ------------  ---",
        "a              12.35  yes",
        "longer  not measured   no",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(1.23e-7, "1.2e-07"), (0.0, "0.000"), (12345.6, "12346"), (128, "128"), (0.01234, "0.01234")]
)
def test_cells(value, text):
    assert cell(value) == text


# A run


class Bench:
    """The smallest bench: cases are numbers, and each gives one row."""

    def __init__(self, out, *arguments):
        self.args = Parser("bench/small_sweep.py", "").parse_args(["--device", "cpu", "--out", str(out), *arguments])
        self.ran = []

    def run(self, at_case=lambda case: None, cases=(1, 2, 3)):
        with Record(self.args, columns=("case", "median_ms"), charts=False) as record:
            for case in record.missing(cases, "small"):
                self.ran.append(case)
                self.provider_lost_here = record.lost("p")
                record.add_from(case, lambda case: at_case(case) or [{"case": case, "median_ms": 1.0}], case)

    def file(self):
        return json.loads(self.args.path.read_text())


def raising(error, at):
    def at_case(case):
        if case == at:
            raise error

    return at_case


def test_each_case_is_on_disk_before_the_next_begins(tmp_path):
    bench, seen = Bench(tmp_path), []
    bench.run(lambda case: case > 1 and seen.append([row["case"] for row in bench.file()["rows"]]))
    assert seen == [[1], [1, 2]]
    assert [row["case"] for row in bench.file()["rows"]] == [1, 2, 3]


def test_ctrl_c_gives_what_exists_and_code_130_and_resume_goes_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        Bench(tmp_path).run(raising(KeyboardInterrupt(), at=3))
    assert exit.value.code == 130
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:4]] == ["1", "2"]
    assert "interrupted: 2 rows" in printed.err
    again = Bench(tmp_path, "--resume")
    again.run()
    assert again.ran == [3]
    assert [row["case"] for row in again.file()["rows"]] == [1, 2, 3]


def test_an_interrupt_before_the_first_row_leaves_an_earlier_file_alone(tmp_path):
    Bench(tmp_path).run()
    with pytest.raises(SystemExit):
        Bench(tmp_path).run(raising(KeyboardInterrupt(), at=1))
    assert len(Bench(tmp_path).file()["rows"]) == 3


def test_a_case_that_fails_by_itself_is_noted_and_the_next_is_due(tmp_path, capsys):
    bench = Bench(tmp_path)
    bench.run(raising(ZeroDivisionError("an oracle of nothing"), at=2))
    assert [row["case"] for row in bench.file()["rows"]] == [1, 3]
    assert "2 gave no rows: error: ZeroDivisionError: an oracle of nothing" in capsys.readouterr().out


@pytest.mark.parametrize("provider", ["p", None], ids=["a provider's", "nobody's"])
def test_a_lost_gpu_ends_the_run_with_code_3_and_resume_spares_what_lost_it(tmp_path, provider):
    status = "error: AcceleratorError: an illegal memory access"
    with pytest.raises(SystemExit) as exit:
        Bench(tmp_path).run(raising(DeviceLost(status, provider), at=2))
    assert exit.value.code == 3
    again = Bench(tmp_path, "--resume")
    again.run(cases=(1, 2))
    if provider is None:
        assert again.ran == []
        assert again.file()["failed"] == [["2", status]]
    else:
        assert again.ran == [2]
        assert again.provider_lost_here == status


@pytest.mark.parametrize("key", ["commit", "sources", "device", "torch", "triton"])
def test_resume_refuses_what_was_measured_elsewhere(tmp_path, capsys, key):
    bench = Bench(tmp_path)
    bench.run()
    data = bench.file()
    data["environment"][key] = "another"
    bench.args.path.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as exit:
        Bench(tmp_path, "--resume")
    assert exit.value.code == 2
    assert f"is of another {key}: another, not " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"environment": {}, "rows": []}'])
def test_resume_refuses_what_is_no_result(tmp_path, capsys, text):
    (tmp_path / "small_sweep.json").write_text(text)
    with pytest.raises(SystemExit) as exit:
        Bench(tmp_path, "--resume")
    assert exit.value.code == 2
    assert "is no result that can be gone on with" in capsys.readouterr().err


def test_other_arguments_are_another_run_but_where_files_go_is_not(tmp_path, capsys):
    Bench(tmp_path).run()
    Bench(tmp_path / "." / "", "--resume", "--no-charts")
    with pytest.raises(SystemExit):
        Parser("bench/small_sweep.py", "").parse_args(["--out", str(tmp_path), "--resume"])
    assert "is of another command" in capsys.readouterr().err


def test_a_quick_run_never_takes_the_place_of_a_full_one(tmp_path):
    Bench(tmp_path).run()
    Bench(tmp_path, "--quick").run()
    assert sorted(os.listdir(tmp_path)) == ["small_sweep.json", "small_sweep_quick.json"]


def test_what_something_else_on_the_machine_may_have_disturbed_is_said():
    rows = [{"p20_ms": 4.3, "p80_ms": 114.0}, {"p20_ms": 1.0, "p80_ms": 1.1}, {"p20_ms": None, "p80_ms": None}]
    (line,) = doubts({"load": 0.1, "cores": 2}, rows)
    assert line.startswith("warning: p80/p20 is above 1.5 in 1 of 2 timed rows (at most 26.51)")
    assert doubts({"load": 7.5, "cores": 2}, rows[1:]) == ["warning: the load before the start was 7.5 on 2 cores"]
    assert doubts({"load": 0.1, "cores": 2}, rows[1:]) == []


def test_code_without_git_has_a_commit_if_told_and_is_told_apart_by_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_output_of", lambda *command: None)
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert environment_of("cpu", "")["commit"] == "abc"
    monkeypatch.delenv("BENCH_COMMIT")
    assert environment_of("cpu", "")["commit"] is None
    before = sources()
    assert before == sources()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "x.py").write_text("")
    assert before != sources()
