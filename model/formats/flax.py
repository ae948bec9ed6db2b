"""Flax's checkpoints of the Hub, flax_model.msgpack: nested maps; an array is extension 1 of (shape, dtype, bytes).

The reader knows the part of MessagePack (msgpack.org, spec.md) that such a file has, and refuses the rest; arrays are
views of the mapped file. Kernels are [out, in]. Beside it lies the config.json.
"""

import mmap
import struct

import torch

from model.checkpoints.files import listed, read_json_object
from model.config import GPT2Config
from model.formats.found import Found, names

FILE = "flax_model.msgpack"
_MOST_LEVELS = 16
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_LAST = {"scale": "weight", "embedding": "weight", "kernel": "weight", "bias": "bias"}


def is_flax(directory):
    return directory.is_dir() and (directory / FILE).is_file()


def read(directory):
    """The Found of a directory with a flax_model.msgpack and a config.json."""
    config = GPT2Config.from_dict(read_json_object(directory / "config.json"))
    path = directory / FILE
    stored = dict(_flat(read_msgpack(path)))
    found = Found(config, {})
    for theirs, tensor in stored.items():
        *parts, last = theirs.split("/")
        name = ".".join([*parts, _LAST.get(last, last)])
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"convert: {path}: {theirs} is {type(tensor).__name__}; it must be an array")
        found.tensors[name] = tensor.t() if last == "kernel" and tensor.dim() == 2 else tensor
        found.renamed[name] = theirs
    unknown = sorted(found.tensors.keys() - {*names(config), "lm_head.weight"})
    if unknown:
        raise ValueError(f"convert: {path} has also {listed([found.renamed[name] for name in unknown])}")
    return found


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        yield prefix[:-1], tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}/")


def read_msgpack(path):
    """What a file holds: dicts with str for keys, arrays as tensors, numbers, str."""
    with open(path, "rb") as file:
        length = path.stat().st_size
        if not length:
            raise ValueError(f"convert: {path} is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        value, end = _Reader(data).value(0, ())
    except (struct.error, IndexError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"convert: {path} is truncated or damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"convert: {path}: {error}") from error
    if end != length:
        raise ValueError(f"convert: {path} goes on for {length - end} bytes behind its end")
    return value


class _Reader:
    def __init__(self, data):
        self.data = data

    def number(self, form, at):
        return struct.unpack_from(">" + form, self.data, at)[0], at + struct.calcsize(form)

    def raw(self, at, length, where):
        if at + length > len(self.data):
            raise ValueError(
                f"it ends at byte {len(self.data)}, within {'/'.join(map(str, where)) or 'its first value'}"
            )
        return at, at + length

    def value(self, at, where):
        """(the value at a byte, where it ends); where: the keys that lead to it."""
        if len(where) > _MOST_LEVELS:
            raise ValueError(f"it has more than {_MOST_LEVELS} levels")
        code, at = self.data[at], at + 1
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 256, at
        if code <= 0x8F or code in (0xDE, 0xDF):
            count, at = (code & 0x0F, at) if code <= 0x8F else self.number("HI"[code - 0xDE], at)
            return self.map(at, count, where)
        if code <= 0x9F or code in (0xDC, 0xDD):
            count, at = (code & 0x0F, at) if code <= 0x9F else self.number("HI"[code - 0xDC], at)
            items: list = []
            for _ in range(count):
                item, at = self.value(at, (*where, len(items)))
                items.append(item)
            return items, at
        if code <= 0xBF or 0xD9 <= code <= 0xDB:
            length, at = (code & 0x1F, at) if code <= 0xBF else self.number("BHI"[code - 0xD9], at)
            start, end = self.raw(at, length, where)
            return self.data[start:end].decode(), end
        if 0xC4 <= code <= 0xC6:
            length, at = self.number("BHI"[code - 0xC4], at)
            return self.raw(at, length, where), at + length  # its place; whoever reads it makes a view
        if 0xCC <= code <= 0xD3:
            return self.number("BHIQbhiq"[code - 0xCC], at)
        if 0xC7 <= code <= 0xC9 or 0xD4 <= code <= 0xD8:
            length, at = (1 << code - 0xD4, at) if code >= 0xD4 else self.number("BHI"[code - 0xC7], at)
            kind, at = self.number("b", at)
            start, end = self.raw(at, length, where)
            return self.array(kind, start, end, where), end
        raise ValueError(f"{'/'.join(map(str, where)) or 'its first value'} is of type {code:#x}, which is not read")

    def map(self, at, count, where):
        result = {}
        for _ in range(count):
            key, at = self.value(at, where)
            if not isinstance(key, str) or key in result:
                raise ValueError(
                    f"{'/'.join(map(str, where)) or 'its first value'} has key {key!r:.40}, or has it twice"
                )
            result[key], at = self.value(at, (*where, key))
        return result, at

    def array(self, kind, start, end, where):
        """A tensor over the bytes of an array's extension."""
        name = "/".join(map(str, where))
        parts, stop = self.value(start, where)
        right = kind == 1 and stop == end and isinstance(parts, list) and len(parts) == 3
        if not right or parts[1] not in _DTYPES or not isinstance(parts[2], tuple):
            raise ValueError(f"{name} is no array of {', '.join(_DTYPES)}")
        shape, dtype, (first, last) = parts[0], _DTYPES[parts[1]], parts[2]
        if not isinstance(shape, list) or not all(isinstance(n, int) and 0 <= n < 2**40 for n in shape):
            raise ValueError(f"{name} has shape {shape!r:.40}; it must be a list of lengths")
        count = torch.Size(shape).numel()
        if count * dtype.itemsize != last - first:
            raise ValueError(f"{name} of shape {tuple(shape)} and {dtype} has {last - first} bytes")
        if not count:
            return torch.empty(shape, dtype=dtype)
        content = torch.frombuffer(self.data, dtype=torch.uint8, count=last - first, offset=first)
        return (content.clone() if first % dtype.itemsize else content).view(dtype).view(shape)
