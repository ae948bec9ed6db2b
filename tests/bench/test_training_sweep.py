"""The training sweep: whole steps of each provider, which change the weights, and what it refuses."""

import json

import pytest
import torch
from optional import needs

from bench import model_sweep, training_sweep
from bench.lib.gate import OK
from bench.lib.providers import Provider, build
from model.training.optimizer import flops_per_token


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(model_sweep.PRESETS, "tiny", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97})


@pytest.mark.parametrize(
    "providers",
    [("sdpa", "eager"), pytest.param(("sdpa", "transformers-sdpa"), marks=needs("transformers"))],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sweep_writes_rows(providers, dtype, tiny, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--size", "tiny", "--dtype", dtype, "--out", str(tmp_path)]
    training_sweep.main([*arguments, "--providers", *providers])
    rows = json.loads((tmp_path / "training_sweep_quick.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == list(providers)
    for row in rows:
        assert (row["status"], row["mfu"]) == (OK, None)
        assert row["tokens_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
        assert row["peak_memory_mb"] > 0.1
    assert "tokens_per_s" in capsys.readouterr().out


def test_pure_bfloat16_stands_beside_autocast(tiny, tmp_path, monkeypatch):
    """It computes with 16-bit weights, which the fp32 ones of the optimizer outlast."""
    seen, real = [], Provider.optimizer_step

    def watched(provider, B, T, precision, capture):
        wte = provider.ours.transformer.wte
        wte.register_forward_pre_hook(lambda module, args: seen.append((precision, module.weight.dtype)))
        return real(provider, B, T, precision, capture)

    monkeypatch.setattr(Provider, "optimizer_step", watched)
    arguments = ["--device", "cpu", "--quick", "--size", "tiny", "--out", str(tmp_path), "--providers", "sdpa"]
    training_sweep.main([*arguments, "--dtype", "bfloat16", "pure-bfloat16"])
    rows = json.loads((tmp_path / "training_sweep_quick.json").read_text())["rows"]
    assert [(row["dtype"], row["status"]) for row in rows] == [("bfloat16", OK), ("pure-bfloat16", OK)]
    assert all(row["peak_memory_mb"] > 0.1 for row in rows)
    assert ("bfloat16", torch.float32) in seen
    assert ("pure-bfloat16", torch.bfloat16) in seen
    assert ("pure-bfloat16", torch.float32) not in seen[seen.index(("pure-bfloat16", torch.bfloat16)) :]


def test_what_is_compiled_is_compiled_once_for_each_case_before_the_clock(tiny, tmp_path, monkeypatch):
    """Were dynamo's memory of the case before kept, the second length would be compiled for any."""
    graphs, real = [], torch.compile

    def traced(model, **options):
        def backend(graph, inputs):
            graphs.append([x.shape for x in inputs if x.dtype == torch.int64])
            return graph

        return real(model, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", traced)
    arguments = ["--device", "cpu", "--quick", "--size", "tiny", "--dtype", "bfloat16", "--out", str(tmp_path)]
    training_sweep.main([*arguments, "--providers", "sdpa", "sdpa-compiled", "--seq-lens", "8", "12", "16"])
    rows = json.loads((tmp_path / "training_sweep_quick.json").read_text())["rows"]
    assert [row["status"] for row in rows] == [OK] * 6
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert [row["peak_memory_mb"] is None for row in rows] == [False, True] * 3
    assert [max(shapes) for shapes in graphs] == [(1, 8), (1, 12), (1, 16)]


def test_a_gpus_share_is_of_its_data_sheet(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training_sweep, "peak_flops", lambda device: 1e9)
    training_sweep.main(["--device", "cpu", "--quick", "--size", "tiny", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "training_sweep_quick.json").read_text())["rows"]
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops_per_token(build("tiny", "cpu", "float32"), 16) / 1e9)


def test_a_step_changes_the_weights(tiny):
    ours = build("tiny", "cpu", "float32")
    before = ours.transformer.wte.weight.detach().clone()
    Provider("sdpa", ours).optimizer_step(1, 8, "float32")()
    assert not torch.equal(ours.transformer.wte.weight, before)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_pytorchs_backends_stand_for_pytorchs_other_operations(name, tiny):
    model, _ = Provider(name, build("tiny", "cpu", "float32")).use()
    assert {
        model.transformer.kernel_implementation,
        *(block.mlp.kernel_implementation for block in model.transformer.h),
    } == {"torch"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--providers", "sdpa", "sdpa"), "one of them is named twice"),
        (("--dtype", "float32", "float32"), "--dtype float32 float32: one of them is named twice"),
        (("--providers", "triton"), "not timed without a GPU"),
        (("--providers", "mine"), "unknown; choose from"),
        (("--seq-lens", "1"), "between 2 and n_positions = 1024"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        training_sweep.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
