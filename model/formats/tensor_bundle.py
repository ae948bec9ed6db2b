"""TensorFlow's checkpoints without TensorFlow: an index, which is a LevelDB table, and the tensors' bytes beside it.

The table: blocks of sorted (key, value) with the bytes that a key shares with the one before left out, each block
followed by its compression (0: none) and its masked CRC-32C; at the end a footer of 48 bytes that says where the block
of blocks lies. Values are protocol buffers: "" holds a BundleHeaderProto, each tensor's name a BundleEntryProto.
Sources: tensorflow/core/protobuf/tensor_bundle.proto, leveldb/doc/table_format.md.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.formats.crc32c import crc32c, masked

MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5
_RESTART = 16  # keys between two that are written whole
_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: which of the data files, from which byte, how many; and the CRC-32C of them, masked."""

    dtype: torch.dtype
    shape: tuple
    shard: int
    offset: int
    size: int
    crc: int


def data_path(index, shard, shards):
    return index.with_name(f"{index.name.removesuffix('.index')}.data-{shard:05d}-of-{shards:05d}")


def read_bundle(index, progress=lambda name: None):
    """{name: tensor} of an .index and its data files, mapped. Each CRC is checked; all else is a ValueError."""
    try:
        shards, entries = _entries(index.read_bytes())
    except (IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"convert: {index} is truncated or damaged") from error
    except ValueError as error:
        raise ValueError(f"convert: {index}: {error}") from error
    data = {}
    for shard in {entry.shard for entry in entries.values()}:
        path = data_path(index, shard, shards)
        if not path.is_file():
            raise ValueError(f"convert: {path} is not there; {index} names it")
        data[shard] = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.zeros(0, np.uint8)
    for name, entry in entries.items():
        path = data_path(index, entry.shard, shards)
        if entry.offset + entry.size > len(data[entry.shard]):
            raise ValueError(f"convert: {path} ends at byte {len(data[entry.shard])}, within {name}")
    tensors = {}
    for name, entry in entries.items():
        content = data[entry.shard][entry.offset : entry.offset + entry.size]
        if masked(crc32c(content)) != entry.crc:
            raise ValueError(f"convert: {data_path(index, entry.shard, shards)}: {name} is damaged: its CRC differs")
        if entry.offset % entry.dtype.itemsize:
            content = content.copy()
        tensors[name] = torch.from_numpy(content).view(entry.dtype).view(entry.shape)
        progress(name)
    return tensors


def _entries(content):
    """(number of data files, {name: Entry}) of an index's bytes."""
    if len(content) < _FOOTER or int.from_bytes(content[-8:], "little") != MAGIC:
        raise ValueError("it is no index of a TensorFlow checkpoint, or cut short: its last 8 bytes are not the magic")
    footer = content[-_FOOTER:]
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    size, at = _varint(footer, at)
    shards, entries = None, {}
    for _, handle in _block(content, offset, size):
        offset, at = _varint(handle, 0)
        size, at = _varint(handle, at)
        for key, value in _block(content, offset, size):
            if key == b"":
                shards = _shards(_message(value))
            elif key.decode() in entries:
                raise ValueError(f"it holds {key.decode()} twice")
            else:
                entries[key.decode()] = _entry(key.decode(), _message(value))
    if shards is None:
        raise ValueError("it has no header")
    for name, entry in entries.items():
        if entry.shard >= shards:
            raise ValueError(f"{name} lies in data file {entry.shard} of {shards}")
    return shards, entries


def _shards(header):
    shards = header.get(1, [1])[-1]
    if header.get(2, [0])[-1] != 0:
        raise ValueError("it was written by a big-endian machine, which is not supported")
    if not isinstance(shards, int) or not 1 <= shards < 100_000:
        raise ValueError(f"it names {shards} data files")
    return shards


