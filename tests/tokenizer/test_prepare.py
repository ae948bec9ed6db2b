"""python -m tokenizer.prepare: every token of every document, once, in order, whatever stops it."""

import io
import json
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from tokenizer import GPT2Tokenizer, prepare
from tokenizer.shards import HEADER, read_documents, read_shard, shard_paths, write_shard

END = 50256
TEXTS = ["Hello, world!", "", "née <|endoftext|> in a text", "x" * 3000, "\n\n  tail \u2028 end", "one more", "last"]


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.from_pretrained("gpt2")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def tokens(out, split):
    return np.concatenate([np.empty(0, int), *(read_shard(path).astype(int) for path in shard_paths(out, split))])


def documents_in(out, split):
    """The documents of a split, cut where the index says."""
    found = []
    for path in shard_paths(out, split):
        found += [part.tolist() for part in np.split(read_shard(path), read_documents(path)[1:])]
    return found


@pytest.mark.parametrize("options", [{}, {"processes": 2}, {"shard_tokens": 40}], ids=str)
def test_documents_come_back_whole_and_in_order(options, corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 20)
    counts = prepare.prepare([corpus], tmp_path / "out", tokenizer, validate=3, progress=False, **options)
    rows = [[*tokenizer.encode_ordinary(text), END] for text in TEXTS]
    assert documents_in(tmp_path / "out", "val") == [rows[2], rows[5]]
    assert documents_in(tmp_path / "out", "train") == [row for i, row in enumerate(rows) if i not in (2, 5)]
    assert counts == {split: len(tokens(tmp_path / "out", split)) for split in ("train", "val")}
    assert (len(shard_paths(tmp_path / "out", "train")) > 1) == ("shard_tokens" in options)


def test_the_format_is_llm_cs(tmp_path):
    write_shard(tmp_path / "train-000000.bin", [1, 2, 65535], [0])
    content = (tmp_path / "train-000000.bin").read_bytes()
    header = np.frombuffer(content[: 4 * HEADER], "<i4")
    assert header[:4].tolist() == [20240520, 1, 3, 0]
    assert np.frombuffer(content[4 * HEADER :], "<u2").tolist() == [1, 2, 65535]


def test_a_single_text_gives_its_end_to_validation(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 200)
    prepare.prepare([tmp_path / "book.txt"], tmp_path / "out", tokenizer, validate=10, progress=False)
    whole = [*tokenizer.encode_ordinary((tmp_path / "book.txt").read_text()), END]
    train, val = tokens(tmp_path / "out", "train"), tokens(tmp_path / "out", "val")
    assert [*train, *val] == whole
    assert len(val) == len(whole) // 10


def test_lines_of_json_are_documents(tmp_path, tokenizer):
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in TEXTS) + "\n", encoding="utf-8")
    prepare.prepare([lines], tmp_path / "out", tokenizer, validate=0, progress=False)
    assert documents_in(tmp_path / "out", "train") == [[*tokenizer.encode_ordinary(text), END] for text in TEXTS]
    for line, words in (
        ('{"text": 3}', "line 2 must be an object"),
        ("{", "line 2"),
        ("[]", "line 2 must be"),
        ("[" * 100_000, "line 2"),
        ('{"text": "x\\ud800"}', "line 2: character 1 of its text is half a surrogate pair"),
    ):
        lines.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=words):
            prepare.prepare([lines], tmp_path / "bad", tokenizer, progress=False)


def test_a_stopped_run_goes_on(corpus, tmp_path, tokenizer, monkeypatch):
    """Stopped after each number of batches in turn, by an error that nobody expects."""
    monkeypatch.setattr(prepare, "BATCH", 1)
    options = {"validate": 3, "shard_tokens": 30, "progress": False}
    prepare.prepare([corpus], tmp_path / "whole", tokenizer, **options)
    encode = prepare._Encoder.__call__
    for patience in range(len(TEXTS) - 1):  # the empty one shares a batch
        calls = []

        def failing(encoder, batch, calls=calls, patience=patience):
            calls.append(batch)
            if len(calls) > patience:
                raise MemoryError
            return encode(encoder, batch)

        out = tmp_path / str(patience)
        monkeypatch.setattr(prepare._Encoder, "__call__", failing)
        with pytest.raises(MemoryError):
            prepare.prepare([corpus], out, tokenizer, **options)
        monkeypatch.setattr(prepare._Encoder, "__call__", encode)
        prepare.prepare([corpus], out, tokenizer, **options)
        for split in ("train", "val"):
            assert documents_in(out, split) == documents_in(tmp_path / "whole", split)


