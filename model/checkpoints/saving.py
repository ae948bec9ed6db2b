"""Saving a checkpoint: at every instant the directory loads as the old one or as the new one, whole.

config.json and the weights are several files, and no system call renames several files at once. But config.json can
name the file of its weights ("transformers_weights", which transformers reads too), so one rename makes both current:

1. The new weights are written under names of their own, model.saving-<random>..., and flushed to the disk.
2. config.json is replaced by one that names them. Before this rename the old checkpoint loads, after it the new one.
3. The usual names (model.safetensors, or shards and their index) become hard links to the same files, and weights
   under other names are removed. Nobody reads them now.
4. config.json is replaced by one without the key, and the names of step 1 are removed.

A save that dies leaves a checkpoint that loads, and files that the next save sweeps. Savers wait for one another: each
holds a lock on the directory itself, which dies with its process. Where the file system has no hard links, step 2 is
the last, and config.json goes on naming the weights.
"""

import errno
import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from model.checkpoints.atomic import TEMPORARY, flush_directory, unused_name, write_file, write_new_file

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

CONFIG, SINGLE, SHARDED = "config.json", "model.safetensors", "model.safetensors.index.json"
FORMATS = (SINGLE, SHARDED, "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS_KEY = "transformers_weights"
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_SAVING = re.compile(r"model\.saving-[0-9a-f]{16}(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL)
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_checkpoint(directory, config, tensors, max_shard_size=None):
    """Makes the directory's checkpoint this one.

    config: what config.json holds, a dict. tensors: {key: tensor}. max_shard_size: bytes, or words such as "2GB":
    larger weights are written as shards with an index.
    Raises OSError where something cannot be written, saying which checkpoint the directory holds: always a whole one.
    """
    directory = Path(directory)
    shards, index = _plan(tensors, max_shard_size)
    mark = f"model.saving-{unused_name()}"
    own = {name: name.replace("model", mark, 1) for name in (*shards, *([SHARDED] if index else []))}
    first, current = own[SHARDED if index else SINGLE], False
    with _one_saver(directory) as alone:
        try:
            if alone:
                _sweep(directory)
            for name, keys in shards.items():
                write_new_file(directory / own[name], safetensors_chunks({key: tensors[key] for key in keys}))
            if index:
                named = {**index, "weight_map": {key: own[name] for key, name in index["weight_map"].items()}}
                write_new_file(directory / first, [_json(named)])
            flush_directory(directory)
            write_file(directory / CONFIG, _json({**config, WEIGHTS_KEY: first}))  # from here on, the new checkpoint
            current = True
            if _take_usual_names(directory, shards, own, index):
                write_file(directory / CONFIG, _json(config))
        except OSError as error:
            state = "the new checkpoint, whole" if current or _names(directory, first) else "what it held before"
            raise OSError(error.errno, f"save_pretrained: {error}; {directory} holds {state}") from error
        finally:
            if alone:
                _sweep(directory)


def save_config(directory, config):
    """Replaces config.json alone; what it says of the weights' file stays."""
    directory = Path(directory)
    with _one_saver(directory):
        try:
            named = _weights_named(directory)
        except (ValueError, RecursionError):  # a damaged config.json is replaced
            named = None
        write_file(directory / CONFIG, _json(config if named is None else {**config, WEIGHTS_KEY: named}))


def safetensors_chunks(tensors):
    """The bytes of a safetensors file, piece by piece: the length of a JSON header, the header, each tensor."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.is_meta:
            dtypes = ", ".join(map(str, _DTYPES))
            raise ValueError(
                f"save_pretrained: {key} is {tensor.dtype} on {tensor.device}; it must hold values of one of {dtypes}"
            )
    header, end = {"__metadata__": {"format": "pt"}}, 0
    order = sorted(
        tensors, key=lambda key: (-tensors[key].element_size(), key)
    )  # so each lies at a multiple of its size
    for key in order:
        tensor, start = tensors[key], end
        end += tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for key in order:
        yield tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _plan(tensors, max_shard_size):
    """({usual file name: keys}, the index or None)"""
    from huggingface_hub import split_torch_state_dict_into_shards

    if isinstance(max_shard_size, bool) or not (
        max_shard_size is None
        or (isinstance(max_shard_size, int) and max_shard_size > 0)
        or (isinstance(max_shard_size, str) and re.fullmatch(r"0*[1-9]\d*\s*([KMGT]?B)", max_shard_size.upper()))
    ):
        raise ValueError(
            f"save_pretrained: max_shard_size is {max_shard_size!r}; it must be a positive number of bytes, or words "
            'such as "2GB"'
        )
    total = sum(tensor.nbytes for tensor in tensors.values())
    plan = split_torch_state_dict_into_shards(
        tensors, max_shard_size=total + 1 if max_shard_size is None else max_shard_size
    )
    index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename} if plan.is_sharded else None
    return plan.filename_to_tensors, index


def _take_usual_names(directory, shards, own, index):
    """Step 3. False where the file system has no hard links: then no file keeps a usual name."""
    linked = True
    for name in shards:
        temporary = directory / f".{name}.{unused_name()}.tmp"
        try:
            os.link(directory / own[name], temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            logger.warning("save_pretrained: no hard links in %s (%s): config.json names the weights", directory, error)
            linked = False
            break
        os.replace(temporary, directory / name)
    written = set()
    if linked:
        written = set(shards)
        if index:
            write_file(directory / SHARDED, _json(index))
            written.add(SHARDED)
    for path in directory.iterdir():  # weights that an earlier save left would be read instead, or for nothing
        if (path.name in FORMATS or _SHARD.fullmatch(path.name)) and path.name not in written:
            path.unlink()
    flush_directory(directory)
    return linked


def _names(directory, weights):
    """Whether config.json names these weights."""
    try:
        return _weights_named(directory) == weights
    except (ValueError, RecursionError, OSError):
        return False


def _sweep(directory):
    """Removes what dead saves left: temporaries, and weights under step 1's names that config.json does not name."""
    try:
        named = _weights_named(directory)
        kept = {named}
        if named is not None and named.endswith(".json"):
            kept |= set(json.loads((directory / named).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, RecursionError, OSError):
        return  # a directory that does not load: nothing is thrown away
    for path in directory.iterdir():
        own = _SAVING.fullmatch(path.name)
        temporary = TEMPORARY.fullmatch(path.name) and path.name.startswith((".config.json.", ".model"))
        if (own or temporary) and path.name not in kept:
            path.unlink(missing_ok=True)


def _weights_named(directory):
    """The file of the weights that config.json names, or None. Raises ValueError where it is no JSON object."""
    try:
        values = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"{directory / CONFIG} holds no object")
    return values.get(WEIGHTS_KEY)


@contextmanager
def _one_saver(directory):
    """Waits until no other saver is in the directory. Yields False where the file system has no locks."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_pretrained: {directory} is a file; a directory to save to is required")
    directory.mkdir(parents=True, exist_ok=True)
    handle, alone = os.open(directory, os.O_RDONLY), True
    try:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            alone = False
            logger.warning(
                "save_pretrained: %s cannot be locked (%s): let one process save at a time", directory, error
            )
        try:
            yield alone
        finally:
            if alone:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile holds the handle, too
    finally:
        os.close(handle)


def _json(values):
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
