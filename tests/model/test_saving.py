"""A save is one save: at every instant the directory loads as the old checkpoint or as the new one, whole."""

import errno
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from optional import transformers
from safetensors.torch import save_file
from whole import load_mark, marked

from model import GPT2Config
from model.checkpoints import saving

OLD, NEW = 2, 3
TOUCHING = ("open", "fsync", "replace", "link", "unlink")  # the calls of `os` by which a save changes the disk


class Dead(BaseException):
    """The process is no more."""


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def interfere(monkeypatch, at, error, then_dead):
    """Lets the call number `at` that touches the disk raise error; afterwards all do, as in death, or none."""
    count = 0

    def instead(function):
        def call(*args, **kwargs):
            nonlocal count
            writes = function is not os_open or bool(args[1] & os.O_CREAT)
            count += writes
            if writes and (count == at or (then_dead and count > at)):
                raise error
            return function(*args, **kwargs)

        return call

    os_open = os.open
    for name in TOUCHING:
        monkeypatch.setattr(os, name, instead(getattr(os, name)))
    return lambda: count >= at


def save_old(kind, directory):
    """A directory as some earlier save left it."""
    directory.mkdir()
    if kind in ("single", "sharded"):
        marked(OLD).save_pretrained(directory, max_shard_size="2KB" if kind == "sharded" else None)
    elif kind == "pickle":
        config = marked(OLD).config
        config.save_pretrained(directory)
        torch.save(marked(OLD).state_dict(), directory / "pytorch_model.bin")
    elif kind == "dead":  # config.json names its weights, and the usual names are those of a third checkpoint
        marked(0).save_pretrained(directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "_take_usual_names", None)
            with pytest.raises(TypeError):
                marked(OLD).save_pretrained(directory, max_shard_size="2KB")
        assert load_mark(directory) == OLD


SHARD = {"single": None, "sharded": "2KB"}
PAIRS = [(old, new) for old in ("nothing", "single", "sharded", "pickle", "dead") for new in SHARD]


