"""The tokenizer sweep: rows, ratios and a chart from a tiny run; requests that cannot be served stop it before work."""

import json

import pytest
from optional import needs

from bench import tokenizer_sweep
from bench.lib.texts import TEXTS, _is_prose
from bench.tokenizer_sweep import cut, main, rows_of
from tokenizer import GPT2Tokenizer


@pytest.fixture
def gpt2_providers():
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    return [tokenizer_sweep.Ours(tokenizer), tokenizer_sweep.Tiktoken(tokenizer)]


@needs("tiktoken", "tokenizers")
def test_a_tiny_sweep_measures_every_provider(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer_sweep, "START_RUNS", 1)
    # Set here first, so that what main() sets is undone.
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    main(["--texts", "english", "chinese", "--megabytes", "0.02", "--rounds", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "tokenizer_sweep.json").read_text(encoding="utf-8"))
    assert set(written["environment"]["versions"]) == {"tiktoken", "tokenizers"}
    rows = written["rows"]
    cases = [(row["mode"], row["text"], row["threads"], row["state"], row["tokenizer"]) for row in rows]
    assert len(cases) == len(set(cases)) == 1 + 2 * 2 * 2 * 3 + 3
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["median_ms"] > 0 for row in rows)
    assert (tmp_path / "tokenizer_throughput.png").stat().st_size > 10_000
    assert "x_tiktoken" in capsys.readouterr().out


@needs("tiktoken")
def test_prepare_stands_beside_tiktokens_encoding_and_its_whole_job(gpt2_providers):
    documents = ["one text\n", "and née another"]
    reference = gpt2_providers[1].encode(documents, 1)
    rows = tokenizer_sweep.prepare_rows("documents", documents, reference, gpt2_providers, 1)
    assert [(row["tokenizer"], row["status"]) for row in rows] == [
        ("ours", "ok"),
        ("tiktoken", "ok"),
        ("tiktoken-shards", "ok"),
    ]
    rows = tokenizer_sweep.prepare_rows("documents", documents, [[1], [2]], gpt2_providers, 1)
    assert [row["status"][:6] for row in rows] == ["failed", "ok", "failed"]


def test_ratios_compare_like_with_like():
    times = {("ours", "warm"): [100.0], ("tiktoken", "warm"): [200.0], ("tiktoken", "cold"): [400.0]}
    rows = rows_of({"megabytes": 1.0, "tokens": 10}, times, wrong=["ours"])
    assert [row["x_tiktoken"] for row in rows] == [2.0, 1.0, 1.0]
    assert [row["mb_per_s"] for row in rows] == [10.0, 5.0, 2.5]
    assert [row["status"] for row in rows] == ["failed: other ids than tiktoken's", "ok", "ok"]


def test_prose_spells_no_special_token():
    """Hugging Face's tokenizers would encode the token itself, and the peers would not do the same work."""
    prose = "some words that are long enough to count as a paragraph of prose, " * 3
    assert _is_prose(prose)
    assert not _is_prose(prose + "`<|endoftext|>`")


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_the_same_each_time_and_as_long_as_asked_for(name):
    text = TEXTS[name](5_000)
    assert len(text) == 5_000
    assert text == TEXTS[name](5_000)
    assert "".join(cut(text)) == text


@needs("tiktoken", "tokenizers")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0: at least 1 is required"),
        (["--megabytes", "0"], "--megabytes 0.0: more than 0 is required"),
        (["--rounds", "0"], "--rounds 0: at least 1 is required"),
        (["--texts", "klingon"], "invalid choice: 'klingon'"),
        (["--out", "/dev/null/x"], "a directory that can be written is required"),
    ],
)
def test_bad_requests_stop_before_work(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
