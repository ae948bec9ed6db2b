"""Files of token ids, as language models are trained on: llm.c's format, read where it lies.

A shard is 256 int32, of which the first three are 20240520, 1 and the number of tokens, then the tokens as uint16, all
little-endian. Beside `NAME.bin` lies `NAME.documents.npy`, int64, the index at which each document begins; every
document ends with <|endoftext|>. The shards of a split are `train-000000.bin`, `train-000001.bin` and so on.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER = 20240520, 1, 256
LIMIT = 1 << 16  # ids that 16 bits can hold


def shard_paths(directory, split):
    """The shards of a split in a directory, in order."""
    return sorted(Path(directory).glob(f"{split}-*.bin"))


def write_shard(path, tokens, documents):
    """Writes tokens [n] and where their documents begin, each file whole or not at all, the tokens last."""
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < LIMIT:
        raise ValueError(
            f"write_shard: ids range from {tokens.min()} to {tokens.max()}; a shard holds 0 to {LIMIT - 1}"
        )
    if tokens.size >= 1 << 31:
        raise ValueError(f"write_shard: {tokens.size} tokens; a shard holds fewer than {1 << 31}")
    path = Path(path)
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with whole_file(path.with_suffix(".documents.npy")) as file:
        np.save(file, np.asarray(documents, dtype="<i8"))
    with whole_file(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


@contextmanager
def whole_file(path):
    """A binary file to write that becomes `path` at the end of the block, and never before."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_shard(path):
    """The tokens [n] of a shard, uint16, mapped from the disk. Raises ValueError where the file is not one."""
    path = Path(path)
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", HEADER)
    if len(header) < HEADER or header[0] != MAGIC:
        raise ValueError(f"{path} is no shard of tokens; python -m tokenizer.prepare writes them")
    if header[1] != VERSION:
        raise ValueError(f"{path} has version {header[1]}; version {VERSION}, of 16-bit ids, is read")
    expected = header.nbytes + 2 * int(header[2])
    if size != expected:
        raise ValueError(f"{path} has {size} bytes; with {header[2]} tokens it must have {expected}: it is damaged")
    if not header[2]:
        return np.empty(0, "<u2")
    return np.memmap(path, "<u2", mode="r", offset=header.nbytes)


def read_documents(path):
    """The index [documents] at which each document of a shard begins."""
    return np.load(Path(path).with_suffix(".documents.npy"))
