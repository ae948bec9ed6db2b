"""python -m model: streams, reads standard input and files, speaks JSON, and ends cleanly on Ctrl-C."""

import io
import json
import re

import pytest
import torch

from model import GPT2, GPT2Config
from model.__main__ import INTERRUPTED, main
from tokenizer import GPT2Tokenizer

LAST_LINE = re.compile(
    r"\[(\d+) \+ (\d+) tokens( in each of \d+ rows)?; prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s\]\n"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved model, tiny but for its vocabulary."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(path)
    return str(path)


def said(capsys, *arguments, status=0):
    assert main([*arguments]) == status
    return capsys.readouterr()


def test_streams_the_prompt_and_its_continuation(directory, capsys):
    out, err = said(capsys, "Hello", "--model", directory, "--max-new-tokens", "7", "--seed", "3")
    assert out.startswith("Hello")
    assert out.endswith("\n")
    assert len(out) > len("Hello\n")
    assert LAST_LINE.fullmatch(err).group(1, 2) == ("1", "7")
    assert said(capsys, "Hello", "--model", directory, "--max-new-tokens", "7", "--seed", "3").out == out
    assert said(capsys, "Hello", "--model", directory, "--max-new-tokens", "7", "--seed", "4").out != out


def test_json_is_what_generate_returns(directory, capsys):
    out, err = said(capsys, "Hello", "--model", directory, "--max-new-tokens", "7", "--greedy", "--json")
    row = json.loads(out)
    tokenizer, model = GPT2Tokenizer.from_pretrained("gpt2"), GPT2.from_pretrained(directory)
    expected = model.generate([tokenizer.encode("Hello")], max_new_tokens=7)[0, 1:].tolist()
    assert row["ids"] == expected
    assert row["text"] == tokenizer.decode(expected)
    assert row["prompt"] == "Hello"
    assert row["interrupted"] is False
    assert row["decode_tokens_per_s"] > 0
    assert err == ""
    looked_up = said(capsys, "Hello", "--model", directory, "--max-new-tokens", "7", "--lookup", "4", "--json")
    assert json.loads(looked_up.out)["ids"] == expected


def test_reads_standard_input(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("né\n".encode())))
    out, _ = said(capsys, "-", "--model", directory, "--max-new-tokens", "3", "--greedy")
    assert out.startswith("né")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "a prompt is empty" in said(capsys, "--model", directory, status=2).err


def test_a_batch_file_gives_each_line_what_it_gets_alone(directory, capsys, tmp_path):
    prompts = ["Hello", "The quick brown fox", "1, 2, 3"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    options = ("--model", directory, "--max-new-tokens", "6", "--greedy", "--json")
    out, _ = said(capsys, "--batch-file", str(file), *options)
    together = [json.loads(line) for line in out.splitlines()]
    alone = [json.loads(said(capsys, prompt, *options).out) for prompt in prompts]
    assert [row["ids"] for row in together] == [row["ids"] for row in alone]
    out, err = said(capsys, "--batch-file", str(file), *options[:-1])
    assert all(prompt in out for prompt in prompts)
    assert LAST_LINE.fullmatch(err).group(3) == " in each of 3 rows"


@pytest.mark.parametrize("as_json", [False, True], ids=["streaming", "json"])
def test_ctrl_c_ends_with_what_was_said(as_json, directory, capsys, monkeypatch):
    calls = []

    def interrupt(criterion, ids, scores):
        calls.append(ids)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    monkeypatch.setattr("model.__main__.Progress.__call__", interrupt)
    options = ["--model", directory, "--greedy", "--max-new-tokens", "20", *(["--json"] if as_json else [])]
    out, err = said(capsys, "Hello", *options, status=INTERRUPTED)
    if as_json:
        assert len(json.loads(out)["ids"]) == 4
        assert json.loads(out)["interrupted"] is True
    else:
        assert out == GPT2Tokenizer.from_pretrained("gpt2").decode(calls[-1][0].tolist()) + "\n"
        assert "[1 + 4 tokens" in err


def test_random_weights_need_no_checkpoint(capsys):
    out, _ = said(
        capsys, "Hi", "--random-weights", "--size", "distilgpt2", "--max-new-tokens", "2", "--seed", "1", "--json"
    )
    assert len(json.loads(out)["ids"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/dir"], "is neither a directory nor a repository"),
        (["--attn", "fast"], "attn_implementation='fast' is unknown"),
        (["--dtype", "int3"], "argument --dtype: invalid choice"),
        (["--max-new-tokens", "100"], "n_positions is 64"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--batch-file", "no-such-file"], "both a prompt and --batch-file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_status_2(arguments, message, directory, capsys):
    arguments = ["Hello", *([] if "--model" in arguments else ["--model", directory]), *arguments]
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
