"""python -m model: streams, reads standard input and files, speaks JSON, and ends cleanly on Ctrl-C."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peers import tiny_config

from model import GPT2, GPT2Config
from model.__main__ import INTERRUPTED, main
from model.terminal import shown_json
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
    GPT2Tokenizer.from_pretrained("gpt2").save_pretrained(path)
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


LETTERS = GPT2Tokenizer.train(["to be or not to be, that is the question"] * 3, 262, progress=False)


@pytest.mark.parametrize("V", [50257, 50304, 50256, 262, 60000])
def test_gpt2s_tokenizer_stands_in_only_where_it_can_be_the_one(V, tmp_path, capsys):
    """A model with a vocabulary of its own, saved without its tokenizer, once spoke GPT-2's tokens without a word."""
    GPT2(tiny_config(vocab_size=V, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    call = ("to be", "--model", str(tmp_path), "--max-new-tokens", "3", "--greedy", "--json")
    if V in (50257, 50304):
        assert said(capsys, *call).err == f"model: {tmp_path} has no tokenizer; GPT-2's is taken\n"
    else:
        err = said(capsys, *call, status=2).err
        assert f"has no tokenizer, and its vocabulary of {V} tokens is not GPT-2's of 50257: save the one" in err


def test_a_checkpoints_own_tokenizer_is_taken(tmp_path, capsys):
    model = GPT2(tiny_config(vocab_size=len(LETTERS), bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path)
    LETTERS.save_pretrained(tmp_path)
    out, err = said(capsys, "to be", "--model", str(tmp_path), "--max-new-tokens", "3", "--greedy", "--json")
    expected = model.eval().generate([LETTERS.encode("to be")], max_new_tokens=3)[0, -3:].tolist()
    assert (json.loads(out)["ids"], err) == (expected, "")


def test_the_tokenizer_of_a_repository_is_its_own(tmp_path, capsys, monkeypatch):
    """Of a name on the Hub, GPT-2's was once taken whatever the repository held."""
    model = GPT2(tiny_config(vocab_size=len(LETTERS), bos_token_id=0, eos_token_id=0))
    snapshot = tmp_path / "models--someone--letters" / "snapshots" / "abc"
    model.save_pretrained(snapshot)
    LETTERS.save_pretrained(snapshot)
    (tmp_path / "models--someone--letters" / "refs").mkdir()
    (tmp_path / "models--someone--letters" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out, _ = said(capsys, "to be", "--model", "someone/letters", "--max-new-tokens", "3", "--greedy", "--json")
    expected = model.eval().generate([LETTERS.encode("to be")], max_new_tokens=3)[0, -3:].tolist()
    assert json.loads(out)["ids"] == expected


def test_a_checkpoints_generation_config_neither_adds_beams_nor_hides_an_end(directory, tmp_path, capsys):
    model = GPT2.from_pretrained(directory)
    said_freely = model.generate([[15496]], max_new_tokens=9, eos_token_id=[])[0, 1:].tolist()
    model.generation_config.update(num_beams=4, num_return_sequences=2, eos_token_id=[said_freely[4], 1])
    model.save_pretrained(tmp_path)
    call = ("Hello", "--model", str(tmp_path), "--max-new-tokens", "9", "--greedy", "--json")
    end = said_freely.index(said_freely[4]) + 1
    assert json.loads(said(capsys, *call).out)["ids"] == said_freely[:end]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nthe quick\n", encoding="utf-8")
    rows = said(capsys, "--batch-file", str(prompts), *call[1:]).out.splitlines()
    assert json.loads(rows[0])["ids"] == said_freely[:end]


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
        (["--device", "x"], "--device x: "),
        (["--device", "meta"], "--device meta: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
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
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1 or said.startswith("usage: ")


def test_only_newlines_end_a_prompt_of_a_batch_file(directory, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028two\fthree\x85four\r\n\n  \nfive\n".encode())
    out, _ = said(capsys, "--batch-file", str(file), "--model", directory, "--max-new-tokens", "1", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["one\u2028two\fthree\x85four", "five"]


def test_special_tokens_in_a_prompt_are_text_unless_asked_for(directory, capsys):
    options = ("a<|endoftext|>", "--model", directory, "--max-new-tokens", "1", "--greedy")
    assert "[8 + 1 tokens" in said(capsys, *options).err
    assert "[2 + 1 tokens" in said(capsys, *options, "--special").err


def test_json_ends_behind_any_of_several_eos_ids(directory, tmp_path, capsys):
    model = GPT2.from_pretrained(directory)
    GPT2Tokenizer.from_pretrained(directory).save_pretrained(tmp_path / "several")
    first = model.generate([[15496]], max_new_tokens=8, eos_token_id=[])[0].tolist()
    model.config.eos_token_id = [50256, first[3]]
    model.save_pretrained(tmp_path / "several")
    (tmp_path / "prompts").write_text("Hello\nGoodbye")
    out, _ = said(
        capsys, "--batch-file", str(tmp_path / "prompts"), "--model", str(tmp_path / "several"), "--greedy",
        "--max-new-tokens", "8", "--json",
    )  # fmt: skip
    ids = json.loads(out.splitlines()[0])["ids"]
    assert ids == first[1 : 1 + first[1:].index(first[3]) + 1]


def test_offline_it_says_at_once_what_needs_no_network(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: 1 / 0)
    monkeypatch.chdir(tmp_path)
    err = said(capsys, "Hello", "--model", "gpt2", status=2).err
    assert "the Hub cannot be reached" in err
    assert "--random-weights needs no checkpoint" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_leaves_ends_it_quietly(options, directory):
    command = [sys.executable, "-m", "model", "Hello", "--model", directory, "--max-new-tokens", "20", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head -c1` does
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_an_output_without_the_characters_gets_them_escaped(directory):
    command = [sys.executable, "-m", "model", "né", "--model", directory, "--max-new-tokens", "2", "--greedy"]
    for options in ([], ["--json"]):
        done = subprocess.run(
            [*command, *options], capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
        )
        assert json.loads(done.stdout)["prompt"] == "né" if options else done.stdout.startswith(b"n\\xe9")


def test_json_on_a_terminal_is_the_same_json_without_what_steers_it(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    line = shown_json({"text": "a\x9b\u202e\x1b\x7fé"}, sys.stdout)
    assert json.loads(line) == {"text": "a\x9b\u202e\x1b\x7fé"}
    assert line.isprintable()
