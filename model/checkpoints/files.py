"""The files of a checkpoint in Hugging Face's layout: where they come from, reading, writing.

A checkpoint is a config.json beside one of: model.safetensors, model.safetensors.index.json and its shards,
pytorch_model.bin, pytorch_model.bin.index.json and its shards; the first that exists is read.
"""

import json
import os
import pickle
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_SINGLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"
_FORMATS = (_SINGLE, _SHARDED, "pytorch_model.bin", "pytorch_model.bin.index.json")
_STATE_DICTS = ("model", "state_dict", "model_state_dict")  # keys of a pickle that holds more than the weights
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's files come from: a directory, or a repository of the Hub through its cache."""

    name_or_path: str | os.PathLike
    revision: str | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    token: str | bool | None = None

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

    def weights(self):
        """The first weights file that exists, in the order of the module's docstring."""
        for filename in _FORMATS:
            path = self.find(filename)
            if path is not None:
                return path
        raise FileNotFoundError(f"from_pretrained: {self._where()} holds none of {', '.join(_FORMATS)}")

    def _where(self):
        if Path(self.name_or_path).is_dir():
            return f"directory {self.name_or_path}"
        return f"repository {str(self.name_or_path)!r} (or, offline, its cache)"


def read_checkpoint(source):
    """Every tensor of a checkpoint, by its name in the file; memory-mapped where the format allows it."""
    path = source.weights()
    if path.suffix != ".json":
        return read_tensors(path)
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"from_pretrained: {path} is not a shard index with a weight_map: {error!r}") from error
    tensors = {}
    for filename in sorted(set(files.values())):
        if Path(filename).name != filename:
            raise ValueError(f"from_pretrained: {path} names {filename!r}; a shard must lie beside its index")
        shard = read_tensors(source.require(filename))
        absent = [key for key, where in files.items() if where == filename and key not in shard]
        if absent:
            raise ValueError(f"from_pretrained: shard {filename} lacks {listed(absent)}, which its index promises")
        tensors.update(shard)
    return tensors


def read_tensors(path):
    """The tensors of one safetensors file, or of one pickle by torch.load(weights_only=True)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except pickle.UnpicklingError as error:
        raise ValueError(f"from_pretrained: {path} is damaged or holds more than tensors; not loaded") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"from_pretrained: {path} is truncated or damaged: {error}") from error


def _state_dict(loaded):
    """The state dict of a pickle: all of it, or what a training script keeps beside its optimizer and its step."""
    for name in _STATE_DICTS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            return loaded[name]
    return loaded


def write_checkpoint(directory, tensors, max_shard_size=None):
    """Writes tensors as model.safetensors, or as shards of at most max_shard_size with their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    total = sum(tensor.nbytes for tensor in tensors.values())
    plan = split_torch_state_dict_into_shards(
        tensors, max_shard_size=total if max_shard_size is None else max_shard_size
    )
    for filename, keys in plan.filename_to_tensors.items():
        with replace_file(directory / filename) as path:
            save_file({key: tensors[key].contiguous() for key in keys}, path, metadata={"format": "pt"})
    written = set(plan.filename_to_tensors)
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        with replace_file(directory / _SHARDED) as path:
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.add(_SHARDED)
    for path in directory.iterdir():  # what an earlier save left would be read instead, or for nothing
        if (path.name in _FORMATS or _SHARD.fullmatch(path.name)) and path.name not in written:
            path.unlink()


@contextmanager
def replace_file(path):
    """Gives a temporary path beside `path`, renamed to it on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def listed(items, most=5):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