def test_what_stands_there_already_is_not_mixed_with_other_texts(corpus, tmp_path, tokenizer):
    out = tmp_path / "out"
    first = prepare.prepare([corpus], out, tokenizer, progress=False)
    assert prepare.prepare([corpus], out, tokenizer, progress=False) == first
    with pytest.raises(ValueError, match=r"has the shards of another call \(validate\); choose another directory"):
        prepare.prepare([corpus], out, tokenizer, validate=2, progress=False)
    own = GPT2Tokenizer.train(["to be or not to be"] * 3, 262, progress=False)
    with pytest.raises(ValueError, match=r"another call \(vocabulary\)"):
        prepare.prepare([corpus], out, own, progress=False)
    (out / "prepare.json").unlink()
    with pytest.raises(ValueError, match=r"has shards of which prepare\.json says nothing"):
        prepare.prepare([corpus], out, tokenizer, progress=False)


def test_standard_input_is_one_document(tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Hello né\n".encode())))
    assert prepare.main(["-", "--out", str(tmp_path), "--validate", "0"]) == 0
    assert capsys.readouterr().out == "train: 5 tokens\n"
    assert tokens(tmp_path, "train").tolist() == [*tokenizer.encode("Hello né\n"), END]


def test_the_sources_that_python_brings_are_found():
    names = {path.name for path in prepare.find(["builtin"])}
    assert {"argparse.py", "heapq.py", "textwrap.py"} <= names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": ["nowhere"]}, "nowhere is neither a file nor a directory"),
        ({"processes": 0}, "processes is 0; it must be an integer of at least 1"),
        ({"shard_tokens": 1.5}, r"shard_tokens is 1\.5"),
        ({"validate": True}, "validate is True"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused(change, words, corpus, tmp_path, tokenizer):
    arguments = {"sources": [corpus], "out": tmp_path / "out", "tokenizer": tokenizer, "progress": False, **change}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare.prepare(**arguments)
    assert not list(tmp_path.glob("out/*.bin"))


def test_a_file_is_no_place_for_shards(corpus, tokenizer):
    with pytest.raises(ValueError, match=r"0\.txt is a file; the shards need a directory"):
        prepare.prepare([corpus], corpus / "0.txt", tokenizer, progress=False)


def test_directories_and_texts_without_content_are_refused(tmp_path, tokenizer, capsys):
    (tmp_path / "empty").mkdir()
    assert prepare.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no file that ends in .txt" in capsys.readouterr().err
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the sources hold no text"):
        prepare.prepare([tmp_path / "none.jsonl"], tmp_path / "out", tokenizer, progress=False)
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ValueError, match="the sources hold no text"):
        prepare.prepare([tmp_path / "none.txt"] * 2, tmp_path / "out", tokenizer, progress=False)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), prepare.INTERRUPTED, "stopped; the same command goes on"),
        (BrokenProcessPool(), prepare.LOST, "was ended from outside, as for want of memory; the same command goes on"),
    ],
    ids=["Ctrl-C", "killed"],
)
def test_what_ends_it_is_said_in_one_line(error, status, words, corpus, tmp_path, monkeypatch, capsys):
    def ended(self, batch):
        raise error

    monkeypatch.setattr(prepare._Encoder, "__call__", ended)
    assert prepare.main([str(corpus), "--out", str(tmp_path / "out")]) == status
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path, tokenizer):
    """They were once replaced without a word, and the model learned the replacements."""
    for name, content in (("a.txt", b"caf\xe9"), ("b.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n')):
        (tmp_path / name).write_bytes(content)
        where = f"{name}, line 2" if name == "b.jsonl" else name
        with pytest.raises(ValueError, match=f"{where} is not UTF-8"):
            prepare.prepare([tmp_path / name], tmp_path / "out", tokenizer, progress=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000], ids=["empty", "half", "list", "bare", "deep"])
def test_a_damaged_record_is_named(content, corpus, tmp_path, tokenizer):
    prepare.prepare([corpus], tmp_path / "out", tokenizer, progress=False)
    (tmp_path / "out" / "prepare.json").write_text(content)
    with pytest.raises(ValueError, match=r"prepare\.json is damaged"):
        prepare.prepare([corpus], tmp_path / "out", tokenizer, progress=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-2], "bytes; with 3 tokens it must have 1030: it is damaged"),
        (lambda content: b"x" + content[1:], "is no shard of tokens"),
        (lambda content: content[:100], "is no shard of tokens"),
        (lambda content: content[:4] + b"\x02" + content[5:], "has version 2"),
    ],
    ids=["short", "magic", "header", "version"],
)
def test_damaged_shards_are_named(damage, words, tmp_path):
    path = tmp_path / "train-000000.bin"
    write_shard(path, [1, 2, 3], [0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words):
        read_shard(path)


@pytest.mark.parametrize("ids", [[-1], [65536]], ids=str)
def test_ids_beyond_16_bits_are_refused(ids, tmp_path):
    with pytest.raises(ValueError, match="a shard holds 0 to 65535"):
        write_shard(tmp_path / "train-000000.bin", ids, [0])
    assert not list(tmp_path.iterdir())
