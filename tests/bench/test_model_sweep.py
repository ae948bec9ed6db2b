"""The model sweep: its rows, the page's tables, and what it refuses."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from optional import needs

from bench import model_sweep
from bench.lib.gate import OK
from bench.lib.lanes import DTYPES
from bench.lib.providers import Provider, build
from model.config import GPT2Config


@pytest.fixture
def tiny(monkeypatch):
    """A size of its own, so that a sweep takes seconds."""
    monkeypatch.setitem(model_sweep.PRESETS, "tiny", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97})


@pytest.mark.parametrize(
    "pair", [("eager", "sdpa"), pytest.param(("transformers-sdpa", "sdpa"), marks=needs("transformers"))], ids="-".join
)
def test_a_sweep_writes_rows_tables_and_the_diagram(pair, tiny, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--size", "tiny", "--pair", *pair, "--out", str(tmp_path)]
    model_sweep.main(arguments)
    data = json.loads((tmp_path / "model_sweep_quick.json").read_text())
    rows = data["rows"]
    assert data["environment"]["command"].startswith("python bench/model_sweep.py --device cpu --quick")
    assert {row["mode"] for row in rows} == set(model_sweep.MODES)
    assert {row["backend"] for row in rows} == set(pair)
    for row in rows:
        assert row["status"] == OK
        assert row["median_ms"] > 0
        assert row["launches"] is None  # a GPU's
        assert row["us_a_step"] == (1e3 * row["median_ms"] if row["mode"] == "decoding" else None)
        assert (row["mode"] == "decoding") == (row["gb_per_s"] is not None) == (row["copy_share"] is not None)
        assert row["error"] < 1e-4
        assert 0.1 < row["peak_memory_mb"] < 50
    tables = (tmp_path / "model_sweep_quick.md").read_text()
    assert (
        f"| Batch size | Seq len | Time per batch ({pair[0]} - s) | Time per batch ({pair[1]} - s) | Speedup (%) |"
        in tables
    )
    assert f"| Per token latency {pair[0]} (ms) |" in tables
    assert "Peak memory is counted, not measured" in tables
    assert (tmp_path / "model_inference_quick.png").stat().st_size > 10_000
    assert "wrote" in capsys.readouterr().out


def test_a_cpus_peak_memory_is_what_is_alive_at_once(tiny):
    """Training holds weights and gradients at least; a longer text takes more, and eager attention more than SDPA."""
    ours = build("tiny", "cpu", "float32")
    weights_mb = sum(p.nbytes for p in ours.parameters()) / 2**20

    def peak(name, mode, T):
        provider = Provider(name, ours)
        return model_sweep.peak_with_weights_mb(provider, partial(getattr(provider, mode), 2, T), torch.device("cpu"))

    assert (
        2 * weights_mb < peak("sdpa", "training", 16) < peak("sdpa", "training", 512) < peak("eager", "training", 512)
    )
    scores_mb = 2 * 2 * 512 * 512 * 4 / 2**20  # of one layer
    assert peak("eager", "inference", 512) - peak("sdpa", "inference", 512) >= scores_mb
    cache_mb = 2 * 2 * 2 * 512 * 32 * 4 / 2**20
    packed = peak("sdpa", "decoding", 512) - cache_mb
    assert 2 * weights_mb - 0.3 < packed < 2 * weights_mb + 0.3  # the packed copies leave out the embeddings' positions


def test_the_bytes_of_a_step_are_each_weight_once_and_the_keys_and_values():
    """GPT-2 124M in two bytes is 247 MB; in int8 half of it, with a scale for each output."""
    ours = SimpleNamespace(config=GPT2Config.preset("gpt2"), dtype=torch.float16)
    model, int8 = (Provider(name, ours) for name in ("triton-fused", "triton-int8"))
    assert model.bytes_a_step(1, 1) == pytest.approx(247e6, rel=2e-3)
    assert int8.bytes_a_step(1, 1) == pytest.approx(124e6, rel=5e-3)
    for provider in (model, int8):
        assert provider.bytes_a_step(3, 101) - provider.bytes_a_step(1, 1) == 3 * 100 * 12 * 2 * 768 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--mode", "decoding"], "--pair triton-int8: a captured decode step, which takes a GPU"),
        (["--device", "cuda", "--mode", "decoding", "training"], "a way of decoding; --mode decoding is required"),
    ],
    ids=["cpu", "mode"],
)
def test_a_way_of_decoding_is_refused_elsewhere(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("bench.lib.cli.resolve_device", torch.device)
    monkeypatch.setattr("bench.lib.providers.get_attention", lambda name: SimpleNamespace(refusal=lambda **_: None))
    with pytest.raises(SystemExit) as stop:
        model_sweep.main([*arguments, "--pair", "triton-int8", "sdpa", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_cpu_leaves_out_the_largest_batches_and_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(model_sweep, "PAGE", {"training": ((1, 2), (16,))})
    monkeypatch.setattr(model_sweep, "LEFT_OUT_ON_CPU", {("training", 2, 16)})
    arguments = ["--device", "cpu", "--size", "tiny", "--mode", "training", "--out", str(tmp_path)]
    model_sweep.main(arguments)
    lines = (tmp_path / "model_sweep.md").read_text().splitlines()
    assert lines[-1] == "| 2 | 16 |" + " not measured |" * 6
    assert "not measured" not in lines[-2]
    model_sweep.main([*arguments, "--batch", "2"])
    assert "not measured |" not in (tmp_path / "model_sweep.md").read_text()


def test_what_a_cpu_leaves_out_are_points_of_the_page():
    for mode, B, T in model_sweep.LEFT_OUT_ON_CPU:
        batches, lengths = model_sweep.PAGE[mode]
        assert B in batches
        assert T in lengths


def test_without_inference_there_is_no_diagram(tiny, tmp_path):
    model_sweep.main(["--device", "cpu", "--quick", "--size", "tiny", "--mode", "decoding", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_sweep_quick.json", "model_sweep_quick.md"]


def test_a_provider_that_computes_something_else_gets_no_time(tiny, tmp_path, monkeypatch):
    right = Provider.logits
    monkeypatch.setattr(Provider, "logits", lambda self, ids: right(self, ids) + (0.01 if self.name == "sdpa" else 0))
    model_sweep.main(["--device", "cpu", "--quick", "--size", "tiny", "--mode", "inference", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "model_sweep_quick.json").read_text())["rows"]
    for row in rows:
        assert (row["median_ms"] is None) == (row["backend"] == "sdpa")
        assert row["status"].startswith("failed: error of logits") == (row["backend"] == "sdpa")
    assert "failed: error of logits" in (tmp_path / "model_sweep_quick.md").read_text()


def test_speedup_and_saving_are_the_pages():
    """The page's first row: 0.039 s against 0.032 s (23 %, of rounded times 21.9), 3482.32 MB against 3494.62 MB."""
    common = {
        "mode": "training",
        "size": "gpt2-large",
        "dtype": "float16",
        "B": 1,
        "T": 128,
        "status": OK,
        "lane": "cuda",
    }
    rows = [
        {**common, "backend": "eager", "median_ms": 39.0, "peak_memory_mb": 3482.32},
        {**common, "backend": "sdpa", "median_ms": 32.0, "peak_memory_mb": 3494.62},
    ]
    line = model_sweep.markdown(rows, ("eager", "sdpa"), {"device": "x", "torch": "y"}).splitlines()[-1]
    assert line == "| 1 | 128 | 0.03900 | 0.03200 | 21.9 | 3482 | 3495 | -0.4 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "eager", "flash"], "--pair flash: unknown; choose from"),
        (["--pair", "sdpa", "sdpa"], "two different providers are required"),
        (["--pair", "sdpa", "triton"], "--pair triton: not timed without a GPU"),
        (["--seq-lens", "2000"], "--seq-lens 2000: between 2 and n_positions = 1024 is required"),
        (["--batch", "0"], "positive whole number"),
        (["--size", "gpt3"], "invalid choice: 'gpt3'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_work_starts(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        model_sweep.main(["--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_is_the_default_on_a_gpu():
    assert model_sweep.PAGE["training"] == ((1, 2, 4), (128, 256, 512, 1024))
    assert model_sweep.PAGE["decoding"] == ((1, 2, 4), (128, 256, 512, 768))
    assert DTYPES.keys() == {"float16", "bfloat16", "float32"}


def test_a_decode_step_is_captured_once_for_a_case(tiny, monkeypatch):
    """Not once for each round: a capture takes longer than what is timed. What another case or mode needs, it frees."""
    captured = []

    class Steps:
        def step(self, ids, cache):
            captured.append(self)
            cache.reserve(1)
            cache.advance([1])
            return torch.zeros(1, 97)

    ours = build("tiny", torch.device("cpu"), "float32")
    monkeypatch.setattr(type(ours), "graphed_steps", lambda self, settings: Steps())
    provider = Provider("sdpa", ours)
    for _ in range(3):
        provider.decoding(1, 8)()
    assert len(set(captured)) == 1
    provider.decoding(1, 16)()
    assert len(set(captured)) == 2
    provider.inference(1, 8)
    assert provider.steps is None