def _entry(name, message):
    dtype = message.get(1, [0])[-1]
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is of TensorFlow's type {dtype}; it must be one of {sorted(_DTYPES)}")
    if 7 in message:
        raise ValueError(f"{name} is in slices, which is not supported")
    shape = []
    for part in message.get(2, []):
        for dimension in _message(part).get(2, []):
            shape.append(_message(dimension).get(1, [0])[-1])
    numbers = [message.get(field, [0])[-1] for field in (3, 4, 5, 6)]
    if len(shape) > _MOST_DIMENSIONS or not all(isinstance(n, int) and n < 2**62 for n in [*shape, *numbers]):
        raise ValueError(f"{name} has shape {shape[:_MOST_DIMENSIONS]} and numbers {numbers}, which cannot be")
    entry = Entry(_DTYPES[dtype], tuple(shape), *numbers)
    needed = entry.dtype.itemsize
    for length in shape:
        needed *= length
    if needed != entry.size:
        raise ValueError(
            f"{name} of shape {entry.shape} and {entry.dtype} has {entry.size} bytes; it must have {needed}"
        )
    return entry


def _block(content, offset, size):
    """The (key, value) pairs of a block, as a list."""
    end = offset + size
    if end + _TRAILER > len(content):
        raise ValueError(f"a block reaches to byte {end + _TRAILER} of {len(content)}")
    if masked(crc32c(content[offset : end + 1])) != int.from_bytes(content[end + 1 : end + 5], "little"):
        raise ValueError(f"the block at byte {offset} is damaged: its CRC differs")
    if content[end]:
        raise ValueError(f"the block at byte {offset} is compressed, which TensorFlow's checkpoints are not")
    block = content[offset:end]
    restarts = int.from_bytes(block[-4:], "little")
    stop = len(block) - 4 - 4 * restarts
    if stop < 0:
        raise ValueError(f"the block at byte {offset} is damaged")
    pairs, key, at = [], b"", 0
    while at < stop:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > stop:
            raise ValueError(f"the block at byte {offset} is damaged")
        key = key[:shared] + block[at : at + own]
        at += own
        pairs.append((key, block[at : at + length]))
        at += length
    return pairs


def _varint(content, at):
    """(number, where it ends)"""
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _message(content):
    """{field: [values]} of a protocol buffer: integers and bytes."""
    fields: dict = {}
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(content, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value, at = int.from_bytes(content[at : at + length], "little"), at + length
        elif kind == 2:
            length, at = _varint(content, at)
            value, at = content[at : at + length], at + length
        else:
            raise ValueError(f"a protocol buffer of wire type {kind}")
        if at > len(content):
            raise ValueError("a protocol buffer that is cut short")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def index_bytes(tensors):
    """The .index of tensors {name: tensor on the CPU, contiguous} that lie in one data file, in the order of names."""
    pairs, offset = [(b"", _number(1, 1) + _bytes(3, _number(1, 1)))], 0
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        content = tensor_bytes(tensor)
        shape = b"".join(_bytes(2, _number(1, length)) for length in tensor.shape)
        crc = _put(6 << 3 | 5) + masked(crc32c(content)).to_bytes(4, "little")
        entry = (
            _number(1, _CODES[tensor.dtype]) + _bytes(2, shape) + _number(4, offset) + _number(5, len(content)) + crc
        )
        pairs.append((name.encode(), entry))
        offset += len(content)
    block = _with_trailer(_made_block(pairs))
    meta = _with_trailer(_made_block([]))
    handle = _put(0) + _put(len(block) - _TRAILER)
    blocks = _with_trailer(_made_block([(pairs[-1][0], handle)]))
    footer = _put(len(block)) + _put(len(meta) - _TRAILER) + _put(len(block + meta)) + _put(len(blocks) - _TRAILER)
    return block + meta + blocks + footer.ljust(_FOOTER - 8, b"\0") + MAGIC.to_bytes(8, "little")


def tensor_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _made_block(pairs):
    content, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % _RESTART:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(content))
        content += _put(shared) + _put(len(key) - shared) + _put(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return content + b"".join(at.to_bytes(4, "little") for at in [*restarts, len(restarts)])


def _with_trailer(block):
    return block + b"\0" + masked(crc32c(block + b"\0")).to_bytes(4, "little")


def _put(number):
    content = b""
    while number >= 0x80:
        content, number = content + bytes([number & 0x7F | 0x80]), number >> 7
    return content + bytes([number])


def _number(field, value):
    return _put(field << 3) + _put(value)


def _bytes(field, value):
    return _put(field << 3 | 2) + _put(len(value)) + value
