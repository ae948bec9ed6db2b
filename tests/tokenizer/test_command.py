"""python -m tokenizer: a text, a file or standard input; a table, colours or JSON; errors in one line, status 2."""

import io
import json
import os
import subprocess
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
    assert shown["counts"] == {"characters": 3, "bytes": 4, "tokens": 3}


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


@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_an_output_without_the_characters_gets_them_escaped(as_json):
    command = [sys.executable, "-m", "tokenizer", "é ", *(["--json"] if as_json else [])]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stderr == b""
    assert json.loads(done.stdout)["text"] == "é " if as_json else b"\\xe9" in done.stdout


def test_a_reader_that_leaves_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenizer", "a b"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_a_terminal_is_not_steered(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["a\x1b]0;title\x07\x9b\x7f", "--color", "never"]) == 0
    assert main(["a\x1b]0;title\x07\x9b\x7f", "--json"]) == 0
    assert main(["a", "--vocabulary", "./\x1b[2J"]) == 2
    for said in capsys.readouterr():
        assert said.replace("\n", "").isprintable()
