"""Reading the files of a checkpoint in Hugging Face's layout: where they come from, and what is refused.

A checkpoint is a config.json beside the weights that it names, or else beside one of: model.safetensors,
model.safetensors.index.json and its shards, pytorch_model.bin, pytorch_model.bin.index.json and its shards; the first
that exists is read. A damaged file is a ValueError that names it and, where one is to blame, the tensor.
"""

import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from model.checkpoints.saving import CONFIG, FORMATS, WEIGHTS_KEY

_STATE_DICTS = ("model", "state_dict", "model_state_dict")  # keys of a pickle that holds more than the weights
_MOST_READS = 100  # of a directory that is saved to all the while


def check_path(function, name, value):
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{function}: {name} is {value!r:.60}; it must be a path, as a str or a Path")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's files come from: a directory, or a repository of the Hub through its cache."""

    name_or_path: str | os.PathLike
    revision: str | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    token: str | bool | None = None

    def __post_init__(self):
        check_path("from_pretrained", "pretrained_model_name_or_path", self.name_or_path)

    def find(self, filename):
        """The path of a file, fetched if it must be, or None if the checkpoint has no such file."""
        directory = Path(self.name_or_path)
        if directory.is_dir():
            path = directory / filename
            return path if path.is_file() else None
        from huggingface_hub import constants, errors, hf_hub_download

        name = str(self.name_or_path)
        offline = self.local_files_only or constants.HF_HUB_OFFLINE
        try:
            path = hf_hub_download(
                name,
                filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=offline,
                token=self.token,
            )
        except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
            raise FileNotFoundError(
                f"from_pretrained: {name!r} is neither a directory nor a repository that the Hub shows to you: {error}"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            if not offline:
                raise FileNotFoundError(
                    f"from_pretrained: the Hub cannot be reached, and its cache holds no {filename} of {name!r}"
                ) from error
            return None
        except errors.EntryNotFoundError:
            return None
        return Path(path)

    def require(self, filename):
        """As find, but raises FileNotFoundError where there is no such file."""
        path = self.find(filename)
        if path is None:
            raise FileNotFoundError(f"from_pretrained: {self._where()} holds no {filename}")
        return path

    def weights(self, config):
        """The weights file that config.json's values name, or the first that exists, as the module's docstring says."""
        named = config.get(WEIGHTS_KEY)
        if named is not None:
            if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
                raise ValueError(
                    f"from_pretrained: {CONFIG} of {self._where()} has {WEIGHTS_KEY} {named!r}; it must be the name of "
                    "a safetensors file or of its index"
                )
            return self.require(_beside(named, CONFIG))
        for filename in FORMATS:
            path = self.find(filename)
            if path is not None:
                return path
        raise FileNotFoundError(f"from_pretrained: {self._where()} holds none of {', '.join(FORMATS)}")

    def _where(self):
        if Path(self.name_or_path).is_dir():
            return f"directory {self.name_or_path}"
        return f"repository {str(self.name_or_path)!r} (or, offline, its cache)"


@dataclass(frozen=True)
class Checkpoint:
    """The values of config.json, every tensor by its name in the file, and the files that they are from."""

    config: dict
    config_path: Path | None
    tensors: dict
    weights_path: Path


@contextmanager
def blame(path):
    """Makes a refusal of what a file holds a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error} [{path}]") from error


def read_checkpoint(source, *, needs_config=True):
    """The Checkpoint of a source: config and weights of one save, though another may go on meanwhile.

    Tensors are memory-mapped where the format allows it. needs_config: False takes {} where there is no config.json.
    """
    for _ in range(_MOST_READS):
        path = source.require(CONFIG) if needs_config else source.find(CONFIG)
        if path is None:
            return Checkpoint({}, path, *_read_weights(source, {}))
        with open(path, "rb") as file:  # held open, so that its inode number means this file
            try:
                config = read_json_object(path)
                checkpoint = Checkpoint(config, path, *_read_weights(source, config))
            except (ValueError, OSError):
                if _is_still(file, path):
                    raise
            else:
                if _is_still(file, path):
                    return checkpoint
    raise OSError(f"from_pretrained: {path} was replaced {_MOST_READS} times while its checkpoint was read")


def _is_still(file, path):
    """Whether the path leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def read_json_object(path):
    """The object in a JSON file. Raises ValueError, naming the file, where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_pretrained: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_pretrained: {path} holds {type(values).__name__}; it must be an object")
    return values


def _read_weights(source, config):
    """(every tensor, the file that holds them or their index)"""
    path = source.weights(config)
    if path.suffix != ".json":
        return read_tensors(path), path
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"from_pretrained: {path} is not a shard index; it must have a weight_map of keys to files")
    tensors = {}
    for filename in sorted(set(files.values())):
        if not filename.endswith((".safetensors", ".bin")):
            raise ValueError(f"from_pretrained: {path} names {filename!r}; it must be a .safetensors or .bin file")
        shard = read_tensors(source.require(_beside(filename, path)))
        promised = [key for key, where in files.items() if where == filename]
        absent = [key for key in promised if key not in shard]
        if absent:
            raise ValueError(f"from_pretrained: shard {filename} lacks {listed(absent)}, which {path} promises")
        foreign = sorted(shard.keys() - set(promised))
        if foreign:
            raise ValueError(
                f"from_pretrained: shard {filename} holds {listed(foreign)}, which {path} does not place there"
            )
        tensors.update(shard)
    return tensors, path


def _beside(filename, path):
    """A file's name, if it is one and not a way to elsewhere."""
    if Path(filename).name != filename or filename in ("", ".", "..") or "\0" in filename or "\\" in filename:
        raise ValueError(f"from_pretrained: {path} names {filename!r}; a weights file must lie beside it")
    return filename


def read_tensors(path):
    """The tensors of one safetensors file, or of one pickle by torch.load(weights_only=True).

    Each has storage of its own, or its own part of the file's. Raises ValueError for everything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path)))
    except (MemoryError, PermissionError, FileNotFoundError):
        raise
    except pickle.UnpicklingError as error:  # whose text advises to trust the file
        raise ValueError(f"from_pretrained: {path} is damaged or holds more than tensors; not loaded") from error
    except Exception as error:  # the readers raise of a damaged file whatever they stumble over
        raise ValueError(f"from_pretrained: {path} is truncated or damaged: {_first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"from_pretrained: {path} holds {type(tensors).__name__}; it must be a dict of tensors")
    for key, tensor in tensors.items():
        fault = _fault(key, tensor)
        if fault:
            raise ValueError(f"from_pretrained: {path}: {key!r} is {fault}; it must be a dense tensor of values")
    return _apart(tensors)


def _state_dict(loaded):
    """The state dict of a pickle: all of it, or what a training script keeps beside its optimizer and its step."""
    for name in _STATE_DICTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            return loaded[name]
    return loaded


def _can_be_mapped(path):
    """Whether a file is a zip whose members lie in it as they are; compressed bytes would be read as numbers."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _fault(key, tensor):
    """What is wrong with an entry of a pickle, or None."""
    if not isinstance(key, str):
        return "no name"
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    if tensor.is_meta:
        return "a tensor without values (meta)"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized:
        return "quantised"
    return None


def _apart(tensors):
    """The same values, where no two tensors share memory and each lies in order: they become parameters, one by one."""
    seen, apart = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return apart


def _first_line(error):
    return str(error).partition("\n")[0] or type(error).__name__


def listed(items, most=5):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
