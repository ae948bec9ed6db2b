"""The base class of the models, and how a checkpoint's tensors become a model's parameters.

Weights are mapped, not copied: the model is built without storage and takes the file's tensors as its own.
"""

import copy
import inspect
import logging
import os
import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.checkpoints.files import Source, blame, check_path, listed, read_checkpoint
from model.checkpoints.saving import save_checkpoint
from model.config import GPT2Config
from model.layers.embeddings import TokenEmbeddings
from model.layers.initialisation import init_weights
from model.layers.ops import check_kernels_name

logger = logging.getLogger(__name__)

# The causal mask that old checkpoints stored in each layer.
_MASK_BUFFER = re.compile(r"(^|\.)h\.\d+\.(cross)?att(entio)?n\.(bias|masked_bias)$")
_LAYER = re.compile(r"(?:.*\.)?h\.(\d{1,9})\.")
_HEADS = ("lm_head.", "multiple_choice_head.", "score.", "classifier.", "qa_outputs.")


_CHECKPOINT_OPTIONS = {"preserve_rng_state"} | {
    name for name, value in inspect.signature(checkpoint).parameters.items() if value.kind is value.KEYWORD_ONLY
}

# What DataParallel and DistributedDataParallel, torch.compile, PEFT and others write before each key.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")


