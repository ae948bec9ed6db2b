"""Characters that no token joins to a neighbour: a piece can be cut around them before any merge is tried.

A merge across the border between two characters makes a token that holds the end of one and the start of the other.
If the vocabulary has no such token for any neighbour of a character, the merges on its two sides never touch, and it
can be encoded, and remembered, alone. GPT-2's vocabulary was learned from mostly English text, so this holds for most
Chinese characters; a Chinese sentence, which is hardly ever seen twice, becomes characters that are.
"""

import re
from functools import cached_property
from itertools import groupby

FIRST, LAST = 0x2E80, 0xD7A3  # the blocks of Chinese, Japanese and Korean; all take three bytes


class IsolatedCharacters:
    """Built from a vocabulary on first use. token_bytes: the bytes of every ordinary token."""

    def __init__(self, token_bytes):
        self.token_bytes = token_bytes

    def cut(self, piece):
        """Parts of a piece whose tokens, one after the other, are those of the piece."""
        return self._pattern.findall(piece)

    @cached_property
    def characters(self):
        """The isolated characters, in order (str)."""
        starts, ends = _joined_fragments(self.token_bytes)
        return "".join(c for c in map(chr, range(FIRST, LAST + 1)) if _is_isolated(c.encode(), starts, ends))

    @cached_property
    def _pattern(self):
        # Equal differences of code point and position mark a range of neighbours.
        groups = [list(group) for _, group in groupby(enumerate(self.characters), lambda item: ord(item[1]) - item[0])]
        ranges = "".join(f"{group[0][1]}-{group[-1][1]}" for group in groups)
        # A piece's leading space does join the first character, so it stays with it. Without any isolated character
        # the whole piece is one part.
        return re.compile(f" ?[{ranges}]|[^{ranges}]+" if ranges else "(?s).+")


def _is_isolated(encoded, starts, ends):
    lengths = range(1, len(encoded) + 1)
    return not any(encoded[:n] in starts or encoded[-n:] in ends for n in lengths)


def _joined_fragments(token_bytes):
    """What tokens hold of a character that they join to the one before it, and of one that they join to the one after.

    Each fragment is a whole character, or the part of it that a token which ends or starts inside it still holds.
    A leading space does not count as a character before.
    """
    starts, ends = set(), set()
    for token in token_bytes:
        if token.isascii():
            continue
        borders = [i for i, byte in enumerate(token) if i and not 0x80 <= byte < 0xC0]
        for left, border, right in zip([0, *borders], borders, [*borders[1:], len(token)]):
            if token[:border] != b" ":
                starts.add(token[border:right])
            ends.add(token[left:border])
    return starts, ends
