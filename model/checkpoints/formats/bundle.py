"""TensorFlow's tensor bundles, without TensorFlow: NAME.index, a sorted table, and NAME.data-00000-of-00001, raw.

The table is LevelDB's: blocks of entries whose keys leave out what they share with the one before, each followed by a
type byte and a masked CRC-32C; a footer says where the index of blocks is. Keys are tensors' names; values are protocol
buffers: dtype, shape, place and CRC-32C. Every CRC is checked. tensorflow/core/util/tensor_bundle, lib/io/format.cc.
"""

from pathlib import Path

import numpy as np

from model.checkpoints.formats.crc32c import crc32c, masked

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8"), 19: np.dtype("<f2")}


class Reader:
    """bytes, read from the front; whatever does not fit raises ValueError."""

    def __init__(self, data, where):
        self.data, self.where, self.at = data, where, 0

    def __bool__(self):
        return self.at < len(self.data)

    def take(self, n):
        if n < 0 or self.at + n > len(self.data):
            raise ValueError(f"{self.where} is damaged: {n} bytes at {self.at} of {len(self.data)}")
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self):
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError(f"{self.where} is damaged: a number of more than ten bytes at {self.at}")

    def fields(self):
        """(number, value) of a protocol buffer: ints, or bytes of what has a length."""
        while self:
            key = self.varint()
            kind = key & 7
            if kind == 0:
                yield key >> 3, self.varint()
            elif kind in (1, 5):
                yield key >> 3, int.from_bytes(self.take(8 if kind == 1 else 4), "little")
            elif kind == 2:
                yield key >> 3, bytes(self.take(self.varint()))
            else:
                raise ValueError(f"{self.where} is damaged: a field of wire type {kind}")


def read(prefix):
    """{name: array} of a bundle, arrays mapped from the disk. Raises ValueError for damage, with what is damaged."""
    path = Path(f"{prefix}.index")
    entries, header = _table(path), None
    tensors, shards = {}, {}
    for key, value in entries:
        if key == b"":
            header = dict(Reader(value, path).fields())
            if header.get(2, 0) != 0:
                raise ValueError(f"{path}: its numbers are big-endian; little-endian ones are read")
            continue
        if header is None:
            raise ValueError(f"{path} is damaged: it does not begin with the bundle's header")
        name = key.decode("utf-8", "replace")
        tensors[name] = _tensor(prefix, name, value, header.get(1, 1), shards, path)
    if header is None:
        raise ValueError(f"{path} is damaged: it has no header")
    return tensors


def _tensor(prefix, name, value, number, shards, path):
    fields = {2: b"", 3: 0, 4: 0, 5: 0, 6: None}
    for field, content in Reader(value, f"{path}, {name}").fields():
        if field == 7:
            raise ValueError(f"{path}: {name} is stored in slices; whole tensors are read")
        fields[field] = content
    dtype = _DTYPES.get(fields.get(1))
    if dtype is None:
        raise ValueError(f"{path}: {name} has dtype {fields.get(1)} of TensorFlow's; numbers of 2 to 8 bytes are read")
    shape = []
    for field, dimension in Reader(fields[2], f"{path}, {name}").fields():
        if field == 2:
            shape.append(dict(Reader(dimension, f"{path}, {name}").fields()).get(1, 0))
    shard, offset, size = fields[3], fields[4], fields[5]
    if size != dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is damaged: {name} of shape {shape} takes {size} bytes")
    if shard not in shards:
        data = Path(f"{prefix}.data-{shard:05d}-of-{number:05d}")
        shards[shard] = data, np.memmap(data, np.uint8, "r") if data.stat().st_size else np.empty(0, np.uint8)
    data, content = shards[shard]
    if offset + size > len(content):
        raise ValueError(f"{data} has {len(content)} bytes; {name} ends at {offset + size}: it is damaged")
    content = content[offset : offset + size]
    if fields[6] is not None and masked(crc32c(content)) != fields[6]:
        raise ValueError(f"{data}: the bytes of {name} are not those that were saved (CRC-32C)")
    return (
        content.view(dtype).reshape(shape)
        if offset % dtype.itemsize == 0
        else content.copy().view(dtype).reshape(shape)
    )


def _table(path):
    """The (key, value) of a table, in order."""
    content = path.read_bytes()
    if len(content) < _FOOTER or int.from_bytes(content[-8:], "little") != _MAGIC:
        raise ValueError(f"{path} is no index of a TensorFlow checkpoint, or it was cut off")
    footer = Reader(content[-_FOOTER:-8], path)
    list(_block(content, footer.varint(), footer.varint(), path))  # the meta index: empty, but it must be whole
    blocks = _block(content, footer.varint(), footer.varint(), path)
    for _, handle in blocks:
        place = Reader(handle, path)
        yield from _block(content, place.varint(), place.varint(), path)


def _block(content, offset, size, path):
    if offset + size + 5 > len(content):
        raise ValueError(f"{path} is damaged: a block of {size} bytes at {offset}")
    block, kind = content[offset : offset + size], content[offset + size]
    crc = int.from_bytes(content[offset + size + 1 : offset + size + 5], "little")
    if masked(crc32c(content[offset : offset + size + 1])) != crc:
        raise ValueError(f"{path} is damaged: the block at {offset} is not what was saved (CRC-32C)")
    if kind != 0:
        raise ValueError(f"{path} is compressed; TensorFlow's savers do not do that to checkpoints")
    restarts = int.from_bytes(block[-4:], "little")
    entries = Reader(block[: max(0, len(block) - 4 - 4 * restarts)], path)
    key = b""
    while entries:
        shared, own, length = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key):
            raise ValueError(f"{path} is damaged: a key shares {shared} bytes with one of {len(key)}")
        key = key[:shared] + bytes(entries.take(own))
        yield key, bytes(entries.take(length))


# Writing


def _varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _field(number, value):
    """A field of a protocol buffer: an int, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _sealed(entries):
    """A block of (key, value), each key whole, with its type and its CRC."""
    body, starts = bytearray(), []
    for key, value in entries:
        starts.append(len(body))
        body += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    for start in starts or [0]:
        body += start.to_bytes(4, "little")
    body += len(starts or [0]).to_bytes(4, "little")
    return bytes(body), bytes([0]) + masked(crc32c(bytes(body) + b"\0")).to_bytes(4, "little")


def index_of(tensors):
    """The content of NAME.index for {name: (shape, bytes)} of fp32 tensors, laid out in the order of their names."""
    entries, offset = [(b"", _field(1, 1) + _field(3, _field(1, 1)))], 0
    for name in sorted(tensors):
        shape, data = tensors[name]
        dimensions = b"".join(_field(2, _field(1, size)) for size in shape)
        entry = _field(1, 1) + _field(2, dimensions) + _field(4, offset) + _field(5, len(data))
        entry += _varint(6 << 3 | 5) + masked(crc32c(data)).to_bytes(4, "little")
        entries.append((name.encode(), entry))
        offset += len(data)
    block, seal = _sealed(entries)
    content = block + seal
    meta_at, (meta, meta_seal) = len(content), _sealed([])
    content += meta + meta_seal
    index_at = len(content)
    index, index_seal = _sealed([(entries[-1][0] + b"\xff", _varint(0) + _varint(len(block)))])
    content += index + index_seal
    footer = _varint(meta_at) + _varint(len(meta)) + _varint(index_at) + _varint(len(index))
    return content + footer.ljust(40, b"\0") + _MAGIC.to_bytes(8, "little")