class PretrainedModel(TokenEmbeddings, nn.Module):
    """Base of the models: a config, from_pretrained and save_pretrained."""

    _require_grads_hook = None
    head_name: str | None = None  # of a head that plain GPT-2 checkpoints lack

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = check_config(type(self), config)
        config.validate()

    @property
    def device(self) -> torch.device:
        return _first_parameter(self).device

    @property
    def dtype(self) -> torch.dtype:
        return _first_parameter(self).dtype

    def num_parameters(self) -> int:
        """How many parameters there are; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def can_generate(self) -> bool:
        """Whether the model has generate(), which others ask before they call it."""
        return hasattr(self, "generate")

    def __getattr__(self, name):
        if name == "hf_device_map":  # hasattr() of it must stay False: accelerate would take the model for its own
            raise AttributeError(
                f"{type(self).__name__} has no hf_device_map: its weights lie on one device, model.device; .to() moves"
            )
        return super().__getattr__(name)

    def read_beside(self, source: Any) -> None:
        """Reads what a checkpoint holds beside its config and its weights. Nothing, unless a model says otherwise."""

    def write_beside(self, directory: str | os.PathLike) -> None:
        """Writes what read_beside() reads."""

    def tie_weights(self) -> None:
        """Makes one parameter of those that the config ties. Nothing, unless a model says otherwise."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """In training, recomputes each block in the backward pass rather than keeping what it computed.

        gradient_checkpointing_kwargs: those of torch.utils.checkpoint.checkpoint, by default {"use_reentrant": False}.
        """
        given = gradient_checkpointing_kwargs or {}
        if not isinstance(given, dict):
            raise TypeError(f"gradient_checkpointing_enable: {given!r} came; a dict of options is required")
        options = {"use_reentrant": False, **given}
        for name in options.keys() - _CHECKPOINT_OPTIONS:
            known = ", ".join(sorted(_CHECKPOINT_OPTIONS))
            raise TypeError(f"gradient_checkpointing_enable: {name!r} is no option of torch's checkpoint(): {known}")
        self._set_checkpointing(options)

    def gradient_checkpointing_disable(self) -> None:
        self._set_checkpointing(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "checkpointing", None) is not None for module in self.modules())

    def _set_checkpointing(self, options):
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = options

    def enable_input_require_grads(self) -> None:
        """Lets gradients reach what wte looks up where its weight is frozen, as training adapters needs it."""
        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undoes enable_input_require_grads()."""
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
            self._require_grads_hook = None

    def set_kernel_implementation(self, name: str) -> None:
        """Chooses what computes LayerNorm, GELU and the loss: "auto", "triton" or "torch" (model/layers/ops.py)."""
        check_kernels_name(name)
        module: Any
        for module in self.modules():
            if hasattr(module, "kernel_implementation"):
                module.kernel_implementation = name

    @classmethod
    @torch.inference_mode(False)  # weights made in that mode could never be trained
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: GPT2Config | None = None,
        attn_implementation: str = "auto",
        kernel_implementation: str = "auto",
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        strict: bool = True,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Any:
        """A model with the weights of a directory or of a Hub repository, in eval mode, on torch's default device.

        dtype: of the weights; "auto", as in transformers 5, takes config.json's, or else the one they are stored in.
        torch_dtype is its old name. overrides: fields of the config. Raises FileNotFoundError where a file is missing,
        ValueError for a damaged file, a missing or (unless strict=False) unexpected key, a tensor of another shape.
        Where a model of model/heads.py finds nothing of its head, it initialises it, and a logged warning says so.
        """
        device = torch.get_default_device()
        if device.type == "meta":
            raise ValueError(
                f"{cls.__name__}.from_pretrained: torch's default device is meta, which holds no weights; call it "
                f"elsewhere, or make a model without weights by {cls.__name__}(config)"
            )
        source = Source(pretrained_model_name_or_path, revision, cache_dir, local_files_only, token)
        unknown = sorted(overrides.keys() - GPT2Config.names())
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained: unexpected argument {unknown[0]!r}; a field of "
                "GPT2Config goes by its own name, as attn_pdrop=0.1"
            )
        stored = read_checkpoint(source, needs_config=config is None)
        if config is None:
            with blame(stored.config_path):
                config = GPT2Config.from_dict(stored.config)
        else:
            config = copy.deepcopy(check_config(cls, config))
        for key, value in overrides.items():
            setattr(config, key, value)
        config.validate()
        with blame(stored.weights_path):
            _check_layers(cls, config, stored.tensors)
        make: Any = cls  # a subclass: this one takes no backend
        with torch.device("meta"):
            model = make(config, attn_implementation=attn_implementation)
        model.set_kernel_implementation(kernel_implementation)
        dtype = torch_dtype if torch_dtype is not None else dtype
        if not isinstance(dtype, str | torch.dtype | None):
            raise TypeError(f"from_pretrained: dtype is {dtype!r:.60}; it must be a torch.dtype, its name, or 'auto'")
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise ValueError(f"from_pretrained: dtype is {dtype}; weights must be floating-point")
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else replace(config, dtype=dtype).dtype
        with blame(stored.weights_path):
            load_weights(model, stored.tensors, dtype=dtype, strict=strict)
        model.to(device)
        model.config.dtype = model.dtype
        model.read_beside(source)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike, *, max_shard_size: int | str | None = None) -> None:
        """Writes config.json and the weights as safetensors; other weights files there are removed.

        At every instant the directory loads as what it held before, or as this model: model/checkpoints/saving.py.
        max_shard_size: bytes, or words such as "2GB": larger checkpoints are written as shards with an index.
        """
        check_path("save_pretrained", "directory", directory)
        self.config.architectures = [ARCHITECTURES.get(type(self).__name__, type(self).__name__)]
        self.config.dtype = self.dtype
        tensors, is_tied = _own_tensors(self)
        if is_tied is not None and is_tied != self.config.tie_word_embeddings:
            logger.warning(
                "%s.save_pretrained: config.tie_word_embeddings is %s, but lm_head.weight %s; saved as it is",
                type(self).__name__,
                self.config.tie_word_embeddings,
                "is wte.weight" if is_tied else "is a tensor of its own",
            )
        config = copy.copy(self.config)
        config.tie_word_embeddings = config.tie_word_embeddings if is_tied is None else is_tied
        save_checkpoint(directory, config.to_dict(), tensors, max_shard_size)
        self.write_beside(directory)


# What Hugging Face calls the classes whose name is not the same here.
ARCHITECTURES = {"GPT2": "GPT2LMHeadModel"}


