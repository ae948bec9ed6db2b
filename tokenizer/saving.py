"""Several files of one directory, saved as one: at every instant a reader finds all of the old ones or all of the new.

New files are written beside the old ones, in a directory of a random name, and flushed to the disk. Renaming that
directory to PENDING is the save: from then on a reader takes a file from there, where it is. Then each file moves to
its place, and PENDING goes. A saver that dies before the renaming has changed nothing; one that dies behind it leaves
the moves to the next saver, and to readers what they would have found. Savers wait for each other.
"""

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there savers do not wait, and what a dead one leaves behind stays
    fcntl = None  # type: ignore[assignment]

PENDING = ".tokenizer-saved"
_UNSAVED = ".tokenizer-saving-"
_TRIES = 100


def save(directory, texts):
    """Writes {file name: text} to a directory; returns the files' paths."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"GPT2Tokenizer: {str(directory)!r} is a file; a directory to save to is required")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) as is_alone:
        for dead in directory.glob(f"{_UNSAVED}*") if is_alone else ():
            _remove(dead)
        _finish(directory)
        unsaved = Path(tempfile.mkdtemp(prefix=_UNSAVED, dir=directory))
        try:
            for name, text in texts.items():
                _write(unsaved / name, text)
            _flush(unsaved)
            os.chmod(unsaved, 0o755)
            os.rename(unsaved, directory / PENDING)
        except BaseException:
            _remove(unsaved)
            raise
        _flush(directory)
        _finish(directory)
    return tuple(str(directory / name) for name in texts)


def read(directory, names):
    """{name: bytes} of those files of a directory that exist, all of one save."""
    directory = Path(directory)
    for _ in range(_TRIES):
        paths = _paths(directory, names)
        with suppress(FileNotFoundError):  # it moved meanwhile
            found = {name: path.read_bytes() for name, (path, _) in paths.items()}
            if _paths(directory, names) == paths:
                return found
    raise ValueError(f"GPT2Tokenizer.from_pretrained: {str(directory)!r} is being written without end")


def _paths(directory, names):
    """{name: (where it is, what tells this version of it from others)}."""
    found: dict = {}
    for name in names:
        for path in (directory / PENDING / name, directory / name):
            with suppress(OSError):
                state = path.stat()
                is_newer = name not in found or state.st_mtime_ns > found[name][1][2]  # some other program's
                if path.is_file() and is_newer:
                    found[name] = path, (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
    return found


def _write(path, text):
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _finish(directory):
    """Moves what is pending to its place, and removes the empty directory."""
    pending = directory / PENDING
    if pending.is_symlink():
        pending.unlink()  # nothing of ours: what it points to stays as it is
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(pending)):
            os.replace(pending / name, directory / name)
        _flush(directory)
        os.rmdir(pending)


@contextmanager
def _locked(directory):
    """Waits until no other saver is at work in a directory; gives False where the file system has no locks."""
    if fcntl is None:
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        is_locked = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_locked = True
        yield is_locked
    finally:
        os.close(handle)


def _remove(path):
    with suppress(OSError):
        for name in os.listdir(path) if not path.is_symlink() else ():
            os.unlink(path / name)
        os.rmdir(path)


def _flush(directory):
    """Has the disk keep the names in a directory, where the system can be told so."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
