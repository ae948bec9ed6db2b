"""Text from tokens as they are generated."""

from codecs import getincrementaldecoder
from collections.abc import Iterable
from typing import Any

from . import checks


class StreamDecoder:
    """Decodes ids incrementally: an incomplete UTF-8 sequence is held back until its last byte, and nothing else.

        stream = StreamDecoder(tokenizer)
        for token in tokens:
            print(stream.push(token), end="")
        print(stream.finish())

    The parts, joined, equal `tokenizer.decode(ids, errors=errors)`. errors: as for `bytes.decode`.
    """

    def __init__(self, tokenizer: Any, errors: str = "replace", skip_special_tokens: bool = False) -> None:
        if not hasattr(tokenizer, "decode_bytes"):
            raise TypeError(f"StreamDecoder: tokenizer is {type(tokenizer).__name__}; it must be a GPT2Tokenizer")
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")(checks.error_handler(errors, "StreamDecoder"))
        self._skip_special_tokens = checks.flag(skip_special_tokens, "StreamDecoder", "skip_special_tokens")

    def push(self, ids: int | Iterable[int]) -> str:
        """The text (str, perhaps empty) that one id, or several, complete."""
        return self._decoder.decode(self._tokenizer._known_bytes(ids, self._skip_special_tokens, "StreamDecoder.push"))

    def finish(self) -> str:
        """What is left when no more ids come: "" or, by `errors`, the treatment of an incomplete UTF-8 sequence."""
        try:
            return self._decoder.decode(b"", final=True)
        finally:
            self._decoder.reset()
