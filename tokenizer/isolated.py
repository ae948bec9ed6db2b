"""Characters that no token joins to a neighbour: a piece can be cut around them before any merge is tried.

A merge across the border between two characters makes a token that holds the end of one and the start of the other.
If the vocabulary has no such token for any neighbour of a character, the merges on its two sides never touch, and it
can be encoded, and remembered, alone. GPT-2's vocabulary was learned from mostly English text, so this holds for most
Chinese characters; a Chinese sentence, which is hardly ever seen twice, becomes characters that are.
"""

from functools import cached_property

from .unicode_classes import ASCII_PATTERN, gpt2_pattern, letters

FIRST, LAST = 0x2E80, 0xD7A3  # the blocks of Chinese, Japanese and Korean; all take three bytes


class FinePieces:
    """Cuts text like `pretokenize.pieces`, and letters also before and after each isolated one.

    token_bytes: the bytes of every ordinary token. What depends on them is built when the first text comes that is not
    ASCII.
    """

    def __init__(self, token_bytes):
        self.token_bytes = token_bytes

    def __call__(self, text):
        """Parts (list[str]) of text, whose tokens, one part after the other, are those of the text."""
        return (ASCII_PATTERN if text.isascii() else self._pattern).findall(text)

    @cached_property
    def isolated(self):
        """The isolated letters, in order (str)."""
        starts, ends = _joined_fragments(self.token_bytes)
        return "".join(c for c in letters(FIRST, LAST) if _is_isolated(c.encode(), starts, ends))

    @cached_property
    def _pattern(self):
        return gpt2_pattern(alone=self.isolated)


def _is_isolated(encoded, starts, ends):
    lengths = range(1, len(encoded) + 1)
    return not any(encoded[:n] in starts or encoded[-n:] in ends for n in lengths)


def _joined_fragments(token_bytes):
    """What tokens hold of a character that they join to the one before it, and of one that they join to the one after.

    Each fragment is a whole character, or the part of it that a token which ends or starts inside it still holds.
    A leading space does not count as a character before: it stays with the letter, isolated or not.
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
