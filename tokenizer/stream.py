"""Text from tokens as they come, for printing while a model writes."""

from codecs import getincrementaldecoder


class StreamDecoder:
    """Decodes ids one by one; holds back the bytes of an unfinished character and nothing else.

        stream = StreamDecoder(tokenizer)
        for token in tokens:
            print(stream.push(token), end="")
        print(stream.finish())

    The parts, joined, equal `tokenizer.decode(ids, errors=errors)`. errors: as for `bytes.decode`.
    """

    def __init__(self, tokenizer, errors="replace", skip_special_tokens=False):
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")(errors)
        self._skip_special_tokens = skip_special_tokens

    def push(self, ids):
        """The text (str, perhaps empty) that one id, or several, complete."""
        ids = [ids] if isinstance(ids, int) else ids
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, skip_special_tokens=self._skip_special_tokens))

    def finish(self):
        """What is left when no more ids come: "" or, by `errors`, the treatment of an unfinished character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
