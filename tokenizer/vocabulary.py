"""The vocabulary: which bytes a token stands for, which pairs of tokens merge, and the files that say so.

Files spell a token as text, one character per byte: printable bytes as themselves, the others as characters from U+0100
on (a space is "Ġ", a newline "Ċ"). `vocab.bpe` is OpenAI's file of merges; the vocabulary follows from it: the 256
bytes in the order of that alphabet, then the product of each merge, then `<|endoftext|>`.
"""

import json
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


# Ids may leave gaps, as where a vocabulary is padded; a table holds a place for each id, so not without bound.
MOST_UNUSED = 1 << 20


@dataclass
class Vocabulary:
    """names: {token as spelled in files: id}. merges: "left right" per rank.

    special: {special token: id} of the vocabulary's own, which text may hold as ordinary text. own: {special token: id}
    of the user's, read in text without being asked. added: {token: id} of tokens that are added but not special.
    """

    names: dict
    merges: list
    special: dict = field(default_factory=dict)
    # Whether each token, encoded as text, gives itself. True wherever the merges were learned and not edited.
    consistent: bool = False
    own: dict = field(default_factory=dict)
    added: dict = field(default_factory=dict)

    def __post_init__(self):
        self._check_ids()
        for char in BYTE_TO_CHAR.values():
            if char not in self.names:
                raise ValueError(f"Vocabulary: the token {char!r} is missing; a byte-level BPE has all 256 bytes")
        for merge in self.merges:
            if not isinstance(merge, str) or merge.count(" ") != 1 or merge[0] == " " or merge[-1] == " ":
                raise ValueError(f"Vocabulary: merge {merge!r}; a merge is two tokens with a space between them")
        halves = " ".join(self.merges).split(" ") if self.merges else []
        try:
            lefts, rights = (list(map(self.names.__getitem__, half)) for half in (halves[::2], halves[1::2]))
            self.products = [self.names[merge.replace(" ", "")] for merge in self.merges]
        except KeyError as error:
            raise ValueError(f"Vocabulary: merges use the token {error}, which the vocabulary lacks") from None
        # A pair that is listed twice keeps its first rank.
        self.ranks = dict(zip(zip(reversed(lefts), reversed(rights)), range(len(lefts) - 1, -1, -1)))
        self.byte_ids = [self.names[BYTE_TO_CHAR[byte]] for byte in range(256)]
        self._bytes = self._token_bytes()

    def _check_ids(self):
        every = dict(self.names)
        for tokens in (self.names, self.special, self.own, self.added):
            for token, id in tokens.items():
                if type(id) is not int or id < 0:
                    raise ValueError(f"Vocabulary: token {token!r} has id {id!r}; an id is an int from 0 on")
                if every.setdefault(token, id) != id:
                    raise ValueError(f"Vocabulary: token {token!r} has two ids, {every[token]} and {id}")
        of = {id: token for token, id in every.items()}
        if len(of) < len(every):
            token, id = next((token, id) for token, id in every.items() if of[id] != token)
            raise ValueError(f"Vocabulary: tokens {token!r} and {of[id]!r} have one id, {id}")
        if max(of, default=0) - len(of) >= MOST_UNUSED:
            raise ValueError(
                f"Vocabulary: token {of[max(of)]!r} has id {max(of)}, but there are only {len(of)} tokens; "
                f"at most {MOST_UNUSED} ids may be unused"
            )

    def token_bytes(self):
        """{id: bytes} of the ordinary tokens."""
        return self._bytes

    def _token_bytes(self):
        spelled = _SEPARATOR.join(self.names).translate(_TO_LATIN_1).split(_SEPARATOR)
        try:
            if len(spelled) == len(self.names):  # else a name holds the separator
                return dict(zip(self.names.values(), map(str.encode, spelled, repeat("latin-1"))))
        except UnicodeEncodeError:
            pass
        wrong = next(name for name in self.names if not _is_spelled(name))
        raise ValueError(f"Vocabulary: token {wrong!r} is not spelled in the byte-level alphabet")


def _is_spelled(name):
    return all(ord(char) in _TO_LATIN_1 for char in name)


def text_of(name):
    """The text that an ordinary token stands for; None if it is part of a character."""
    try:
        return name.translate(_TO_LATIN_1).encode("latin-1").decode()
    except UnicodeError:
        return None


def gpt2_vocabulary(path=GPT2_FILE):
    """GPT-2's vocabulary: 50,257 tokens, no download."""
    merges = read_merges(Path(path).read_text(encoding="utf-8"))
    return vocabulary_from_merges(merges, special_tokens=[END_OF_TEXT], consistent=True)


def vocabulary_from_merges(merges, special_tokens, consistent):
    """The vocabulary that follows from merges in order: bytes, products, special tokens."""
    names = [*BYTE_TO_CHAR.values(), *(merge.replace(" ", "") for merge in merges)]
    special = dict(zip(special_tokens, count(len(names))))
    return Vocabulary(dict(zip(names, count())), merges, special, consistent)


def read_merges(text):
    """The merges that the text of a `vocab.bpe` or `merges.txt` lists, in order of rank."""
    lines = text.split("\n")
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def encoder_json(vocabulary):
    """The text of OpenAI's `encoder.json`, also known as `vocab.json`: every token and its id, byte for byte."""
    every = {**vocabulary.names, **vocabulary.special}
    return json.dumps(dict(sorted(every.items(), key=lambda item: item[1])))


def merges_txt(vocabulary):
    """The text of OpenAI's `vocab.bpe`, also known as `merges.txt`."""
    return "\n".join(["#version: 0.2", *vocabulary.merges]) + "\n"