def _first_parameter(module):
    """The first of module.parameters(), which takes ten times as long to begin."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def check_config(cls, config):
    """The config, if it is one."""
    if not isinstance(config, GPT2Config):
        raise TypeError(f"{cls.__name__}: config is {type(config).__name__}; it must be a GPT2Config")
    return config


def _check_layers(cls, config, tensors):
    """Raises ValueError where the config and the weights are of different depth, before a model of it is built."""
    layers = {int(found[1]) for found in map(_LAYER.match, tensors) if found}
    if layers and max(layers) + 1 < config.n_layer:
        raise ValueError(
            f"{cls.__name__}.from_pretrained: n_layer is {config.n_layer}, but the weights end with "
            f"h.{max(layers)}; the checkpoint lacks h.{max(layers) + 1} and what follows"
        )


def load_weights(model, tensors, *, dtype=None, strict=True):
    """Gives a checkpoint's tensors to a model, whose parameters they become; dtype None keeps each tensor's own.

    The prefix `transformer.` may be there or not, and so may those of wrappers (_WRAPPERS) before all keys; stored
    causal masks are dropped, and heads that this model does not have are left out. A head of model/heads.py that is
    missing as a whole is initialised, with a warning.
    """
    wanted = model.state_dict()
    tensors = _without_wrappers(tensors)
    prefix = "transformer." if any(key.startswith("transformer.") for key in wanted) else ""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    found, unexpected = {}, []
    for key, tensor in tensors.items():
        bare = key.removeprefix("transformer.")
        name = bare if bare.startswith(_HEADS) else prefix + bare
        if name in wanted:
            if name in found:
                raise ValueError(f"from_pretrained: the checkpoint holds {name} twice, with and without its prefix")
            found[name] = tensor
        elif not _MASK_BUFFER.search(key) and not bare.startswith(_HEADS):
            unexpected.append(key)

    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:  # which may be the only one of the two names
        found.setdefault(prefix + "wte.weight", tensors["lm_head.weight"])
    for key, tensor in found.items():
        if not tensor.is_floating_point():
            raise ValueError(f"from_pretrained: {key} is {tensor.dtype}; weights must be floating-point")
    embedding = found.get(prefix + "wte.weight")
    if tied in wanted and embedding is not None:
        if not _equal(found.get(tied, embedding), embedding):
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
        raise ValueError(f"{name}.from_pretrained: the checkpoint lacks {listed(missing)}")
    if unexpected and strict:
        raise ValueError(
            f"{name}.from_pretrained: the checkpoint has also {listed(unexpected)}; strict=False allows it"
        )
    misshapen = [
        f"{key} {tuple(found[key].shape)}, the config asks for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key not in new and found[key].shape != tensor.shape
    ]
    if misshapen:
        raise ValueError(f"{name}.from_pretrained: wrong shapes: {listed(misshapen)}")
    if new:
        logger.warning("%s.from_pretrained: %s: not in the checkpoint, so new; to be trained", name, ", ".join(new))
        found.update(_initialised_head(model, dtype or embedding.dtype))
    if dtype is not None:
        found = {key: tensor.to(dtype) for key, tensor in found.items()}
    model.load_state_dict(found, assign=True)
    model.requires_grad_(True)
    model.tie_weights()


def _require_grad(module, arguments, output):
    output.requires_grad_(True)


def _without_wrappers(tensors):
    """The tensors without the prefixes of _WRAPPERS, as far as every key has them."""
    while tensors:
        prefix = next((p for p in _WRAPPERS if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _equal(a, b):
    """Whether two tensors hold the same values; NaN is equal to NaN, so a model that diverged can be looked at."""
    return a is b or torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _initialised_head(model, dtype):
    """The tensors of a model's head, by their names in the model, as initialisation makes them."""
    head = model.get_submodule(model.head_name).to_empty(device="cpu").to(dtype)
    init_weights(head, model.config)
    return {f"{model.head_name}.{key}": tensor for key, tensor in head.state_dict().items()}


def _own_tensors(model):
    """(The state dict without the second name of a tied head, whether the head is tied; None where there is none).

    The tensors decide, not the config: they may have been tied or untied since. Others in one place are written twice.
    """
    tensors = model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(f'{type(model).__name__}.save_pretrained: weights are on device "meta"; they hold no values')
    head, embedding, is_tied = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight"), None
    if head is not None:
        is_tied = head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride()
        if is_tied:
            del tensors["lm_head.weight"]
    seen = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors, is_tied
