"""tiktoken's names for what a tokenizer can do, with its meanings."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import checks
from .named_tokens import NamedTokens
from .vocabulary import END_OF_TEXT


class TiktokenNames(NamedTokens):
    """The methods and properties of `tiktoken.Encoding` that GPT2Tokenizer has no other use for."""

    encode_ordinary: Callable  # of GPT2Tokenizer
    decode_bytes: Callable
    _memo: Any
    _prefixed: Callable

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        return self.max_token_value + 1

    @property
    def max_token_value(self) -> int:
        """The largest id."""
        return max(self._bytes)

    @property
    def eot_token(self) -> int:
        """The id of `<|endoftext|>`."""
        if END_OF_TEXT not in self.special_tokens:
            raise ValueError(f"GPT2Tokenizer.eot_token: this vocabulary has no {END_OF_TEXT}")
        return self.special_tokens[END_OF_TEXT]

    @property
    def special_tokens_set(self) -> set[str]:
        """The special tokens, as a set."""
        return set(self.special_tokens)

    def is_special_token(self, token: int) -> bool:
        """Whether an id is that of a special token."""
        return checks.whole(token, "GPT2Tokenizer.is_special_token", "token") in self._special_ids

    def encode_ordinary_batch(self, text: Iterable[str]) -> list[list[int]]:
        """A list of `encode_ordinary(text)` of a list of texts."""
        texts = list(checks.texts(text, "GPT2Tokenizer.encode_ordinary_batch", "text"))
        try:
            return self._memo.encode_many([self._prefixed(one) for one in texts])
        except UnicodeEncodeError:  # half a surrogate pair: one by one, with an error that says where
            return [self.encode_ordinary(one) for one in texts]

    def _encode_to_arrays(self, texts):
        """The ids of texts in UTF-8 (bytes): all (int32) one behind the other, and how many each has (int64)."""
        if self.__dict__["add_prefix_space"]:
            texts = [text if text[:1] in (b"", b" ") else b" " + text for text in texts]
        return self._memo.encode_to_arrays(texts)

    def encode_to_numpy(self, text: str, **special: Any) -> Any:
        """As `encode`, in a uint32 array."""
        import numpy

        return numpy.array(self.encode(text, **special), numpy.uint32)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of the token, special ones included, that is exactly this str or these bytes."""
        function = "GPT2Tokenizer.encode_single_token"
        if isinstance(text_or_bytes, str):
            text_or_bytes = checks.paired_surrogates(text_or_bytes, function).encode()
        if not isinstance(text_or_bytes, bytes):
            raise TypeError(f"{function}: text_or_bytes is {checks.kind(text_or_bytes)}; it must be str or bytes")
        id = self._ids_of_bytes.get(text_or_bytes)
        if id is None:
            raise ValueError(f"{function}: {text_or_bytes!r} is no token of the vocabulary")
        return id

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one id."""
        function = "GPT2Tokenizer.decode_single_token_bytes"
        token = checks.whole(token, function, "token")
        if token not in self._bytes:
            raise ValueError(f"{function}: id {token} is not in the vocabulary; ids go from 0 to {max(self._bytes)}")
        return self._bytes[token]

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each of ids."""
        tokens = checks.ids(tokens, "GPT2Tokenizer.decode_tokens_bytes", "tokens")
        return [self.decode_single_token_bytes(token) for token in tokens]

    def decode_batch(self, batch: Iterable[Sequence[int]], *, errors: str | None = None) -> list[str]:
        """A list of `decode(ids, errors=errors)` of each row."""
        return [self.decode(ids, errors=errors) for ids in checks.rows(batch, "GPT2Tokenizer.decode_batch", "batch")]

    def decode_bytes_batch(self, batch: Iterable[Sequence[int]]) -> list[bytes]:
        """A list of `decode_bytes(ids)` of each row."""
        return [self.decode_bytes(ids) for ids in checks.rows(batch, "GPT2Tokenizer.decode_bytes_batch", "batch")]

    def token_byte_values(self) -> list[bytes]:
        """The bytes of the ordinary tokens, sorted."""
        return sorted(self.vocabulary.token_bytes().values())
