"""The sweep against transformers: its rows, its chart, its gates, and what it refuses."""

import json

import pytest
from optional import needs

from bench import transformers_sweep
from bench.lib import providers as model_providers
from bench.lib.gate import OK


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(transformers_sweep.PRESETS, "tiny", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97})
    monkeypatch.setattr(transformers_sweep, "import_ms", lambda statement: 10.0 if "transformers" in statement else 4.0)


def rows_of(tmp_path):
    transformers_sweep.main(["--device", "cpu", "--quick", "--size", "tiny", "--out", str(tmp_path)])
    return json.loads((tmp_path / "transformers_sweep_quick.json").read_text())["rows"]


@needs("transformers")
def test_a_sweep_writes_rows_and_the_chart(tiny, tmp_path, capsys):
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows[::2]] == ["prefill", "decoding", "decoding", "generate", "generate", "import"]
    assert [row["backend"] for row in rows[:2]] == ["sdpa", "transformers-sdpa"]
    assert rows[-2]["speedup"] == 2.5
    for ours, theirs in zip(rows[::2], rows[1::2]):
        assert ours["status"] == theirs["status"] == OK
        assert ours["speedup"] == theirs["median_ms"] / ours["median_ms"]
        assert theirs["speedup"] is None
    generated = rows[-4]
    assert generated["tokens_per_s"] == 1e3 * 8 * model_providers.NEW_TOKENS / generated["median_ms"]
    assert (tmp_path / "transformers_speedup_quick.png").stat().st_size > 10_000
    assert "tokens_per_s" in capsys.readouterr().out


@needs("transformers")
def test_other_tokens_get_no_time(tiny, tmp_path, monkeypatch):
    right = model_providers.Provider.generate

    def wrong(self, B, T):
        call = right(self, B, T)
        return call if self.name != "sdpa" else lambda: call() + 1

    monkeypatch.setattr(model_providers.Provider, "generate", wrong)
    for row in rows_of(tmp_path):
        fails = row["mode"] == "generate" and row["backend"] == "sdpa"
        assert row["status"] == ("failed: other tokens than transformers" if fails else OK)
        assert (row["median_ms"] is None) == fails


def test_an_import_is_timed_in_a_process_of_its_own():
    assert 0 < transformers_sweep.import_ms("import json") < 5000
    assert transformers_sweep.import_ms("import time; time.sleep(0.2)") >= 200


def test_refuses_where_transformers_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        transformers_sweep.main(["--device", "cpu", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "transformers is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
