"""The settings of generate(), checked."""

import math
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields

import numpy as np
import torch

from kernels.decode import WEIGHTS
from model.config import brief, token_list

_WHOLE = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "prompt_lookup_num_tokens",
)
_NUMBERS = ("max_time", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
DECODE_KERNELS = ("auto", "fused", "persistent", "plain")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_FLAGS = (
    "do_sample",
    "sliding_window",
    "use_cache",
    "cuda_graph",
    "renormalize_logits",
    *OUTPUTS,
    "return_dict_in_generate",
)


@dataclass
class Settings:
    """What generate() takes beside the prompts; see there. None for a setting is its default here, or 0 for top_k."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    max_time: float | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list = field(default_factory=list)
    suppress_tokens: list = field(default_factory=list)
    sequence_bias: dict = field(default_factory=dict)
    prefix_allowed_tokens_fn: Callable | None = None
    renormalize_logits: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    prompt_lookup_num_tokens: int = 0
    sliding_window: bool = False
    use_cache: bool = True
    cuda_graph: bool = True
    decode_kernel: str = "auto"
    weights: str = "model"
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict_in_generate: bool = False

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is None:
                off = f.default_factory() if f.default_factory is not MISSING else f.default
                setattr(self, f.name, 0 if f.name == "top_k" else off)
        for names, read in ((_WHOLE, _whole), (_NUMBERS, _number), (_FLAGS, _flag)):
            for name in names:
                if getattr(self, name) is not None:
                    setattr(self, name, read(name, getattr(self, name)))
        for name, is_right, required in (
            ("max_length", self.max_length is None or self.max_length > 0, "positive"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "positive"),
            ("max_time", self.max_time is None or self.max_time > 0, "a positive number of seconds"),
            ("min_length", self.min_length >= 0, "at least 0"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("temperature", self.temperature > 0, "greater than 0; do_sample=False is greedy"),
            ("top_k", self.top_k >= 0, "an integer, 0 for all tokens"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("typical_p", 0 < self.typical_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens >= 0, "at least 0"),
            ("decode_kernel", _is_one_of(self.decode_kernel, *DECODE_KERNELS), " or ".join(map(repr, DECODE_KERNELS))),
            ("weights", _is_one_of(self.weights, *WEIGHTS), " or ".join(map(repr, WEIGHTS))),
            ("early_stopping", _is_one_of(self.early_stopping, True, False, "never"), 'True, False or "never"'),
            (
                "prefix_allowed_tokens_fn",
                self.prefix_allowed_tokens_fn is None or callable(self.prefix_allowed_tokens_fn),
                "a function (row, ids) -> ids",
            ),
        ):
            if not is_right:
                raise ValueError(f"generate: {name} is {brief(getattr(self, name))}; it must be {required}")
        self.bad_words_ids = _words(self.bad_words_ids)
        self.suppress_tokens = token_ids("suppress_tokens", self.suppress_tokens)
        self.sequence_bias = _biases(self.sequence_bias)
        draws_rows = self.do_sample and self.num_beams == 1
        if self.num_return_sequences > self.num_beams and not draws_rows:
            raise ValueError(
                f"generate: num_return_sequences is {self.num_return_sequences} and num_beams {self.num_beams}; there "
                "is one sequence for each beam, and more of them only by sampling with num_beams=1"
            )
        if self.weights != "model" and self.decode_kernel == "plain":
            raise ValueError(
                f"generate: weights={self.weights!r} is for the decode kernels; decode_kernel='plain' does without them"
            )
        outputs = [name for name in OUTPUTS if getattr(self, name)]
        if self.prompt_lookup_num_tokens and (self.do_sample or self.sliding_window or outputs):
            raise ValueError(
                "generate: prompt_lookup_num_tokens is for greedy decoding, without sliding_window and "
                f"{', '.join(OUTPUTS)}"
            )
        if self.sliding_window and (self.output_attentions or self.output_hidden_states):
            raise ValueError(
                f"generate: sliding_window reads some tokens anew, so there is no one pass of each step to give "
                f"{outputs[-1]} of"
            )

    def check_vocabulary(self, V):
        """Raises ValueError where a setting names a token that a vocabulary of V does not have."""
        if self.num_beams > V:
            raise ValueError(f"generate: num_beams is {self.num_beams}; it must be at most {V}, the vocabulary's size")
        named = {
            "bad_words_ids": [i for word in self.bad_words_ids for i in word],
            "suppress_tokens": self.suppress_tokens,
            "sequence_bias": [i for word in self.sequence_bias for i in word],
        }
        for name, ids in named.items():
            wrong = [i for i in ids if not 0 <= i < V]
            if wrong:
                raise ValueError(f"generate: {name} names token {wrong[0]}; the vocabulary has 0 to {V - 1}")

    def check_goes_on(self, name):
        """Raises ValueError where the argument `name`, of the first forward pass, meets what would repeat that."""
        for setting, is_on in (
            ("use_cache=False", not self.use_cache),
            ("sliding_window", self.sliding_window),
            ("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens),
        ):
            if is_on:
                raise ValueError(f"generate: {name} does not go with {setting}, which reads tokens more than once")

    def new_tokens(self, prompt_length, n_positions):
        """How many tokens a prompt may be continued by. Raises ValueError where there are not enough positions."""
        if self.max_new_tokens is not None:
            new = self.max_new_tokens
        elif self.max_length is not None:
            new = self.max_length - prompt_length
            if new < 1:
                raise ValueError(f"generate: a prompt has {prompt_length} tokens; max_length is {self.max_length}")
        else:
            new = max(1, min(20, n_positions - prompt_length))  # Hugging Face's default
        needed = prompt_length + new - 1  # the last token is not fed back
        if needed > n_positions and not self.sliding_window:
            raise ValueError(
                f"generate: a prompt of {prompt_length} tokens and {new} new ones need {needed} positions; n_positions "
                f"is {n_positions}. sliding_window=True drops the oldest tokens"
            )
        return new


def token_ids(name, value):
    """None, an id, or several in a list, tuple, array or tensor, as a list of ids."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if not (value is None or isinstance(value, int | list | tuple | range | set | frozenset)):
        raise TypeError(f"generate: {name} is {brief(value)}; a token id or a list of them is required")
    return [_whole(name, token) for token in token_list(value)]


def _whole(name, value):
    """A number without a fraction, of any type, as an int."""
    try:
        if isinstance(value, torch.Tensor | np.ndarray):
            if math.prod(value.shape) != 1:
                raise TypeError
            value = value.reshape(-1).tolist()[0]
        if isinstance(value, float | np.floating):
            if not float(value).is_integer():
                raise ValueError(f"generate: {name} is {brief(value)}; it must be a whole number")
            return int(value)
        return operator.index(value)
    except (TypeError, OverflowError):
        raise TypeError(f"generate: {name} is {brief(value)}; it must be an integer") from None


def _number(name, value):
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"generate: {name} is {value!r}; it must be a number") from None


