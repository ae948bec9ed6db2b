"""bench/compare.py: a change is told from noise, and every case that either side has is accounted for."""

import json

import pytest

from bench.compare import main


def row(T, median, spread=0.01, **fields):
    times = {
        "median_ms": median,
        "p20_ms": median and median * (1 - spread),
        "p80_ms": median and median * (1 + spread),
    }
    return {
        "backend": "triton",
        "T": T,
        "dtype": "float16",
        "tflops": 3.0,
        "error": 1e-3,
        "status": "ok",
        **times,
        **fields,
    }


def compare(tmp_path, before, after, *options, environments=({}, {})):
    paths = []
    for name, rows, environment in zip(("a.json", "b.json"), (before, after), environments):
        (tmp_path / name).write_text(json.dumps({"environment": environment, "rows": rows}))
        paths.append(str(tmp_path / name))
    return main([*paths, *options])


def test_gains_and_losses_beyond_the_noise(tmp_path, capsys):
    before = [row(1, 1.0), row(2, 1.0), row(3, 1.0), row(4, 1.0, spread=0.2), row(5, 1.0)]
    after = [row(1, 0.8), row(2, 1.3), row(3, 1.005), row(4, 1.15), row(5, 1.015, spread=0.0001)]
    assert compare(tmp_path, before, after) == 1
    out = capsys.readouterr().out
    assert "all: backend=triton dtype=float16" in out
    lines = [line.split() for line in out.splitlines()[1:-1]]
    assert [(words[0], words[1], words[-1]) for words in lines] == [
        ("slower", "+30.0%", "T=2"),
        ("faster", "-20.0%", "T=1"),
    ]
    assert out.splitlines()[-1] == "1 faster, 1 slower, 3 same"
    assert compare(tmp_path, before, after, "--all", "--threshold", "0.5") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5 + 1


def test_what_has_a_time_on_one_side_alone(tmp_path, capsys):
    before = [row(1, 1.0), row(2, None, status="out of memory"), row(3, 1.0), row(5, None)]
    after = [row(1, None, status="error"), row(2, 1.0), row(4, 1.0), row(3, 1.0), row(5, None)]
    assert compare(tmp_path, before, after) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "2 same, 1 no time any more, 2 no time before"
    assert compare(tmp_path, before[1:], after[1:]) == 0


def test_another_machine_is_named(tmp_path, capsys):
    environments = ({"device": "A", "torch": "2"}, {"device": "B", "torch": "2"})
    assert compare(tmp_path, [row(1, 1.0)], [row(1, 1.0)], environments=environments) == 0
    assert capsys.readouterr().out.startswith("device: A before, B after\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is no JSON"), ("[]", "has no rows"), ('{"rows": [{"x": 1}]}', "has no rows with a median_ms")],
)
def test_what_is_no_result_is_one_line(content, words, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert main([str(tmp_path / "x.json")] * 2) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_results_without_a_common_case_and_doubled_rows_are_refused(tmp_path, capsys):
    assert compare(tmp_path, [row(1, 1.0)], [row(2, 1.0)]) == 2
    assert "no case in common" in capsys.readouterr().err
    assert compare(tmp_path, [row(1, 1.0)] * 2, [row(1, 1.0)]) == 2
    assert "has two rows of" in capsys.readouterr().err


def test_the_committed_results_compare(capsys):
    from bench.lib.record import ROOT

    path = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "first_visit" / "tiles_128x64" / "lengths.json"
    assert main([str(path), str(path)]) == 0
    assert "faster" not in capsys.readouterr().out
