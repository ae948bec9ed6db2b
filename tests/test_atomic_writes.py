"""A file is written whole or not at all, by each package's writer: nothing is torn, guessed or written through."""

import errno
import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from bench.lib import files as bench_files
from model.checkpoints import atomic

WRITERS = {"model": atomic.write_file, "bench": bench_files.write_file}
pytestmark = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_names_of_temporaries_cannot_be_guessed(write, tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(a).name), replace(a, b)))
    for _ in range(20):
        assert write(tmp_path / "file", "text") == tmp_path / "file"
    assert len(set(names)) == 20
    assert all(atomic.TEMPORARY.fullmatch(name) for name in names)
    assert files(tmp_path) == ["file"]


def test_nothing_is_written_through_a_link(write, tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 16)  # an attacker who guesses
    (tmp_path / ".file.0000000000000000.tmp").symlink_to("victim")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", "text")
    monkeypatch.undo()
    (tmp_path / "file").symlink_to("victim")
    write(tmp_path / "file", "text")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_permissions_are_the_usual(write, tmp_path):
    (tmp_path / "usual").write_text("")
    write(tmp_path / "file", b"bytes")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "file")]
    assert modes[0] == modes[1]


def test_the_bytes_are_on_the_disk_before_the_name(write, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write(tmp_path / "file", "text")
    assert events[:2] == ["flush", "rename"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file(write, error, at, tmp_path, monkeypatch):
    path = write(tmp_path / "file", "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(type(error)):
        write(path, "new")
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file"]


def test_a_file_that_cannot_grow_leaves_the_old_one(write, tmp_path):
    path = write(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(path, "x" * 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file"]


def test_writers_at_once_leave_one_whole_file(write, tmp_path):
    texts = [letter * 20_000 for letter in "abcd"]

    def repeat(text):
        for _ in range(5):
            write(tmp_path / "file", text)

    threads = [threading.Thread(target=repeat, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    write(tmp_path / "file", texts[0])
    while any(thread.is_alive() for thread in threads):
        assert (tmp_path / "file").read_text() in texts
    assert files(tmp_path) == ["file"]
