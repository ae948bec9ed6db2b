"""From text to pieces, and where text can be cut without asking the pattern.

GPT-2 first cuts text into pieces (words, numbers, punctuation, whitespace); a token never reaches over the end of a
piece. `pieces` asks the pattern. `cut` finds most of the same borders with `str.split`, at the speed of C, from one
property of the pattern:

    In a run of whitespace before other text, the last character starts a piece (its own or, if it is a space, that of
    the word behind it); all the characters before it, if any, are one piece. A run at the end of the text is one piece.

So text may be cut before a run, and before the last character of a run that other text follows. In runs of one or two
characters each character starts a piece; only longer ones, and one of two at the end, need care: `_LONG_RUN`.

"""

import re
from functools import cache

from .unicode_classes import ASCII_PATTERN, WHITESPACE, gpt2_pattern

BLOCK = 1 << 14  # characters: a block's words stay in the CPU's cache between being cut out and being looked up

_HEAD = re.compile(f"[^{WHITESPACE}]*")
_BLOCK_END = re.compile(f"[ \n](?=[^{WHITESPACE}])")
_RARE_SPACE = re.compile("[\v\f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_LONG_RUN = re.compile("   +")


_pattern = cache(gpt2_pattern)


def pieces(text):
    """The pieces of text by GPT-2's pattern: the definition that the rest of this file is faster than."""
    return (ASCII_PATTERN if text.isascii() else _pattern()).findall(text)


def head_and_blocks(text):
    """Cuts text before its first whitespace, and from there on, between pieces, into blocks of about BLOCK characters.

    Returns (head, iterator of blocks): each block starts with whitespace. Where no cut is safe, one is longer.
    """
    start = _HEAD.match(text).end()
    return text[:start], _blocks(text, start)


def _blocks(text, start):
    while len(text) - start > BLOCK:
        end = _BLOCK_END.search(text, start + BLOCK)
        if end is None:
            break
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def cut(block):
    """Cuts a block into keys, one per word or long run of whitespace; `spelled(key)` is the text that a key stands for.

    "".join(map(spelled, keys)) == block, and each is a whole number of pieces. Returns None for a block with whitespace
    other than space, tab, newline and carriage return.
    """
    if "\v" in block or "\f" in block or (not block.isascii() and _RARE_SPACE.search(block)):
        return None
    # One space more makes a run at the end, which is one piece in full, look like one that leaves its last character.
    spaces = block.replace("\n", " ").replace("\t", " ").replace("\r", " ") + " "
    keys, start = [], 0
    for run in _LONG_RUN.finditer(spaces):
        end = run.end() - 1
        keys += _split(block[start : run.start()])
        keys.append(block[run.start() : end])
        start = end
    keys += _split(block[start:])
    return keys


def _split(stretch):
    """Splits text that starts with whitespace before each whitespace character; spaces themselves are left out."""
    return stretch.replace("\n", " \n").replace("\t", " \t").replace("\r", " \r").split(" ")[1:]


def spelled(key):
    """The text of a key: a word with the space in front of it; what starts with whitespace is spelled out already."""
    return key if key.startswith((" ", "\n", "\t", "\r")) else " " + key
