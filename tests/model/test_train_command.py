"""python -m model.train: from text to a directory that loads, samples and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import GPT2
from model.__main__ import main as say
from model.train import INTERRUPTED, main
from model.training.log import read_log
from tokenizer import GPT2Tokenizer
from tokenizer.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "3", "--batch", "2", "--seq-len", "16", "--eval-every", "2", "--eval-batches", "1"]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 400, encoding="utf-8")
    return path


def train(*arguments, status=0):
    assert main([*map(str, arguments)]) == status


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    """A tiny run from a text, with a vocabulary of its own."""
    out = tmp_path_factory.mktemp("run")
    train("--text", book, "--out", out, *QUICK, "--sample", "It was")
    return out


def test_tiny_learns_its_own_vocabulary_and_speaks_it(run, capsys):
    tokenizer, model = GPT2Tokenizer.from_pretrained(run), GPT2.from_pretrained(run)
    assert len(tokenizer) == model.config.vocab_size < 2049
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert [row["step"] for row in read_log(run / "log.jsonl") if "loss" in row] == [1, 2, 3]
    assert say(["It was", "--model", str(run), "--max-new-tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["ids"]) == 4
    assert err == ""


def test_a_run_is_resumed_by_the_same_command(book, run, capsys):
    train("--text", book, "--out", run, *QUICK, status=2)
    assert "has a run already; resume it" in capsys.readouterr().err
    train("--text", book, "--out", run, *QUICK, "--steps", "5", "--resume")
    assert [row["step"] for row in read_log(run / "log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5]


def test_shards_and_a_checkpoint_are_trained_on(run, book, tmp_path, capsys):
    """--data and --from: the vocabulary is the checkpoint's, and a foreign one is refused."""
    tokenizer = GPT2Tokenizer.from_pretrained(run)
    prepare([book], tmp_path / "data", tokenizer, progress=False)
    call = ("--data", tmp_path / "data", "--from", run, *QUICK, "--gradient-checkpointing")
    train(*call, "--out", tmp_path / "tuned", "--vocabulary", run)
    losses = [
        [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row] for out in (run, tmp_path / "tuned")
    ]
    assert losses[1][0] < losses[0][0] - 0.001  # it begins where the other has come to
    train(*call, "--out", tmp_path / "other", "--vocabulary", "gpt2", status=2)
    assert "--vocabulary gpt2 is not what" in capsys.readouterr().err


def test_sizes_of_the_page_take_gpt2s_vocabulary(book, tmp_path, monkeypatch):
    monkeypatch.setitem(
        __import__("model.config", fromlist=["PRESETS"]).PRESETS, "distilgpt2", {"n_layer": 1, "n_embd": 24}
    )
    train("--text", book, "--size", "distilgpt2", "--out", tmp_path, "--steps", "1", "--batch", "1", "--seq-len", "8")
    assert GPT2.from_pretrained(tmp_path).config.vocab_size == 50257


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "nowhere"), "nowhere is neither a file nor a directory"),
        (("--text", "-"), "standard input can be read only once"),
        (("--data", "nowhere"), r"nowhere has no train-*.bin"),
        (("--data", "nowhere", "--device", "cuda:99"), "--device cuda:99"),
        (("--data", "nowhere", "--lr", "-1"), "lr is -1.0"),
        (("--data", "nowhere", "--lr", "nan"), "lr is nan"),
        (("--data", "nowhere", "--vocabulary", "gpt2", "--sample", ""), "--sample is empty"),
        (("--data", "nowhere", "--sample", "x"), "--sample needs the tokenizer of --data: --vocabulary"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(arguments, words, tmp_path, capsys):
    train(*arguments, "--out", tmp_path / "out", status=2)
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("model.train: ")
    assert err.count("\n") == 1


def test_a_file_is_no_place_for_a_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    train("--text", "nowhere", "--out", tmp_path / "file", status=2)
    assert f"--out {tmp_path / 'file'} is a file; a run needs a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_is_too_small_says_what_needs_less(error, book, tmp_path, monkeypatch, capsys):
    def full(run, sample):
        raise error

    monkeypatch.setattr("model.train.Training.train", full)
    train("--text", book, "--out", tmp_path, *QUICK, status=2)
    assert f"model.train: out of memory ({error}); --batch of fewer rows" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(book, tmp_path):
    """The limit of a file's size stands in for the disk's; the run's vocabulary and shards fit, its weights do not."""
    command = [sys.executable, "-m", "model.train", "--text", book, "--out", tmp_path / "out", *QUICK]
    limited = f"ulimit -f 500; exec {shlex.join(map(str, command))}"
    ended = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "File too large" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    train("--text", book, "--out", tmp_path / "out", *QUICK, "--resume")
    assert GPT2.from_pretrained(tmp_path / "out").config.n_layer == 4


def test_ctrl_c_says_how_to_go_on(book, tmp_path, monkeypatch, capsys):
    def interrupted(run, sample):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.train.Training.train", interrupted)
    train("--text", book, "--out", tmp_path, *QUICK, status=INTERRUPTED)
    assert f"stopped; --resume goes on from {tmp_path}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="who is who is read from Linux's /proc")
def test_a_process_that_dies_ends_the_others_with_a_message(book, tmp_path):
    """kill -9 of one of torchrun's two."""
    prepare([book], tmp_path / "data", GPT2Tokenizer.from_pretrained("gpt2"), progress=False)
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "model.train", "--data", tmp_path / "data", "--out", out, *QUICK, "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*map(str, launcher + command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as started:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
        try:
            while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").stat().st_size:
                assert started.poll() is None
                time.sleep(0.1)
            (second,) = [pid for pid in children.read_text().split() if b"\0RANK=1\0" in surroundings(pid)]
            os.kill(int(second), signal.SIGKILL)
            _, err = started.communicate(timeout=90)
        finally:
            started.kill()
    assert started.returncode != 0
    assert "model.train: process 0 has lost another one (" in err
    assert f"--resume goes on from {out}" in err


def surroundings(pid):
    return Path(f"/proc/{pid}/environ").read_bytes()
