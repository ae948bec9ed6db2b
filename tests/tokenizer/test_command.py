"""python -m tokenizer: a text, a file or standard input; a table, colours or JSON; errors in one line, status 2."""

import io
import json
import sys

import pytest

from tokenizer.__main__ import main


def test_a_table_of_tokens(capsys):
    assert main(["Hi wör\n"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["17250", "Hi", "48", "69"], ["266", "·w", "20", "77"]]
    assert lines[-2].split() == ["198", "\\n", "0a"]
    assert lines[-1] == "7 characters, 8 bytes, 4 tokens"


def test_json_of_a_file(capsys, tmp_path):
    (tmp_path / "text").write_bytes("é\r\n".encode())
    assert main(["--file", str(tmp_path / "text"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["text"] == "é\r\n"
    assert shown["ids"] == [2634, 201, 198]
    assert [token["bytes"] for token in shown["tokens"]] == ["c3 a9", "0d", "0a"]


def test_standard_input_and_colour(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b")))
    assert main(["--color", "always"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("\x1b[48;5;117m\x1b[30ma\x1b[0m\x1b[48;5;157m\x1b[30m·b\x1b[0m\n")


def test_special_tokens_are_text_unless_asked_for(capsys):
    assert main(["<|endoftext|>", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 7
    assert main(["<|endoftext|>", "--json", "--special"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == [50256]


@pytest.mark.parametrize("arguments", [["--file", "/no/such/file"], ["a", "--vocabulary", "/no/such/directory"]])
def test_errors_take_one_line(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokenizer: ")
    assert captured.err.count("\n") == 1


def test_a_text_and_a_file_are_one_too_many(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["a", "--file", "b"])
    assert "one is required" in capsys.readouterr().err
