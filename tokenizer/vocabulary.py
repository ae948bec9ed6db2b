"""The vocabulary: which bytes a token stands for, which pairs of tokens merge, and the files that say so.

Files spell a token as text, one character per byte: printable bytes as themselves, the others as characters from U+0100
on (a space is "Ġ", a newline "Ċ"). `vocab.bpe` is OpenAI's file of merges; the vocabulary follows from it: the 256
bytes in the order of that alphabet, then the product of each merge, then `<|endoftext|>`.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
GPT2_FILE = Path(__file__).with_name("vocab.bpe")

# Byte -> character, in the order of GPT-2's first 256 ids.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_TO_LATIN_1 = {ord(char): chr(byte) for byte, char in BYTE_TO_CHAR.items()}
_SEPARATOR = "\uffff"


@dataclass
class Vocabulary:
    """names: {token as spelled in files: id}. merges: "left right" per rank. special: {special token: id}."""

    names: dict
    merges: list
    special: dict = field(default_factory=dict)
    # Whether each token, encoded as text, gives itself. True wherever the merges were learned and not edited.
    consistent: bool = False

    def __post_init__(self):
        for char in BYTE_TO_CHAR.values():
            if char not in self.names:
                raise ValueError(f"Vocabulary: the token {char!r} is missing; a byte-level BPE has all 256 bytes")
        halves = " ".join(self.merges).split(" ") if self.merges else []
        if len(halves) != 2 * len(self.merges) or "" in halves:
            wrong = next(line for line in self.merges if len(line.split(" ")) != 2 or "" in line.split(" "))
            raise ValueError(f"Vocabulary: merge {wrong!r}; a merge is two tokens with a space between them")
        try:
            lefts, rights = (list(map(self.names.__getitem__, half)) for half in (halves[::2], halves[1::2]))
            self.products = [self.names[merge.replace(" ", "")] for merge in self.merges]
        except KeyError as error:
            raise ValueError(f"Vocabulary: merges use the token {error}, which the vocabulary lacks") from None
        # A pair that is listed twice keeps its first rank.
        self.ranks = dict(zip(zip(reversed(lefts), reversed(rights)), range(len(lefts) - 1, -1, -1)))
        self.byte_ids = [self.names[BYTE_TO_CHAR[byte]] for byte in range(256)]

    def token_bytes(self):
        """{id: bytes} of the ordinary tokens."""
        spelled = _SEPARATOR.join(self.names).translate(_TO_LATIN_1).split(_SEPARATOR)
        try:
            return dict(zip(self.names.values(), map(str.encode, spelled, repeat("latin-1"))))
        except UnicodeEncodeError as error:
            raise ValueError(f"Vocabulary: token {error.object!r} is not spelled in the byte-level alphabet") from None


def gpt2_vocabulary(path=GPT2_FILE):
    """GPT-2's vocabulary: 50,257 tokens, no download."""
    return vocabulary_from_merges(read_merges(path), special_tokens=[END_OF_TEXT], consistent=True)


def vocabulary_from_merges(merges, special_tokens, consistent):
    """The vocabulary that follows from merges in order: bytes, products, special tokens."""
    names = [*BYTE_TO_CHAR.values(), *(merge.replace(" ", "") for merge in merges)]
    special = dict(zip(special_tokens, count(len(names))))
    return Vocabulary(dict(zip(names, count())), merges, special, consistent)


def read_merges(path):
    """The merges of a `vocab.bpe` or `merges.txt`, in order of rank."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def encoder_json(vocabulary):
    """The text of OpenAI's `encoder.json`, also known as `vocab.json`: every token and its id, byte for byte."""
    every = {**vocabulary.names, **vocabulary.special}
    return json.dumps(dict(sorted(every.items(), key=lambda item: item[1])))


def merges_txt(vocabulary):
    """The text of OpenAI's `vocab.bpe`, also known as `merges.txt`."""
    return "\n".join(["#version: 0.2", *vocabulary.merges]) + "\n"


def write_text(path, text):
    """Writes a file whole or not at all: under a temporary name beside it, then renamed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return str(path)
