"""Files that are written whole or not at all, without torch: plots.py draws where there is none.

As model/checkpoints/atomic.py does it; tests/test_atomic_writes.py holds the two to the same promises.
"""

import os
import secrets
from pathlib import Path


def write_file(path, content):
    """Makes `content`, text or bytes, the file at `path`. Returns the path. On any failure the old file stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # O_EXCL: neither another thread nor a planted link is written through.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
