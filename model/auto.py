"""Hugging Face's Auto classes, of which every one has a single class to choose, and the page's names that are not here.

from model import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("gpt2")  # a GPT2
"""

import os
from typing import Any

from model.config import GPT2Config
from model.gpt2 import GPT2, GPT2Model
from model.heads import GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2ForTokenClassification


class _Auto:
    """Base: from_pretrained and from_config of the one class that there is to choose."""

    model_class: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise TypeError(f"{name}: it has no instances; call {name}.from_pretrained(...) or {name}.from_config(...)")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options: Any) -> Any:
        """As the class's own. Raises ValueError where config.json is another model's."""
        return cls.model_class.from_pretrained(name_or_path, **options)

    @classmethod
    def from_config(cls, config: GPT2Config, **implementations: Any) -> Any:
        """A model with new weights."""
        return cls.model_class(config, **implementations)


class AutoModel(_Auto):
    model_class = GPT2Model


class AutoModelForCausalLM(_Auto):
    model_class = GPT2


class AutoModelForSequenceClassification(_Auto):
    model_class = GPT2ForSequenceClassification


class AutoModelForTokenClassification(_Auto):
    model_class = GPT2ForTokenClassification


class AutoModelForQuestionAnswering(_Auto):
    model_class = GPT2ForQuestionAnswering


class AutoConfig:
    """GPT2Config under the name of its Auto class."""

    def __init__(self) -> None:
        raise TypeError("AutoConfig: it has no instances; call AutoConfig.from_pretrained(name_or_path)")

    from_pretrained = GPT2Config.from_pretrained


_TOKENIZERS = ("AutoTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast", "TFGPT2Tokenizer")
_HERE = {
    "GPT2Model": "GPT2Model",
    "GPT2LMHeadModel": "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel": "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification": "GPT2ForSequenceClassification",
    "GPT2DoubleHeadsModelOutput": "GPT2DoubleHeadsModelOutput",
    "SequenceClassifierOutputWithPast": "SequenceClassifierOutputWithPast",
}
# The classes of other frameworks, and which of ours does what they do.
_OTHERS = {f"TF{name}": ("TensorFlow", ours) for name, ours in _HERE.items()}
_OTHERS |= {f"Flax{name}": ("Flax", name) for name in ("GPT2Model", "GPT2LMHeadModel")}


def absent(name):
    """The error of a name that the package lacks: which one to use, where there is one."""
    if name in _OTHERS:
        framework, ours = _OTHERS[name]
        return ImportError(
            f"model: {name} needs {framework}, which this project does not use; model.{ours} takes its place, and "
            f"python -m model.convert makes {framework}'s checkpoints loadable"
        )
    if name in _TOKENIZERS:
        return ImportError(f"model: {name} is the tokenizer package's: from tokenizer import {name}")
    return AttributeError(f"module 'model' has no attribute {name!r}")
