"""Files that are written whole or not at all.

A file is written under a name that nobody can guess and that nothing has yet (O_EXCL, so neither another thread nor a
planted link is written through), flushed to the disk, and renamed last. Whoever opens the path sees the old file or the
new one; after a power cut, too.
"""

import errno
import os
import re
import secrets
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def unused_name():
    """Sixteen hexadecimal digits, unpredictable."""
    return secrets.token_hex(8)


def write_file(path, content):
    """Makes `content`, text or bytes, the file at `path`. Returns the path. On any failure the old file stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{unused_name()}.tmp")
    try:
        write_new_file(temporary, [content.encode() if isinstance(content, str) else content])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)
    return path


def write_new_file(path, chunks):
    """Writes the chunks of bytes to a file that must not exist, and has them on the disk when it returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # O_EXCL follows no link
    with open(handle, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(directory):
    """Has the names in a directory on the disk, where the file system knows such a thing."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
