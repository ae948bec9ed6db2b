"""The pointwise sweep: a whole run on this machine, its gate, its bytes, and each request that it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_plots import assert_chart

from bench import pointwise_sweep as sweep

ROOT = Path(sweep.__file__).parents[1]
CASE = sweep.Case("layer_norm", "float32", M=9, N=33)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The command on the CPU, as a module: (its output, its directory)."""
    out = tmp_path_factory.mktemp("sweep")
    command = [
        sys.executable,
        "-m",
        "bench.pointwise_sweep",
        "--quick",
        "--device",
        "cpu",
        "--rows",
        "8",
        "--widths",
        "64",
    ]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "--out", out], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, out


def test_a_run_ends_with_the_table_and_its_files(quick_run):
    output, out = quick_run
    lines = output.splitlines()
    assert "a copy moves" in lines[0]
    assert lines[1].split()[:3] == ["op", "provider", "mode"]
    names = ("pointwise_sweep_quick.json", "pointwise_bandwidth_quick.png")
    assert lines[-2:] == [f"wrote {out / name}" for name in names]
    assert_chart(out / "pointwise_bandwidth_quick.png")


def test_a_run_times_eager_checks_ours_and_says_what_it_left_out(quick_run):
    _, out = quick_run
    data = json.loads((out / "pointwise_sweep_quick.json").read_text())
    copy = data["environment"]["copy_gb_per_s"]
    assert copy > 0
    assert {(row["op"], row["mode"]) for row in data["rows"]} == {(o, m) for o in sweep.OPERATIONS for m in sweep.MODES}
    for row in data["rows"]:
        if row["provider"] == "eager":
            assert (row["lane"], row["status"]) == ("cpu", "ok")
            case = sweep.Case(*(row[key] for key in ("op", "dtype", "M", "N")))
            expected = sweep.least_bytes(row["mode"], case) / row["median_ms"] / 1e6
            assert row["gb_per_s"] == pytest.approx(expected)
            assert row["of_copy"] == pytest.approx(expected / copy)
            continue
        assert row["median_ms"] is row["gb_per_s"] is row["of_copy"] is None
        if row["provider"] == "triton":
            assert (row["lane"], row["status"]) == ("interpret", "not timed: no GPU")
            assert 0 <= row["error"] < 1e-4
        else:
            assert row["status"].startswith("not supported: ")


def test_bytes_are_each_large_tensor_once():
    assert sweep.least_bytes("forward", sweep.Case("add_layer_norm", "bfloat16", 4096, 768)) == 4 * 4096 * 768 * 2
    assert sweep.least_bytes("backward", sweep.Case("bias_gelu", "float32", 10, 20)) == 3 * 10 * 20 * 4
    assert sweep.least_bytes("forward", sweep.Case("cross_entropy", "float16", 8, 50257)) == 8 * 50257 * 2


@pytest.mark.parametrize("mode", sweep.MODES)
def test_a_wrong_provider_fails_its_gate_and_gets_no_time(mode, monkeypatch):
    monkeypatch.setitem(
        sweep.EAGER, "layer_norm", lambda x, weight, bias: 1.01 * sweep.reference.layer_norm(x, weight, bias)
    )
    (row,) = sweep.timed_rows(CASE, ["eager"], [mode], torch.device("cpu"), copy=1.0, quick=True)
    assert row["status"].startswith("failed: error of result")
    assert row["median_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows 0: at least 1 is required"),
        (["--widths", "768", "20000"], "--widths 20000: from 1 to 16384 is supported"),
        (["--ops", "softmax"], "invalid choice: 'softmax'"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_each_case_is_compiled_however_many_there_are(monkeypatch):
    """Regression: after eight compilations dynamo took the function as it was, and eager was timed as compiled."""
    compiled, real = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: real(f, backend=lambda g, _: compiled.append(g) or g, **options)
    )
    monkeypatch.setattr(sweep, "refusal", lambda *_: None)
    monkeypatch.setattr(sweep, "measure", lambda makes, *_, **__: {name: dict.fromkeys(sweep.TIMES) for name in makes})
    for N in range(16, 28):
        case = sweep.Case("bias_gelu", "float32", M=4, N=N)
        for entry in sweep.timed_rows(case, ["compiled"], ["forward"], torch.device("cpu"), 1.0, True):
            assert entry["status"] == "ok"
    assert len(compiled) == 12
    torch._dynamo.reset()
    function = sweep.provider("compiled", "bias_gelu")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        [function(torch.randn(4, N), torch.randn(N)) for N in range(16, 28)]
    torch._dynamo.reset()
