"""AutoTokenizer and the page's other names of tokenizers: all of them GPT2Tokenizer, or an error that says why not."""

import os
from typing import Any

from . import files
from .gpt2 import GPT2Tokenizer

GPT2TokenizerFast = GPT2Tokenizer  # of Hugging Face's two tokenizers the fast one has the same tokens and methods

_ELSEWHERE = {
    "TFGPT2Tokenizer": "tokenizer.GPT2Tokenizer takes its place; return_tensors='np' gives arrays that TensorFlow reads"
}


class AutoTokenizer:
    """The tokenizer of a directory or of a Hub repository, which must be GPT-2's."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer: it has no instances; call AutoTokenizer.from_pretrained(name_or_path)")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "GPT2Tokenizer":
        """As GPT2Tokenizer.from_pretrained. Raises ValueError where the files say that they are another model's."""
        hub = {name: kwargs.get(name) for name in ("revision", "cache_dir", "token")}
        hub["local_files_only"] = kwargs.get("local_files_only", False)
        tokenizer = GPT2Tokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)  # which checks the arguments
        files.check_is_gpt2(pretrained_model_name_or_path, hub)
        return tokenizer


def absent(name):
    """The error of a name that the package lacks."""
    if name in _ELSEWHERE:
        return ImportError(f"tokenizer: {name} needs TensorFlow, which this project does not use; {_ELSEWHERE[name]}")
    return AttributeError(f"module 'tokenizer' has no attribute {name!r}")
