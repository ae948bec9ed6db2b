"""Cutting long text in numpy: a text's words, and words' pieces, found by passes over its bytes.

Where words begin follows from one property of GPT-2's pattern:

    In a run of whitespace before other text, the last character starts a piece (its own or, if it is a space, that of
    the word behind it); all the characters before it, if any, are one piece. A run at the end of the text is one piece.

So a run but for its last character is a word, which is one piece; and its last character begins the next word, which
reaches up to the next whitespace and is a whole number of pieces.
"""

import re
from functools import cache
from typing import Any

import numpy as np

from ..unicode_classes import WHITESPACE, ranges_of_letters_and_numbers

BLOCK = 1 << 21  # bytes
SHORT = 15  # bytes: what a number of 128 bits holds beside a length

# Before whitespace that is the last of its run: nothing follows that is, or begins, a whitespace character.
_BLOCK_END = re.compile(rb"[ \n](?=[^\t-\r \xc2\xe1-\xe3])")
_WHITESPACE = re.compile(f"[{WHITESPACE}]")
# The whitespace characters of two and of three bytes, as numbers.
_WIDE = {
    2: [0xC285, 0xC2A0],
    3: [0xE19A80, *range(0xE28080, 0xE2808B), 0xE280A8, 0xE280A9, 0xE280AF, 0xE2819F, 0xE38080],
}
_PADDING = b" " * 16  # there is whitespace behind the text, and 16 bytes can be read from each start
_LOW = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(SHORT + 2)], np.uint64)
_HIGH = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(SHORT + 2)], np.uint64)
_LENGTH = np.uint64(56)

_SPACE, _OTHER_SPACE, _LETTER, _NUMBER, _SIGN = range(5)
_QUOTE = ord("'")
_ONE_LETTER = [ord(letter) for letter in "sdmt"]  # of the contractions 's 'd 'm 't
_TWO_LETTERS = [ord(pair[0]) << 21 | ord(pair[1]) for pair in ("ll", "ve", "re")]


class Spans:
    """Stretches of a text (bytes), in order: starts and lengths, in bytes. Indexed by an array, some of them."""

    def __init__(self, text, starts, lengths, padded=None):
        self.padded = text + _PADDING if padded is None else padded
        self.bytes = np.frombuffer(self.padded, np.uint8)
        self.starts: Any = starts
        self.lengths: Any = lengths

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, which):
        return Spans(None, self.starts[which], self.lengths[which], self.padded)

    def texts(self):
        """Each stretch as bytes."""
        ends = self.starts + self.lengths
        return [self.padded[start:end] for start, end in zip(self.starts.tolist(), ends.tolist())]

    def joined(self):
        """The same stretches of another text, in which nothing stands between them."""
        text = self.bytes[stretches(self.starts, self.lengths)].tobytes()
        return Spans(text, np.cumsum(self.lengths) - self.lengths, self.lengths)

    def numbers(self):
        """Two uint64 of each: its first 8 bytes; its next 7, and its length or, if it is not short, 16."""
        at = np.ndarray(len(self.bytes) - 7, "<u8", self.bytes, strides=(1,))
        lengths = np.minimum(self.lengths, SHORT + 1)
        a, b = at[self.starts] & _LOW[lengths], lengths.astype(np.uint64) << _LENGTH
        (longer,) = np.nonzero(lengths > 8)
        b[longer] |= at[self.starts[longer] + 8] & _HIGH[lengths[longer]]
        return a, b


def stretches(starts, lengths):
    """All the places, in order, of stretches: range(start, start + length) of each, one after the other."""
    places = np.repeat(starts - np.cumsum(lengths, dtype=starts.dtype) + lengths, lengths)
    places += np.arange(len(places), dtype=places.dtype)
    return places


def blocks(text):
    """Parts of text (bytes) of about BLOCK bytes, cut between words. Where no cut is safe, one is longer."""
    start = 0
    while len(text) - start > BLOCK:
        end = _BLOCK_END.search(text, start + BLOCK)
        if end is None:
            break
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def together(texts):
    """Lists of texts of about BLOCK bytes in all, and the number of each; long texts come in parts, empty ones not."""
    numbers, parts, size = [], [], 0
    for number, text in enumerate(texts):
        for part in blocks(text) if len(text) > BLOCK else (text,) if text else ():
            numbers.append(number)
            parts.append(part)
            size += len(part)
            if size >= BLOCK:
                yield numbers, parts
                numbers, parts, size = [], [], 0
    if parts:
        yield numbers, parts


