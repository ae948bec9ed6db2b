"""The fast path of encoding: exact memoisation, with the work done by C loops of the interpreter.

`_Words` maps a key of `pretokenize.cut` to its tokens, `_Pieces` a piece to its tokens. Both are dicts with
`__missing__`, so that `map(words.__getitem__, keys)` runs no line of Python for a word that was seen before. A word's
tokens depend on the word alone, so remembering them changes no result.

Both are bounded, in bytes, and start afresh when full.
"""

from itertools import chain

from .pretokenize import cut, head_and_blocks, spelled

MAX_KEY = 100  # characters
WORDS_BYTES = 32 << 20
PIECES_BYTES = 16 << 20

_flatten = chain.from_iterable


class _Remembered(dict):
    """A dict of at most `limit` bytes: an entry counts 200 for a string, a tuple and a place, and what they hold."""

    def __init__(self, limit):
        self.limit = self.room = limit

    def clear(self):
        super().clear()
        self.room = self.limit

    def remember(self, key, tokens):
        if len(key) <= MAX_KEY:
            self.room -= 200 + 4 * len(key) + 8 * len(tokens)
            if self.room < 0:
                self.clear()
            self[key] = tokens
        return tokens


class _Pieces(_Remembered):
    def __init__(self, encoder, known):
        super().__init__(PIECES_BYTES)
        self.encode, self.known = encoder.encode, known

    def __missing__(self, piece):
        token = self.known.get(piece)
        return self.remember(piece, tuple(self.encode(piece.encode())) if token is None else (token,))


class _Words(_Remembered):
    def __init__(self, tokens_of_piece, cut):
        super().__init__(WORDS_BYTES)
        self.tokens_of_piece, self.cut = tokens_of_piece, cut

    def __missing__(self, key):
        parts = self.cut(spelled(key))
        if len(parts) == 1:
            return self.remember(key, self.tokens_of_piece(parts[0]))
        return self.remember(key, tuple(_flatten(map(self.tokens_of_piece, parts))))


class Memo:
    """Encodes text without special tokens.

    encoder: a BytePairEncoder. known: {piece: token} for pieces that are one token. cut: what cuts text into parts that
    are encoded alone, as `pretokenize.pieces` does.
    """

    def __init__(self, encoder, known, cut):
        self._pieces = _Pieces(encoder, known)
        self._words = _Words(self._pieces.__getitem__, cut)
        self._cut = cut

    def clear(self):
        """Forgets everything, as when new."""
        self._pieces.clear()
        self._words.clear()

    def encode(self, text):
        """Token ids (list[int]) of text (str). Raises UnicodeEncodeError for a lone surrogate."""
        tokens_of_piece, tokens_of_word = self._pieces.__getitem__, self._words.__getitem__
        head, blocks = head_and_blocks(text)
        ids = list(_flatten(map(tokens_of_piece, self._cut(head))))
        for block in blocks:
            keys = cut(block)
            if keys is None:
                ids += _flatten(map(tokens_of_piece, self._cut(block)))
            else:
                ids += _flatten(map(tokens_of_word, keys))
        return ids
