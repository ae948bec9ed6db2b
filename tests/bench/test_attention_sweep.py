"""The attention sweep: a whole run on this machine, its gate and statuses, and each request that it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from test_plots import assert_chart

from bench import attention_sweep as sweep
from bench.lib.attention_cases import HEAD_DIMS, SCENARIOS, cache_bytes
from kernels import reference
from model.attention import attention, register_attention
from model.attention import registry as attention_registry

ROOT = Path(sweep.__file__).parents[1]
FIELDS = (
    "backend, mode, dtype, B, H, T, D, causal, T_k, padding, valid, dropout_p, scenario, checked, "
    "median_ms, p20_ms, p80_ms, host_us, host_behind, graph_ms, graph_note, "
    "tflops, gb_per_s, peak_memory_mb, error, kernel, lane, status"
)
CASE = sweep.Case("float32", B=2, H=2, T=33, D=16, causal=True)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """`python bench/attention_sweep.py --quick` on the CPU, by its path from elsewhere: (its output, its directory)."""
    out = tmp_path_factory.mktemp("sweep") / "not" / "there yet"
    command = [
        sys.executable,
        ROOT / "bench/attention_sweep.py",
        "--quick",
        "--device",
        "cpu",
        "--heads",
        "2",
        "--out",
        out,
    ]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "--out", out], cwd=out.parents[1], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, out


def test_a_run_ends_with_the_table_and_its_files(quick_run):
    output, out = quick_run
    lines = output.splitlines()
    assert lines[1].split()[:3] == ["backend", "mode", "dtype"]
    charts = [f"attention_{chart}_quick.png" for chart in ("speedup", "throughput", "error")]
    names = ("attention_sweep_quick.json", *charts)
    assert lines[-4:] == [f"wrote {out / name}" for name in names]
    assert sorted(os.listdir(out)) == sorted(names)
    for chart in charts:
        assert_chart(out / chart)


def test_a_run_times_eager_and_sdpa_and_only_checks_triton(quick_run):
    _, out = quick_run
    data = json.loads((out / "attention_sweep_quick.json").read_text())
    rows = data["rows"]
    assert all(list(row) == FIELDS.split(", ") for row in rows)
    assert {(row["backend"], row["mode"]) for row in rows} == {
        (name, mode) for name in ("eager", "sdpa", "triton") for mode in ("forward", "backward")
    }
    for row in rows:
        assert 0 <= row["error"] < 1e-5
        assert row["peak_memory_mb"] is None
        if row["backend"] == "triton":
            assert (row["lane"], row["status"]) == ("interpret", "not timed: no GPU")
            assert row["median_ms"] is row["p20_ms"] is row["p80_ms"] is row["tflops"] is None
        else:
            assert (row["lane"], row["status"]) == ("cpu", "ok")
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            flops = sweep.flops(row["mode"], sweep.Case(*(row[key] for key in ("dtype", *"BHTD", "causal"))))
            assert row["tflops"] == pytest.approx(flops / row["median_ms"] / 1e9)


def test_a_run_records_where_it_ran(quick_run):
    _, out = quick_run
    environment = json.loads((out / "attention_sweep_quick.json").read_text())["environment"]
    assert {"device", "driver", "torch", "triton", "commit", "dirty", "command"} <= environment.keys()
    assert environment["command"].startswith("python bench/attention_sweep.py --quick --device cpu")


def test_flops_are_those_of_the_papers():
    case = sweep.Case("float16", B=8, H=16, T=2048, D=64, causal=False)
    assert sweep.flops("forward", case) == 4 * 8 * 16 * 2048 * 2048 * 64
    causal = sweep.Case("float16", B=8, H=16, T=2048, D=64, causal=True)
    assert sweep.flops("forward", causal) == sweep.flops("forward", case) / 2
    assert sweep.flops("backward", causal) == 2.5 * sweep.flops("forward", causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_oracle_in_chunks_is_the_definition_of_two_whole_heads(causal):
    inputs = CASE.inputs("cpu")
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    o, _ = reference.attention(*leaves, causal=causal)
    grads = torch.autograd.grad(o, leaves, inputs[3].double())
    got = sweep.expected(inputs, torch.float64, causal, chunk=8)
    for name, whole in zip(("o", "dq", "dk", "dv"), (o, *grads)):
        mode = "forward" if name == "o" else "backward"
        heads = torch.stack([whole[0, :1], whole[1, 1:]])  # the first head of row 0, the last of row 1
        torch.testing.assert_close(got[mode][name], heads, rtol=0, atol=1e-13)


def test_inputs_are_views_of_one_projection():
    q, k, v, do = CASE.inputs("cpu")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.stride() == (33 * 96, 16, 96, 1)
    assert do.shape == q.shape == (2, 2, 33, 16)


def test_bf16_is_checked_in_the_lane_that_gets_it_right():
    (row,) = sweep.lane_rows([sweep.Case("bfloat16", B=1, H=1, T=16, D=16, causal=True)], ["forward"])
    assert (row["lane"], row["status"]) == ("simulate sm_80", "not timed: no GPU")
    assert 0 < row["error"] < 0.05


def test_a_head_dim_beyond_the_kernel_is_refused_in_its_row():
    (row,) = sweep.rows_in_lane("interpret", [sweep.Case("float32", 1, 1, 16, 512, True)], ["forward"])
    assert row["status"] == "not supported: head_dim 512 (its largest is 256)"


def test_triton_refuses_a_gpu_older_than_its_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = "this GPU (compute capability 8.0 or newer is required)"
    assert sweep.refusal("triton", "cuda", "float16", 64) == reason
    assert sweep.refusal("sdpa-flash", "cuda", "float16", 64) is None


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(attention_registry, "_BACKENDS", dict(attention_registry._BACKENDS))


def test_a_backend_that_is_wrong_gets_no_time(registry):
    @register_attention("wrong")
    def wrong(q, k, v, **options):
        o, p = attention(q, k, v, backend="eager", **options)
        return o + 1e-4 * o.detach().square(), p

    rows = sweep.timed_rows(CASE, ["wrong", "sdpa"], ["forward"], torch.device("cpu"), quick=True)
    assert rows[0]["status"].startswith("failed: error of o is ")
    assert rows[0]["error"] > 1e-5
    assert rows[0]["median_ms"] is rows[0]["tflops"] is None
    assert rows[1]["status"] == "ok"


def test_a_backend_whose_gradient_alone_is_wrong_gets_no_backward_time(registry):
    @register_attention("halved")
    def halved(q, k, v, **options):
        return attention(q, (k + k.detach()) / 2, v, backend="eager", **options)

    forward, backward = sweep.timed_rows(CASE, ["halved"], sweep.MODES, torch.device("cpu"), quick=True)
    assert forward["status"] == "ok"
    assert backward["status"].startswith("failed: error of dk is ")
    assert backward["median_ms"] is None


def test_out_of_memory_is_a_value_in_the_row(registry):
    @register_attention("greedy")
    def greedy(q, k, v, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB")

    rows = sweep.timed_rows(CASE, ["greedy", "eager"], ["backward"], torch.device("cpu"), quick=True)
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert rows[0]["median_ms"] is rows[0]["error"] is None


def test_a_backends_own_error_is_its_status_and_spares_the_others(registry):
    @register_attention("broken")
    def broken(q, k, v, **options):
        raise RuntimeError("illegal memory access")

    rows = sweep.timed_rows(CASE, ["broken", "eager"], ["forward"], torch.device("cpu"), quick=True)
    assert [row["status"] for row in rows] == ["error: RuntimeError: illegal memory access", "ok"]


def test_what_lost_the_gpu_before_is_not_run_again(registry):
    @register_attention("lethal")
    def lethal(q, k, v, **options):
        pytest.fail("called again")

    known = {"lethal": "error: AcceleratorError: CUDA error: an illegal memory access was encountered"}
    rows = sweep.timed_rows(CASE, ["lethal", "eager"], ["forward"], torch.device("cpu"), True, known.get)
    assert [row["status"] for row in rows] == [known["lethal"], "ok"]


def test_what_cannot_serve_a_shape_says_so_in_its_row(registry):
    @register_attention("small", max_head_dim=8)
    def small(q, k, v, **options):
        pytest.fail("called beyond its head dim")

    # torch's CPU build has SDPA's flash and math kernels and not the others.
    names = ["small", "sdpa-cudnn", "sdpa-math", "sdpa-flash"]
    rows = sweep.timed_rows(CASE, names, ["forward"], torch.device("cpu"), quick=True)
    assert [row["status"] for row in rows] == [
        "not supported: head_dim 16 (its largest is 8)",
        "not supported: SDPA has no such kernel for this request",
        "ok",
        "ok",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--backends flashy",
            "--backends flashy: unknown; choose from eager, sdpa, triton, triton-portable, triton-hopper, ",
        ),
        ("--backends triton --head-dim 512", "triton does not support head_dim 512 (its largest is 256)"),
        ("--dtype float8", "argument --dtype: invalid choice: 'float8'"),
        ("--seq-lens 10000000", "--seq-lens 10000000: at most 131072 is supported"),
        ("--seq-lens 131072 --batch 1", "eager attention needs about 3840 GB for B = 1, H = 12; this machine has"),
        ("--seq-lens 0", "argument --seq-lens: invalid positive whole number value: '0'"),
        ("--heads two", "argument --heads: invalid positive whole number value: 'two'"),
        ("--tokens 64 --batch 2", "argument --batch: not allowed with argument --tokens"),
        ("--tokens 64 --seq-lens 32 128", "--tokens 64: a batch has whole sequences, the longest has T = 128"),
        ("--scenario sideways", "argument --scenario: invalid choice: 'sideways'"),
        ("--scenario decode --mode backward", "--mode backward: decode has no gradient; forward is required"),
        ("--scenario decode --tokens 100", "--tokens 100: a batch has whole sequences, the longest has T = 4096"),
        ("--mode sideways", "argument --mode: invalid choice: 'sideways'"),
        ("--out /dev/null/x", "--out /dev/null/x: Not a directory; a directory that can be written is required"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line_before_any_work(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "timed_rows", lambda *_: pytest.fail("work started"))
    monkeypatch.setattr(sweep, "lane_rows", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit) as exit:
        sweep.main(["--device", "cpu", *arguments.split()])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("bench/attention_sweep.py: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_gpu_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        sweep.main(["--device", "cuda", "--out", str(tmp_path / "out")])
    assert exit.value.code == 2
    message = "--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)"
    assert capsys.readouterr().err == f"bench/attention_sweep.py: {message}\n"
    assert not (tmp_path / "out").exists()


# Scenarios


def test_a_run_of_every_scenario(capsys, tmp_path, monkeypatch):
    times = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "status": "ok"}
    monkeypatch.setattr(sweep, "measure", lambda makes, *_, **__: dict.fromkeys(makes, times))
    small = "--device cpu --quick --heads 1 --head-dim 16 --seq-lens 24 --batch 2 --backends eager sdpa"
    sweep.main([*small.split(), "--scenario", *SCENARIOS, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "attention_sweep_quick.json").read_text())["rows"]
    assert all(list(row) == FIELDS.split(", ") for row in rows)
    assert all(row["status"] == "ok" for row in rows)
    assert [scenario for scenario, _ in groupby(row["scenario"] for row in rows)] == list(SCENARIOS)

    def values(scenario, *names):
        return sorted({tuple(row[name] for name in names) for row in rows if row["scenario"] == scenario})

    assert values("padding", "padding", "valid") == [(p, s) for p in ("left", "right") for s in (0.25, 0.5, 1.0)]
    assert values("decode", "mode", "T", "T_k") == [("forward", T, 24) for T in (1, 4, 16)]
    assert values("head-dims", "D", "H") == [(D, 1) for D in HEAD_DIMS]
    assert values("dropout", "dropout_p", "checked") == [(0.0, "as timed"), (0.1, "without dropout")]
    for row in rows:
        nothing = None if row["scenario"] != "decode" else 2 * 2 * 24 * 16 * 4 / 2.0 / 1e6
        assert row["gb_per_s"] == nothing
    charts = {"packed", "speedup", "throughput", "error", "padding", "dropout", "decode", "head_dims"}
    assert {path.name for path in tmp_path.glob("*.png")} == {f"attention_{name}_quick.png" for name in charts}
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend")]
    assert [("gb_per_s" in line, "valid" in line, "checked" in line) for line in tables] == [
        (False, False, False),
        (False, False, False),
        (False, True, False),
        (False, False, True),
        (True, False, False),
        (False, False, False),
    ]


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_oracle_in_chunks_knows_padding_dropout_and_caches(causal, padding, drops):
    T_k = 33 if padding == "none" else 21
    case = sweep.Case("float32", 3, 2, 21, 8, causal, T_k=T_k, padding=padding, valid=0.5)
    inputs, options = case.inputs("cpu"), case.options("cpu")
    dropout = {"keep": torch.rand(3, 2, 21, T_k) < 0.7, "dropout_p": 0.3} if drops else {}
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    o, _ = reference.attention(*leaves, **options, **dropout)
    grads = torch.autograd.grad(o, leaves, inputs[3].double())
    dropout |= {"keep": sweep.two_heads(dropout["keep"])} if drops else {}
    got = sweep.expected(inputs, torch.float64, **options, **dropout, chunk=8)
    for name, whole in zip(("o", "dq", "dk", "dv"), (o, *grads)):
        mode = "forward" if name == "o" else "backward"
        torch.testing.assert_close(got[mode][name], sweep.two_heads(whole), rtol=0, atol=1e-13)


def test_rows_of_a_padded_batch_spread_evenly_around_the_share():
    case = sweep.Case("float16", 4, 1, 128, 16, True, padding="left", valid=0.75)
    assert case.lengths() == [72, 88, 104, 120]
    assert case.valid == 0.75
    assert case.options("cpu")["kv_start"].tolist() == [56, 40, 24, 8]
    assert replace(case, padding="right").options("cpu")["kv_end"].tolist() == [72, 88, 104, 120]
    odd = sweep.Case("float16", 2, 1, 5, 16, True, padding="left", valid=0.3)
    assert (odd.lengths(), odd.valid) == ([1, 2], 0.3)


def test_flops_count_what_was_asked_for():
    padded = sweep.Case("float16", 2, 3, 128, 16, False, padding="left", valid=0.5)
    assert sweep.flops("forward", padded) == 4 * 3 * 16 * (32**2 + 96**2)
    assert sweep.flops("forward", replace(padded, causal=True)) == 2 * 3 * 16 * (32**2 + 96**2)
    decode = sweep.Case("float16", 2, 3, 16, 64, True, T_k=1024)
    assert sweep.flops("forward", decode) == 4 * 2 * 3 * 64 * (16 * 1024 - 16**2 / 2)
    assert sweep.flops("forward", replace(decode, dropout_p=0.1)) == sweep.flops("forward", decode)


def test_a_cache_is_read_where_it_lies():
    case = sweep.Case("float16", 2, 3, 4, 16, True, T_k=40)
    q, k, v, do = case.inputs("cpu")
    assert q.shape == do.shape == (2, 3, 4, 16)
    assert k.shape == v.shape == (2, 3, 40, 16)
    assert k.is_contiguous()
    assert cache_bytes(case) == k.nbytes + v.nbytes


@pytest.mark.parametrize("name", ["eager", "sdpa", "sdpa-math"])
def test_packed_is_one_tensor_to_one_tensor(name):
    """The projection to [B, T, C], and one gradient [B, T, 3C]: what is returned are views of it."""
    case = replace(CASE, scenario="packed")
    inputs = case.inputs("cpu")
    for mode in sweep.MODES:
        plain, packed = (sweep.make_call(mode, name, inputs, case.options("cpu"), packed)() for packed in (False, True))
        for ours, theirs in zip(packed, plain):
            torch.testing.assert_close(ours, theirs)
        assert len({x.untyped_storage().data_ptr() for x in packed}) == 1
        assert packed[0].untyped_storage().nbytes() == (1 if mode == "forward" else 3) * inputs[0].nbytes


def test_the_kernel_is_checked_in_every_scenario():
    """With dropout against the definition that drops the same weights; padded, from a cache, at an odd head dim."""
    shapes = [
        replace(CASE, T=17, T_k=17, scenario="packed"),
        replace(CASE, T=17, T_k=17, dropout_p=0.1, scenario="dropout"),
        replace(CASE, T=17, T_k=17, padding="left", valid=0.5, scenario="padding"),
        replace(CASE, T=4, T_k=40, scenario="decode"),
        replace(CASE, T=17, T_k=17, D=40, scenario="head-dims"),
    ]
    rows = sweep.lane_rows(shapes, sweep.MODES)
    assert [(row["scenario"], row["mode"]) for row in rows] == [
        ("packed", "forward"),
        ("packed", "backward"),
        ("dropout", "forward"),
        ("dropout", "backward"),
        ("padding", "forward"),
        ("padding", "backward"),
        ("decode", "forward"),
        ("head-dims", "forward"),
        ("head-dims", "backward"),
    ]
    for row in rows:
        assert (row["status"], row["checked"]) == ("not timed: no GPU", "as timed")
        assert 0 < row["error"] < 1e-5


def test_the_gate_of_the_kernel_drops_weights(monkeypatch):
    """A kernel that forgets its dropout differs from its oracle, and gets no time."""
    keep = torch.rand(2, 2, 33, 33) < 0.5
    monkeypatch.setattr(sweep, "attention_keep_mask", lambda *_: keep)
    case, inputs = replace(CASE, dropout_p=0.5), CASE.inputs("cpu")
    gate = sweep.gates(case, inputs, ["triton", "eager"])["triton"]

    def definition(q, k, v, dropout_seed, **options):
        return reference.attention(q, k, v, **options, keep=keep)[0]

    def forgetful(q, k, v, dropout_seed, dropout_p, **options):
        return reference.attention(q, k, v, **options)[0]

    for function, passes in ((definition, True), (forgetful, False)):
        monkeypatch.setattr(sweep, "flash_attention", function)
        _, status = sweep.check("forward", "triton", inputs, gate)
        assert (status == "ok") is passes


def test_backends_say_which_scenario_they_cannot_serve(registry):
    @register_attention("plain")
    def plain(q, k, v, **options):
        return attention(q, k, v, backend="sdpa", **options)

    shapes = [
        (replace(CASE, padding="left", valid=0.5), "not supported: padding"),
        (replace(CASE, dropout_p=0.1), "not supported: attention dropout"),
        (replace(CASE, T_k=40), "not supported: queries and keys of different lengths"),
        (CASE, "ok"),
    ]
    for case, status in shapes:
        (row,) = sweep.timed_rows(case, ["plain"], ["forward"], torch.device("cpu"), quick=True)
        assert row["status"] == status


@pytest.mark.gpu
def test_a_run_on_a_gpu_times_the_kernel(tmp_path):
    sweep.main(["--device", "cuda", "--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "attention_sweep_quick.json").read_text())["rows"]
    assert {row["backend"] for row in rows} >= {"eager", "sdpa", "triton", "flex", *sweep.SDPA_KERNELS}
    for row in rows:
        if row["backend"] in ("eager", "sdpa", "triton"):
            assert (row["lane"], row["status"]) == ("gpu", "ok")
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["peak_memory_mb"] > 0