def words(text, ends):
    """(Spans, is_run): the words of texts in UTF-8 (bytes), and which of them are runs of whitespace.

    ends: where each of the texts ends, none of which is empty. Its first word may begin with any character.
    """
    n = len(text)
    cut = Spans(text, None, None)
    with_end = cut.bytes[: n + 1]
    is_space = (with_end == ord(" ")) | (with_end - np.uint8(ord("\t")) <= ord("\r") - ord("\t"))
    wide = [] if text.isascii() else [(width, _wide_spaces(with_end, width)) for width in _WIDE]
    for width, at in wide:
        for i in range(width):
            is_space[at + i] = True
    # A byte of whitespace starts a word, unless its neighbours are whitespace too.
    is_start = is_space[:-1].copy()
    is_start[1:] &= ~(is_space[:-2] & is_space[2:])
    for width, at in wide:
        for i in range(1, width):
            is_start[at + i] = False
        is_start[at] = ~(is_space[at - 1] & is_space[at + width])
    # The first and the last character of a text stand beside another text, which must not matter.
    first = ends - np.diff(ends, prepend=0)
    (at_end,) = np.nonzero(is_space[ends - 1])
    last = ends[at_end] - 1
    for _ in range(2):
        last -= with_end[last] & 0xC0 == 0x80
    last = last[last > first[at_end]]
    is_start[last] = ~is_space[last - 1]
    is_start[first] = True
    cut.starts = np.flatnonzero(is_start)
    cut.lengths = np.diff(cut.starts, append=n)
    return cut, is_space[cut.starts + cut.lengths - 1]


def pieces(words, closing):
    """(Spans, counts): the pieces of words, joined, that are no runs; how many each word has.

    closing: whether each code point ends a piece, though a letter follows (see `borders.py`); called if one may.
    """
    is_ascii = words.padded.isascii()
    text = words.bytes if is_ascii else np.frombuffer(words.padded.decode().encode("utf-32-le"), np.uint32)
    kind = _classes()[text]
    characters: Any = None if is_ascii else np.flatnonzero(words.bytes & 0xC0 != 0x80)  # where each begins
    first = words.starts if is_ascii else np.searchsorted(characters, words.starts)
    is_first = np.zeros(len(text), bool)
    is_first[first] = True
    # A piece starts where the class changes, but not behind a space; and where a word does.
    is_start = np.ones(len(text), bool)
    is_start[1:] = (kind[1:] != kind[:-1]) & (kind[:-1] != _SPACE)
    if not is_ascii:
        is_start[1:] |= closing()[text[:-1]]
    is_start |= is_first
    # A contraction is a piece, unless its quote stands behind another sign or a space.
    (quote,) = np.nonzero(text == _QUOTE)
    quote = quote[(kind[quote - 1] != _SIGN) & (kind[quote - 1] != _SPACE) | is_first[quote]]
    quote = quote[~is_first[quote + 1]]
    second, third = text[quote + 1], np.where(is_first[quote + 2], 0, text[quote + 2])
    pair = second.astype(np.int64) << 21 | third
    for length, ends in ((2, np.isin(second, _ONE_LETTER)), (3, np.isin(pair, _TWO_LETTERS))):
        is_start[quote[ends] + 1] = False
        is_start[quote[ends] + length] = True
    starts = np.flatnonzero(is_start)
    if not is_ascii:  # from characters to bytes
        starts = characters[starts]
    n = len(words.bytes) - len(_PADDING)
    starts = starts[: np.searchsorted(starts, n)]
    cut = Spans(None, starts, np.diff(starts, append=n), words.padded)
    return cut, np.diff(np.searchsorted(starts, words.starts), append=len(starts))


@cache
def _classes():
    """The class of each code point (uint8)."""
    classes = np.full(0x110000, _SIGN, np.uint8)
    for kind, ranges in zip((_LETTER, _NUMBER), ranges_of_letters_and_numbers()):
        for low, high in ranges:
            classes[low : high + 1] = kind
    for character in map(chr, range(0x3001)):
        if _WHITESPACE.match(character):
            classes[ord(character)] = _OTHER_SPACE
    classes[ord(" ")] = _SPACE
    return classes


def _wide_spaces(text, width):
    """Where in text (uint8) whitespace characters of `width` bytes stand."""
    leads = {number >> 8 * (width - 1) for number in _WIDE[width]}
    at = np.flatnonzero(np.logical_or.reduce([text == lead for lead in leads]))
    number = sum(text[at + i].astype(np.uint32) << 8 * (width - 1 - i) for i in range(width))
    return at[np.isin(number, _WIDE[width])]