def _flag(name, value):
    if not _is_one_of(value, True, False):
        raise TypeError(f"generate: {name} is {brief(value)}; it must be True or False")
    return bool(value)


def _is_one_of(value, *allowed):
    return not isinstance(value, torch.Tensor | np.ndarray) and value in allowed


def _words(value):
    """bad_words_ids as a list of lists of ids, none of them empty."""
    value = value.tolist() if hasattr(value, "tolist") else value
    required = "a list of words, each a list of at least one token id: [[5], [17, 3]]"
    if not isinstance(value, list | tuple) or any(isinstance(word, int | str) for word in value):
        raise ValueError(f"generate: bad_words_ids is {value!r}; it must be {required}")
    words = [token_ids("bad_words_ids", word) for word in value]
    if not all(words):
        raise ValueError(f"generate: bad_words_ids has an empty word; it must be {required}")
    return words


def _biases(value):
    """sequence_bias, {(ids): bias} or [[[ids], bias]], as {(ids): bias}."""
    required = "{(5, 17): -2.0} or [[[5, 17], -2.0]]"
    try:
        pairs = value.items() if isinstance(value, dict) else [(ids, bias) for ids, bias in value]
        biases = {tuple(token_ids("sequence_bias", ids)): _number("sequence_bias", bias) for ids, bias in pairs}
    except (TypeError, ValueError):
        raise ValueError(f"generate: sequence_bias is {value!r}; it must be like {required}") from None
    if () in biases:
        raise ValueError(f"generate: sequence_bias has an empty sequence; it must be like {required}")
    return biases
