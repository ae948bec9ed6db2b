"""GenerationConfig: the defaults of a model's generate(), as generation_config.json holds them."""

import copy
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from model.checkpoints.atomic import write_file
from model.checkpoints.files import Source, read_json_object
from model.config import SPECIAL_TOKENS, GPT2Config
from model.generation.settings import Settings

FILE = "generation_config.json"
SETTINGS = {f.name for f in fields(Settings)}
NAMES = SETTINGS | {*SPECIAL_TOKENS, "stop_strings"}
_PROVENANCE = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")

# What transformers has beside these, at the values at which it does nothing for a model like this.
_NEUTRAL = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "guidance_scale": (1.0,),
    "cache_implementation": ("dynamic",),
}
_OF_OTHERS = (  # of encoders, assistants and compilers: nothing to obey without one
    "decoder_start_token_id",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "disable_compile",
    "compile_config",
)


class GenerationConfig:
    """Settings of generate() as attributes, and bos, eos and pad_token_id and stop_strings. None: not set.

    A special token that is not set is the model config's, as it is then. Other names are kept, and written back;
    generate() refuses them where they would ask for something.
    """

    def __init__(self, model_config: GPT2Config | None = None, **values: Any) -> None:
        self.__dict__["_model_config"] = model_config
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name):  # of what is not set
        if name in SPECIAL_TOKENS and self.__dict__.get("_model_config") is not None:
            return getattr(self._model_config, name)
        if name in NAMES:
            return None
        raise AttributeError(f"GenerationConfig has no {name!r}")

    def __eq__(self, other):
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self):
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @property
    def is_set(self) -> bool:
        """Whether anything is, beside the model config's special tokens."""
        return any(value is not None for name, value in self.__dict__.items() if name != "_model_config")

    def update(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict:
        """What is set, and the model config's special tokens."""
        own = {name: value for name, value in self.__dict__.items() if value is not None and name != "_model_config"}
        special = {name: getattr(self, name) for name in SPECIAL_TOKENS if getattr(self, name) is not None}
        return copy.deepcopy({**special, **own})

    to_diff_dict = to_dict  # where nothing has a default, what differs from the defaults is what is set

    @classmethod
    def from_model_config(cls, config: GPT2Config) -> "GenerationConfig":
        """Nothing but the special tokens of a GPT2Config."""
        return cls(config)

    @classmethod
    def from_dict(cls, values: dict, model_config: GPT2Config | None = None) -> "GenerationConfig":
        """From the keys of a generation_config.json."""
        return cls(model_config, **{name: value for name, value in values.items() if name not in _PROVENANCE})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike, model_config: GPT2Config | None = None) -> "GenerationConfig":
        """Reads a generation_config.json. Raises ValueError if it is not a JSON object."""
        return cls.from_dict(read_json_object(path), model_config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **hub: Any) -> "GenerationConfig":
        """Reads the generation_config.json of a directory or of a Hub repository; hub: as GPT2.from_pretrained."""
        return cls.from_json_file(Source(pretrained_model_name_or_path, **hub).require(FILE))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes generation_config.json into the directory, which is created if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / FILE, self.to_json_string().encode())

    def to_json_string(self) -> str:
        values = {name: value for name, value in self.to_dict().items() if not callable(value)}
        bias = values.get("sequence_bias")
        if isinstance(bias, dict):  # JSON has no tuples as keys
            values["sequence_bias"] = [[list(ids), value] for ids, value in bias.items()]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def is_neutral(name, value):
    """Whether a setting of transformers' that is none of ours asks for nothing here."""
    return value is None or value is False or name in _OF_OTHERS or value in _NEUTRAL.get(name, ())


def merge(own, given, arguments):
    """The values for one call of generate, by name: its arguments, else the config given to it, else the model's own.

    given: a GenerationConfig, transformers', or a dict; what is None in a config is not set; None as an argument is a
    value. Raises ValueError where a config asks for what generate() cannot do.
    """
    values = {}
    for where, config in (("model.generation_config", own), ("generation_config", given)):
        if config is None:
            continue
        if not isinstance(config, dict) and not callable(getattr(config, "to_dict", None)):
            raise TypeError(
                f"generate: generation_config is {type(config).__name__}; a GenerationConfig or a dict is required"
            )
        found = config if isinstance(config, dict) else config.to_dict()
        for name, value in found.items():
            if name in NAMES:
                if value is not None:
                    values[name] = value
            elif not (is_neutral(name, value) or name in _PROVENANCE):
                raise ValueError(
                    f"generate: {where}.{name} is {value!r}; generate() has no such setting; None goes without"
                )
    if arguments.get("max_length") is not None and arguments.get("max_new_tokens") is None:
        values.pop("max_new_tokens", None)  # it would win, against what this call asks for
    return {**values, **arguments}
