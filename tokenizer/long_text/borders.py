"""Letters after which a piece can be cut before any merge is tried, because no token reaches over their end.

A merge across the border between two characters makes a token that holds the end of one and the start of the other. If
the vocabulary has no token that holds the end of a letter, or all of it, and then something, the merges on the two
sides of that border never touch: the left part can be encoded, and remembered, alone. GPT-2's vocabulary was learned
from mostly English text, so this holds for most Chinese characters; a sentence, which is hardly ever seen twice,
becomes characters that are.
"""

from functools import cached_property

from ..unicode_classes import ASCII_PATTERN, gpt2_pattern, letters

FIRST, LAST = 0x2E80, 0xD7A3  # the blocks of Chinese, Japanese and Korean; all take three bytes


class FinePieces:
    """Cuts text like `pretokenize.pieces`, and behind each closing letter too.

    token_bytes: the bytes of every ordinary token. What depends on them is built when the first text comes that is not
    ASCII.
    """

    def __init__(self, token_bytes):
        self.token_bytes = token_bytes

    def __call__(self, text):
        """Parts (list[str]) of text, whose tokens, one part after the other, are those of the text."""
        return (ASCII_PATTERN if text.isascii() else self._pattern).findall(text)

    @cached_property
    def closing(self):
        """The letters that no token joins to what follows, in order (str)."""
        joined = _joined_ends(self.token_bytes)
        each = ((c, c.encode()) for c in letters(FIRST, LAST))
        return "".join(c for c, b in each if not (b in joined or b[1:] in joined or b[2:] in joined))

    @cached_property
    def _pattern(self):
        return gpt2_pattern(self.closing)


def _joined_ends(token_bytes):
    """What tokens that go on behind a character hold of it: all, or its last bytes where they start inside it."""
    ends: set[bytes] = set()
    for token in token_bytes:
        if not token.isascii():
            starts = [i for i, byte in enumerate(token) if i and not 0x80 <= byte < 0xC0]
            ends.update(token[start:end] for start, end in zip([0, *starts], starts))
    return ends
