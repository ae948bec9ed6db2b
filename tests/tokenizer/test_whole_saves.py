"""A save is one save: killed anywhere, on a full disk, or beside another, the directory holds one tokenizer, whole."""

import errno
import os
import signal
import threading
import time

import pytest

from tokenizer import GPT2Tokenizer, saving

A = GPT2Tokenizer.train(["low lower lowest " * 9], 262, progress=False, model_max_length=7)
B = GPT2Tokenizer.train(["new newer newest " * 9], 261, progress=False, special_tokens=("<b>",), padding_side="left")
B.add_tokens(["added"])
STEPS = ("mkdir", "open", "fsync", "chmod", "rename", "replace", "rmdir", "unlink")

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def state(tokenizer):
    return tokenizer.get_vocab(), tokenizer.vocabulary.merges, tokenizer.padding_side, tokenizer.model_max_length


def loaded(directory):
    """'A' or 'B', whichever a directory holds."""
    found = state(GPT2Tokenizer.from_pretrained(directory))
    assert found in (state(A), state(B))
    return "A" if found == state(A) else "B"


def in_child(work):
    """Runs work in a forked process; returns its exit status."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@forks
def test_killed_at_any_step_it_leaves_the_old_one_or_the_new_one(tmp_path):
    def save_and_die(step):
        left = step

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        B.save_pretrained(directory)

    outcomes = ""
    for step in range(100):
        directory = tmp_path / str(step)
        A.save_pretrained(directory)
        status = in_child(lambda step=step: save_and_die(step))
        outcomes += loaded(directory)
        if not status:
            break
        (B if outcomes[-1] == "A" else A).save_pretrained(directory)  # the next save sweeps up
        assert loaded(directory) != outcomes[-1]
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    assert outcomes.strip("A").strip("B") == ""  # one step makes it the new one
    assert min(map(outcomes.count, "AB")) > 4


@forks
def test_killed_at_a_random_moment(tmp_path):
    outcomes = []
    for i in range(20):
        A.save_pretrained(tmp_path)
        child = os.fork()
        if not child:
            B.save_pretrained(tmp_path)
            os._exit(0)
        time.sleep(i * 0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcomes.append(loaded(tmp_path))
    assert set(outcomes) <= {"A", "B"}


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_full_disk_changes_nothing(failing, tmp_path, monkeypatch):
    A.save_pretrained(tmp_path)
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device"):
        B.save_pretrained(tmp_path)
    assert loaded(tmp_path) == "A"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupt_changes_nothing(tmp_path, monkeypatch):
    A.save_pretrained(tmp_path)
    monkeypatch.setattr(saving, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        B.save_pretrained(tmp_path)
    assert loaded(tmp_path) == "A"


def test_two_savers_and_a_reader_at_once(tmp_path):
    A.save_pretrained(tmp_path)
    errors = []

    def keep_saving(tokenizer):
        try:
            for _ in range(15):
                tokenizer.save_pretrained(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_saving, args=[tokenizer]) for tokenizer in (A, B)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loaded(tmp_path)
    assert errors == []
    loaded(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_another_program_saved_later_is_read(tmp_path):
    A.save_pretrained(tmp_path)
    pending = tmp_path / saving.PENDING
    pending.mkdir()
    os.replace(tmp_path / "tokenizer.json", pending / "tokenizer.json")
    assert loaded(tmp_path) == "A"
    B.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((tmp_path / "b" / name).read_bytes())
    os.utime(pending / "tokenizer.json", ns=(0, 0))
    assert loaded(tmp_path) == "B"


def test_a_planted_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "vocab.json").write_text("mine")
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / saving.PENDING).symlink_to(outside)
    (directory / "tokenizer.json").symlink_to(outside / "vocab.json")
    A.save_pretrained(directory)
    assert loaded(directory) == "A"
    assert [path.name for path in outside.iterdir()] == ["vocab.json"]
    assert (outside / "vocab.json").read_text() == "mine"
