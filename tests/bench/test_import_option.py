"""Each command that names a backend can name one from outside, after --import MODULE."""

import json
import sys

import pytest
from optional import needs

from bench import attention_sweep, model_sweep, transformers_sweep
from model import GPT2, GPT2Config, __main__
from model.attention import registry
from model.config import PRESETS

BACKEND = """
from model.attention import attention, register_attention

calls = 0

@register_attention("outside", unequal_lengths=True)
def outside(q, k, v, **options):
    global calls
    calls += 1
    return attention(q, k, v, backend="eager", **options)
"""
TINY = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97}


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The current directory, where outside_backend.py stands."""
    (tmp_path / "outside_backend.py").write_text(BACKEND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(transformers_sweep, "import_ms", lambda statement: 1.0)
    yield tmp_path
    sys.modules.pop("outside_backend", None)


SMALL = ["--device", "cpu", "--quick", "--import", "outside_backend"]
BENCHES = {
    attention_sweep: "--backends outside --heads 1 --head-dim 16 --seq-lens 24 --batch 1 --mode forward",
    model_sweep: "--pair outside eager --size tiny --mode decoding --batch 1 --seq-lens 8",
    transformers_sweep: "--backend outside --size tiny",
}
MEASURED = [*list(BENCHES)[:2], pytest.param(transformers_sweep, marks=needs("transformers"))]


@pytest.mark.parametrize("bench", MEASURED, ids=lambda bench: bench.__name__)
def test_a_bench_measures_a_backend_from_outside(bench, directory):
    bench.main([*SMALL, *BENCHES[bench].split(), "--out", str(directory)])
    [file] = directory.glob("*.json")
    assert "outside" in {row["backend"] for row in json.loads(file.read_text())["rows"] if row["status"] == "ok"}
    assert sys.modules["outside_backend"].calls > 0


def test_python_m_model_runs_a_backend_from_outside(directory, capsys):
    GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(directory / "tiny")
    options = ["--model", "tiny", "--import", "outside_backend", "--attn", "outside", "--max-new-tokens", "3"]
    assert __main__.main(["Hello", *options]) == 0
    assert capsys.readouterr().out.startswith("Hello")
    assert sys.modules["outside_backend"].calls == 3


@pytest.mark.parametrize("main", [*(bench.main for bench in BENCHES), __main__.main], ids=lambda main: main.__module__)
def test_a_module_that_is_not_there_is_one_line_and_status_2(main, directory, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--import", "no_such_module", "--device", "cpu"])
    assert exit.value.code == 2
    message = "argument --import: there is no module 'no_such_module' in the current directory or among those installed"
    assert message in capsys.readouterr().err


def test_a_module_that_needs_what_is_not_there_says_what(directory):
    (directory / "unlucky_backend.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        __main__.main(["--import", "unlucky_backend"])


@needs("transformers")
def test_a_backend_that_cannot_decode_is_refused_before_work(directory, capsys, monkeypatch):
    (directory / "outside_backend.py").write_text(BACKEND.replace(", unequal_lengths=True", ""))
    for bench in (model_sweep, transformers_sweep):
        monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("work started"))
        registry._BACKENDS.pop("outside", None)
        sys.modules.pop("outside_backend", None)
        with pytest.raises(SystemExit) as exit:
            bench.main([*SMALL, *BENCHES[bench].split()])
        assert exit.value.code == 2
        assert "outside does not support queries and keys of different lengths" in capsys.readouterr().err