@pytest.fixture
def quick(monkeypatch):
    """No waiting for the disk, where no power is cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def interrupted_saves(tmp_path, old, new, error, then_dead):
    """Yields, for each call that touches the disk, the directory after a save in which that call failed."""
    save_old(old, tmp_path / "old")
    model = marked(NEW)
    for at in range(1, 500):
        directory = tmp_path / f"at-{at}"
        shutil.copytree(tmp_path / "old", directory)
        with pytest.MonkeyPatch.context() as patch:
            reached = interfere(patch, at, error, then_dead)
            raised = None
            try:
                model.save_pretrained(directory, max_shard_size=SHARD[new])
            except BaseException as caught:
                raised = caught
        yield directory, raised
        shutil.rmtree(directory)
        if not reached():
            return
    raise AssertionError("a save without end")


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_save_that_dies_anywhere_leaves_a_whole_checkpoint(old, new, tmp_path, quick):
    seen, states = [], set()
    for directory, _ in interrupted_saves(tmp_path, old, new, Dead(), then_dead=True):
        if (directory / "config.json").exists() or old != "nothing":
            seen.append(load_mark(directory))
        state = frozenset(re.sub("[0-9a-f]{16}", "*", name) for name in files(directory))
        if state in states:
            continue
        states.add(state)
        marked(OLD).save_pretrained(directory)  # the next save sweeps what is left
        assert files(directory) == ["config.json", "model.safetensors"]
        assert load_mark(directory) == OLD
    assert seen == sorted(seen)  # first the old, then the new
    assert set(seen) == ({NEW} if old == "nothing" else {OLD, NEW})


@pytest.mark.parametrize(("old", "new"), [("single", "sharded"), ("sharded", "single"), ("dead", "single")])
def test_transformers_finds_it_whole_as_well(old, new, tmp_path, quick):
    seen, states = set(), set()
    for directory, _ in interrupted_saves(tmp_path, old, new, Dead(), then_dead=True):
        state = (directory / "config.json").read_bytes(), *(name for name in files(directory) if "saving" not in name)
        if state not in states:
            states.add(state)
            seen.add(load_mark(directory, transformers.GPT2LMHeadModel))
    assert seen == {OLD, NEW}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize(("old", "new"), [("single", "sharded"), ("sharded", "single")])
def test_an_interrupt_or_a_full_disk_leaves_a_whole_checkpoint_and_no_litter(error, old, new, tmp_path, quick):
    before = None
    for directory, raised in interrupted_saves(tmp_path, old, new, error, then_dead=False):
        before = before or files(tmp_path / "old")
        mark = load_mark(directory)
        if isinstance(raised, OSError) and "save_pretrained" in str(raised):
            assert raised.errno == errno.ENOSPC
            assert ("the new checkpoint, whole" if mark == NEW else "what it held before") in str(raised)
        if mark == OLD:
            # One name may stay where the interrupt struck the sweep itself.
            assert len(set(files(directory)) - set(before)) <= 1
        marked(OLD).save_pretrained(directory)
        assert files(directory) == ["config.json", "model.safetensors"]


def test_a_file_that_cannot_grow_leaves_the_old_checkpoint(tmp_path):
    """The kernel refuses the bytes, as it does on a full disk."""
    marked(OLD).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"save_pretrained: .*File too large.* holds what it held before") as caught:
            marked(NEW).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_savers_that_are_killed_leave_whole_checkpoints(tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    done = subprocess.run(
        [sys.executable, here / "killed_savers.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_two_savers_and_a_reader_at_once(tmp_path):
    marked(0).save_pretrained(tmp_path)

    def save(mark, shard):
        model = marked(mark)
        for _ in range(12):
            model.save_pretrained(tmp_path, max_shard_size=shard)

    savers = [threading.Thread(target=save, args=args) for args in ((OLD, None), (NEW, "3KB"))]
    for saver in savers:
        saver.start()
    seen = set()
    while any(saver.is_alive() for saver in savers):
        seen.add(load_mark(tmp_path))
    assert seen <= {0, OLD, NEW}
    assert seen & {OLD, NEW}
    last = load_mark(tmp_path)
    assert len(files(tmp_path)) == (2 if last == OLD else 2 + len(list(tmp_path.glob("model-*.safetensors"))))


def test_everything_is_on_the_disk_before_config_json_names_it(tmp_path, monkeypatch):
    events, names = [], {}
    os_open, os_fsync, os_replace = os.open, os.fsync, os.replace

    def opened(path, *args, **kwargs):
        handle = os_open(path, *args, **kwargs)
        names[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda handle: (os_fsync(handle), events.append(("flushed", names[handle]))))
    monkeypatch.setattr(os, "replace", lambda a, b: (os_replace(a, b), events.append(("renamed", Path(b).name))))
    marked(NEW).save_pretrained(tmp_path / "model", max_shard_size="3KB")
    commit = events.index(("renamed", "config.json"))
    flushed = [name for kind, name in events[:commit] if kind == "flushed"]
    shards = [name for name in flushed if name.endswith(".safetensors")]
    assert len(shards) == len(list((tmp_path / "model").glob("model-*.safetensors")))
    assert flushed[len(shards)].endswith(".index.json")
    assert flushed[len(shards) + 1] == "model"  # the directory
    assert flushed[len(shards) + 2].startswith(".config.json.")
    assert events[commit + 1] == ("flushed", "model")


def test_no_hard_links_leave_the_weights_where_config_json_names_them(tmp_path, monkeypatch, caplog):
    marked(OLD).save_pretrained(tmp_path)

    def refuse(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for mark, shard in ((NEW, "3KB"), (OLD, None), (NEW, None)):
        marked(mark).save_pretrained(tmp_path, max_shard_size=shard)
        assert "no hard links" in caplog.text
        assert load_mark(tmp_path) == load_mark(tmp_path, transformers.GPT2LMHeadModel) == mark
    assert len(files(tmp_path)) == 2
    monkeypatch.undo()
    marked(OLD).save_pretrained(tmp_path)
    assert files(tmp_path) == ["config.json", "model.safetensors"]


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saving, "fcntl", None)
    with caplog.at_level(logging.WARNING):
        marked(NEW).save_pretrained(tmp_path)
    assert "let one process save at a time" in caplog.text
    assert load_mark(tmp_path) == NEW


def test_a_config_saved_alone_leaves_the_weights_of_a_dead_save_current(tmp_path):
    save_old("dead", tmp_path / "dead")
    config = GPT2Config.from_pretrained(tmp_path / "dead")
    config.attn_pdrop = 0.5
    config.save_pretrained(tmp_path / "dead")
    assert load_mark(tmp_path / "dead") == OLD
    assert GPT2Config.from_pretrained(tmp_path / "dead") == config
    assert saving.WEIGHTS_KEY not in config.to_dict()


def test_other_files_stay(tmp_path):
    kept = (
        "tokenizer.json",
        "notes.txt",
        ".hidden.tmp",
        "model.safetensors.bak",
        ".tokenizer.json.0123456789abcdef.tmp",
    )
    for name in kept:
        (tmp_path / name).write_text(name)
    marked(NEW).save_pretrained(tmp_path)
    assert files(tmp_path) == sorted([*kept, "config.json", "model.safetensors"])


def test_bytes_are_those_that_safetensors_writes(tmp_path):
    tensors = {f"w{i}": torch.randn(i, 3, dtype=torch.float32).t() for i in range(5)} | {"scalar": torch.tensor(2.0)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert b"".join(bytes(chunk) for chunk in saving.safetensors_chunks(tensors)) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "", "GB", "-2GB", "0KB", b"2GB", float("nan")], ids=repr)
def test_shard_sizes_that_are_none_are_refused(size, tmp_path):
    with pytest.raises(ValueError, match=r"save_pretrained: max_shard_size is .* must be a positive number of bytes"):
        marked(NEW).save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_saved_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; a directory to save to is required"):
        marked(NEW).save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match='weights are on device "meta"; they hold no values'):
        marked(NEW).to("meta").save_pretrained(tmp_path)
    assert files(tmp_path) == ["file"]
