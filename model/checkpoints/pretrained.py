"""Checkpoints in Hugging Face's layout, from a directory or the Hub, both ways.

A checkpoint is a config.json beside one of: model.safetensors, model.safetensors.index.json and its shards,
pytorch_model.bin, pytorch_model.bin.index.json and its shards; the first that exists is read. Weights are mapped, not
copied: the model is built without storage and takes the file's tensors as its own.
"""

import copy
import json
import logging
import os
import pickle
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from model.config import GPT2Config
from model.layers.ops import check_kernels_name

logger = logging.getLogger(__name__)

_SINGLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"
_FORMATS = (_SINGLE, _SHARDED, "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# The causal mask that old checkpoints stored in each layer.
_MASK_BUFFER = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$")
_HEADS = ("lm_head.", "multiple_choice_head.", "score.", "classifier.", "qa_outputs.")


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


class PretrainedModel(nn.Module):
    """Base of the models: a config, from_pretrained and save_pretrained."""

    head_name = None  # of a head that plain GPT-2 checkpoints lack

    def __init__(self, config):
        super().__init__()
        config.validate()
        self.config = config

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def num_parameters(self):
        """How many parameters there are; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def tie_weights(self):
        """Makes one parameter of those that the config ties. Nothing, unless a model says otherwise."""

    def gradient_checkpointing_enable(self, enabled=True):
        """In training, recomputes each block in the backward pass rather than keeping what it computed."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled

    def set_kernel_implementation(self, name):
        """Chooses what computes LayerNorm, GELU and the loss: "auto", "triton" or "torch" (model/layers/ops.py)."""
        check_kernels_name(name)
        for module in self.modules():
            if hasattr(module, "kernel_implementation"):
                module.kernel_implementation = name

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        *,
        config=None,
        attn_implementation="auto",
        kernel_implementation="auto",
        dtype="auto",
        torch_dtype=None,
        strict=True,
        revision=None,
        cache_dir=None,
        local_files_only=False,
        token=None,
        **overrides,
    ):
        """A model with the weights of a directory or of a Hub repository, in eval mode.

        dtype: of the weights; "auto", as in transformers 5, takes config.json's, or else the one they are stored in.
        torch_dtype is its old name. overrides: fields of the config. Raises FileNotFoundError where a file is missing,
        ValueError for a damaged file, a missing or (unless strict=False) unexpected key, a tensor of another shape.
        Where a model of model/heads.py finds nothing of its head, it initialises it, and a logged warning says so.
        """
        source = Source(name_or_path, revision, cache_dir, local_files_only, token)
        unknown = sorted(overrides.keys() - GPT2Config.names())
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained: unexpected argument {unknown[0]!r}")
        config = copy.deepcopy(config) or GPT2Config.from_json_file(source.require("config.json"))
        for key, value in overrides.items():
            setattr(config, key, value)
        with torch.device("meta"):
            model = cls(config, attn_implementation=attn_implementation)
        model.set_kernel_implementation(kernel_implementation)
        dtype = torch_dtype if torch_dtype is not None else dtype
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else replace(config, dtype=dtype).dtype
        load_weights(model, read_checkpoint(source), dtype=dtype, strict=strict)
        model.config.dtype = model.dtype
        return model.eval()

    def save_pretrained(self, directory, *, max_shard_size=None):
        """Writes config.json and the weights as safetensors; other weights files there are removed.

        max_shard_size: bytes, or words such as "2GB": larger checkpoints are written as shards with an index.
        """
        directory = Path(directory)
        self.config.architectures = [ARCHITECTURES.get(type(self).__name__, type(self).__name__)]
        self.config.dtype = self.dtype
        self.config.save_pretrained(directory)
        write_checkpoint(directory, _own_tensors(self), max_shard_size)


# What Hugging Face calls the classes whose name is not the same here.
ARCHITECTURES = {"GPT2": "GPT2LMHeadModel"}


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
            raise ValueError(f"from_pretrained: shard {filename} lacks {_listed(absent)}, which its index promises")
        tensors.update(shard)
    return tensors


def read_tensors(path):
    """The tensors of one safetensors file, or of one pickle by torch.load(weights_only=True)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"from_pretrained: {path} is damaged or holds more than tensors; not loaded") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"from_pretrained: {path} is truncated or damaged: {error}") from error


def load_weights(model, tensors, *, dtype=None, strict=True):
    """Gives a checkpoint's tensors to a model, whose parameters they become; dtype None keeps each tensor's own.

    The prefix `transformer.` may be there or not, stored causal masks are dropped, and heads that this model does not
    have are left out. A head of model/heads.py that is missing as a whole is initialised, with a warning.
    """
    wanted = model.state_dict()
    prefix = "transformer." if any(key.startswith("transformer.") for key in wanted) else ""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    found, unexpected = {}, []
    for key, tensor in tensors.items():
        bare = key.removeprefix("transformer.")
        name = bare if bare.startswith(_HEADS) else prefix + bare
        if name in wanted:
            found[name] = tensor
        elif not _MASK_BUFFER.search(key) and not bare.startswith(_HEADS):
            unexpected.append(key)

    embedding = found.get(prefix + "wte.weight")
    if tied in wanted and embedding is not None:
        if not torch.equal(found.get(tied, embedding), embedding):
            raise ValueError(
                f"from_pretrained: {tied} differs from wte.weight, but tie_word_embeddings is true; pass "
                "tie_word_embeddings=False"
            )
        found[tied] = embedding

    name = type(model).__name__
    head = [key for key in wanted if model.head_name is not None and key.startswith(model.head_name + ".")]
    new = [] if any(key in found for key in head) else head
    missing = [key for key in wanted if key not in found and key not in new]
    if missing:
        raise ValueError(f"{name}.from_pretrained: the checkpoint lacks {_listed(missing)}")
    if unexpected and strict:
        raise ValueError(
            f"{name}.from_pretrained: the checkpoint has also {_listed(unexpected)}; strict=False allows it"
        )
    misshapen = [
        f"{key} {tuple(found[key].shape)}, the config asks for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key not in new and found[key].shape != tensor.shape
    ]
    if misshapen:
        raise ValueError(f"{name}.from_pretrained: wrong shapes: {_listed(misshapen)}")
    if new:
        logger.warning("%s.from_pretrained: %s: not in the checkpoint, so new; to be trained", name, ", ".join(new))
        found.update(_initialised_head(model, dtype or embedding.dtype))
    if dtype is not None:
        found = {key: tensor.to(dtype) for key, tensor in found.items()}
    model.load_state_dict(found, assign=True)
    model.requires_grad_(True)
    model.tie_weights()


def _initialised_head(model, dtype):
    """The tensors of a model's head, by their names in the model, as initialisation makes them."""
    from model.gpt2 import init_weights

    head = model.get_submodule(model.head_name).to_empty(device="cpu").to(dtype)
    init_weights(head, model.config)
    return {f"{model.head_name}.{key}": tensor for key, tensor in head.state_dict().items()}


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


def _own_tensors(model):
    """The state dict without the second name of a tied parameter."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _listed(items, most=5):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
