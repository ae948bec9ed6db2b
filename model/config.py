"""GPT2Config: what a checkpoint's config.json says, under Hugging Face's names.

Source: transformers.GPT2Config (5.x); the five sizes are those of the GPT-2 paper, table 2, and of distilgpt2.
"""

import functools
import json
import math
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from model.checkpoints.files import Source, blame, read_json_object
from model.checkpoints.saving import WEIGHTS_KEY, save_config

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "torch_dtype": "dtype",
}

# Dropouts that Hugging Face's heads look for, but its config does not declare. Kept in `extra`; None: not given.
UNDECLARED = ("classifier_dropout", "hidden_dropout", "summary_last_dropout")

PRESETS = {
    "distilgpt2": {"n_layer": 6},
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_POSITIVE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
_OPTIONAL_FLAGS = ("output_hidden_states", "output_attentions", "return_dict", "use_cache")
_FLAGS = (
    *_OPTIONAL_FLAGS,
    "summary_use_proj",
    "summary_proj_to_labels",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "add_cross_attention",
    "tie_word_embeddings",
    "is_encoder_decoder",
)
# More than these is a damaged file or a slip, and would take minutes or all memory before anybody noticed.
MOST_LAYERS, MOST_LABELS, MOST_PARAMETERS = 4096, 2**20, 2**40
_SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _accept_aliases(cls):
    """Lets the constructor take num_labels and the names in ALIASES and UNDECLARED; these are attributes, too."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, num_labels=None, **kwargs):
        if "model_type" in kwargs:  # GPT2Config(**config.to_dict()), whose keys need not be fields
            kwargs = cls.sorted_keys(kwargs)
        for alias in ALIASES.keys() & kwargs.keys():
            name = ALIASES[alias]
            if name in kwargs:
                raise TypeError(f"GPT2Config: both {name} and its alias {alias} were given; give one")
            kwargs[name] = kwargs.pop(alias)
        if not isinstance(kwargs.get("extra", {}), dict):
            raise TypeError(
                f"GPT2Config: extra is {brief(kwargs['extra'])}; it must be a dict, as config.json's own keys"
            )
        undeclared = {name: kwargs.pop(name) for name in UNDECLARED if name in kwargs}
        if undeclared:
            kwargs["extra"] = {**kwargs.get("extra", {}), **undeclared}
        init(self, *args, **kwargs)
        if num_labels is not None:
            self.num_labels = num_labels

    cls.__init__ = __init__
    for alias, name in ALIASES.items():
        getter = functools.partial(lambda name, self: getattr(self, name), name)
        setter = functools.partial(lambda name, self, value: setattr(self, name, value), name)
        setattr(cls, alias, property(getter, setter, doc=f"Another name of {name}."))
    for name in UNDECLARED:
        getter = functools.partial(lambda name, self: self.extra.get(name), name)
        setter = functools.partial(lambda name, self, value: self.extra.update({name: value}), name)
        setattr(cls, name, property(getter, setter, doc="None where it is not given."))
    return cls


def token_list(token):
    """None, one id or several, as a list."""
    return [] if token is None else [token] if isinstance(token, int) else list(token)


def _two_labels():
    return {0: "LABEL_0", 1: "LABEL_1"}


def _labels(given):
    """id2label with integers for keys, which JSON writes as strings."""
    if not isinstance(given, dict) or len(given) > MOST_LABELS:
        raise ValueError(f"GPT2Config: id2label is {brief(given)}; it must be {{id: label}} of at most {MOST_LABELS}")
    try:
        return {int(index): label for index, label in given.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"GPT2Config: id2label is {brief(given)}; its keys must be integers") from error


def is_integer(value, least):
    """Whether it is an int, no bool, and at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def brief(value, most=60):
    """A value as an error shows it: not a megabyte of it."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


@_accept_aliases
@dataclass
class GPT2Config:
    """The architecture and the defaults of a GPT-2 model. Validated on construction; raises ValueError or TypeError.

    n_inner: width of the MLP, 4 * n_embd if None. `extra` holds the keys of a config.json that are no field here: they
    are kept and written back. `dtype` is a torch.dtype or its name.

    bos, eos and pad_token_id default to GPT-2's; with a vocabulary of your own give its own, or None:
    GPT2Config(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id).
    One that lies outside the vocabulary can be neither fed nor said: a UserWarning names it.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    dtype: torch.dtype | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    is_encoder_decoder: bool = False
    chunk_size_feed_forward: int = 0
    id2label: dict[int, str] | None = field(default_factory=_two_labels)
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    architectures: list[str] | None = None
    extra: dict = field(default_factory=dict, repr=False)

    model_type = "gpt2"

    def __post_init__(self):
        if isinstance(self.dtype, str):
            self.dtype = getattr(torch, self.dtype.removeprefix("torch."), self.dtype)
        self.id2label = _labels(_two_labels() if self.id2label is None else self.id2label)
        if self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}
        self.validate()
        self.warn_of_special_tokens()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GPT2Config":
        """The config of a published size: distilgpt2, gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
        if name not in PRESETS:
            raise ValueError(f"GPT2Config.preset: unknown size {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def num_labels(self) -> int:
        return len(self.id2label or {})

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if not is_integer(count, 1) or count > MOST_LABELS:
            raise ValueError(f"GPT2Config: num_labels is {brief(count)}; it must be from 1 to {MOST_LABELS}")
        if count != len(self.id2label or {}):
            self.id2label = {i: f"LABEL_{i}" for i in range(count)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @classmethod
    def names(cls) -> set[str]:
        """The fields of a config.json, their aliases among them."""
        return {f.name for f in fields(cls)} - {"extra"} | ALIASES.keys() | {"num_labels", *UNDECLARED}

    def validate(self) -> None:
        """Raises ValueError or TypeError, naming the field, where the values describe no GPT-2 that could be built."""
        for name in _POSITIVE + (() if self.n_inner is None else ("n_inner",)):
            self._require(name, is_integer(getattr(self, name), 1), "a positive integer")
        self._require("n_layer", self.n_layer <= MOST_LAYERS, f"at most {MOST_LAYERS}")
        for name in _PROBABILITIES + tuple(name for name in UNDECLARED if getattr(self, name) is not None):
            self._require(name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and 0 < value < math.inf, "greater than 0 and finite")
        for name in _FLAGS:
            value = getattr(self, name)
            self._require(name, isinstance(value, bool) or (value is None and name in _OPTIONAL_FLAGS), "true or false")
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple)) and len(value) > 0
            ids = value if several else [value]
            self._require(name, value is None or all(is_integer(i, 0) for i in ids), "a token id, at least 0, or None")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPT2Config: n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        sizes = self.vocab_size + self.n_positions + self.n_layer * (4 * self.n_embd + 2 * self.inner_dim)
        if sizes * self.n_embd > MOST_PARAMETERS:
            fields = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner")
            came = ", ".join(f"{name} {getattr(self, name)}" for name in fields)
            raise ValueError(f"GPT2Config: {came}: {sizes * self.n_embd} parameters, {MOST_PARAMETERS} are the most")
        self._require(
            "dtype",
            self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point),
            "a floating-point torch.dtype or its name",
        )
        self._require("activation_function", isinstance(self.activation_function, str), "a name")
        for name, allowed in (("summary_type", _SUMMARY_TYPES), ("problem_type", (None, *_PROBLEM_TYPES))):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in allowed:
                named = ", ".join(map(str, allowed))
                raise ValueError(f"GPT2Config: {name} is {brief(value)}; choose one of {named}")
        if self.is_encoder_decoder:
            raise ValueError("GPT2Config: is_encoder_decoder is not supported; this is the decoder alone")

    def _require(self, name, fulfilled, what):
        if not fulfilled:
            raise ValueError(f"GPT2Config: {name} is {brief(getattr(self, name))}; it must be {what}")

    def special_tokens(self) -> dict:
        """The ids of bos, eos (perhaps several) and pad, by field: a list each."""
        return {name: token_list(getattr(self, name)) for name in SPECIAL_TOKENS}

    def warn_of_special_tokens(self, stacklevel: int = 5) -> None:  # 5: whoever called GPT2Config
        """Warns of special ids outside the vocabulary, which generation would wait for, or pad with, in vain."""
        outside = [name for name, ids in self.special_tokens().items() if any(i >= self.vocab_size for i in ids)]
        if outside:
            came = ", ".join(f"{name}={getattr(self, name)}" for name in outside)
            advice = ", ".join(f"{name}=..." for name in outside)
            warnings.warn(
                f"GPT2Config: {came}: outside the vocabulary of {self.vocab_size} tokens; no text will end there. Give "
                f"your tokenizer's own ids, or None: GPT2Config(vocab_size={self.vocab_size}, {advice})",
                stacklevel=stacklevel,
            )

    @classmethod
    def from_dict(cls, values: dict, **overrides: Any) -> "GPT2Config":
        """A config from the keys of a config.json; keys that are no field are kept in `extra`."""
        return cls(**cls.sorted_keys({**values, **overrides}))

    @classmethod
    def sorted_keys(cls, values: dict) -> dict:
        """The keys of a config.json as the constructor's arguments: what is no field stands in `extra`."""
        values = dict(values)
        model_type = values.pop("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(f"GPT2Config: model_type is {model_type!r}; it must be 'gpt2'")
        for key in ("transformers_version", "_name_or_path", WEIGHTS_KEY):  # they describe the files, not the model
            values.pop(key, None)
        if "n_positions" not in values and "max_position_embeddings" not in values and "n_ctx" in values:
            values["n_positions"] = values["n_ctx"]
        for alias, name in ALIASES.items():
            if alias in values:
                value = values.pop(alias)
                values.setdefault(name, value)
        known = {key: value for key, value in values.items() if key in cls.names()}
        extra = {key: value for key, value in values.items() if key not in known and key != "extra"}
        return {**known, "extra": {**values.get("extra", {}), **extra}}

    @classmethod
    def from_json_file(cls, path: str | os.PathLike, **overrides: Any) -> "GPT2Config":
        """Reads a config.json. Raises ValueError if it is not a JSON object."""
        with blame(path):
            return cls.from_dict(read_json_object(path), **overrides)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **kw: Any,
    ) -> Any:
        """Reads the config.json of a directory or of a Hugging Face Hub repository; `kw` overrides its fields."""
        source = Source(pretrained_model_name_or_path, revision, cache_dir, local_files_only, token)
        return cls.from_json_file(source.require("config.json"), **kw)

    def to_dict(self) -> dict:
        """Every field and every kept key, as config.json holds them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {**self.extra, **values, "model_type": self.model_type}

    def attention_scale(self, layer_idx: int) -> float:
        """What a layer's scores are multiplied by."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes config.json into the directory, which is created if need be."""
        save_config(directory, self.to_dict())
