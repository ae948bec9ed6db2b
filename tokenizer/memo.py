"""The fast path of encoding: exact memoisation, with the work done by C loops of the interpreter.

`_Words` maps a key of `pretokenize.cut` to its tokens, `_Pieces` a piece to its tokens. Both are dicts with
`__missing__`, so that `map(words.__getitem__, keys)` runs no line of Python for a word that was seen before. A word's
tokens depend on the word alone, so remembering them changes no result.

Both are bounded, in bytes, and start afresh when full.
"""

from itertools import chain

from .pretokenize import cut, head_and_blocks, pieces, spelled

MAX_KEY = 100  # characters
WORDS_BYTES = 32 << 20
PIECES_BYTES = 16 << 20

_flatten = chain.from_iterable


class _Remembered(dict):
    def __init__(self, limit):
        self.limit = self.room = limit

    def clear(self):
        super().clear()
        self.room = self.limit

    def remember(self, key, tokens):
        """Keeps an entry: 200 bytes for a string, a tuple and a place in the dict, and what they hold, at most."""
        if len(key) <= MAX_KEY:
            self.room -= 200 + 4 * len(key) + 8 * len(tokens)
            if self.room < 0:
                self.clear()
            self[key] = tokens


class _Pieces(_Remembered):
    def __init__(self, encoder, known, isolated):
        super().__init__(PIECES_BYTES)
        self.encoder, self.known, self.isolated = encoder, known, isolated

    def __missing__(self, piece):
        token = self.known.get(piece)
        if token is not None:
            tokens = (token,)
        elif len(piece) > 2 and not piece.isascii() and len(parts := self.isolated.cut(piece)) > 1:
            tokens = tuple(_flatten(map(self.__getitem__, parts)))
        else:
            tokens = tuple(self.encoder.encode(piece.encode()))
        self.remember(piece, tokens)
        return tokens


class _Words(_Remembered):
    def __init__(self, memo):
        super().__init__(WORDS_BYTES)
        self.memo = memo

    def __missing__(self, key):
        tokens = tuple(_flatten(map(self.memo.__getitem__, pieces(spelled(key)))))
        self.remember(key, tokens)
        return tokens


class Memo:
    """Encodes text without special tokens.

    encoder: a BytePairEncoder. known: {piece: token} for pieces that are one token. isolated: IsolatedCharacters.
    """

    def __init__(self, encoder, known, isolated):
        self._pieces = _Pieces(encoder, known, isolated)
        self._words = _Words(self._pieces)

    def clear(self):
        """Forgets everything, as when new."""
        self._pieces.clear()
        self._words.clear()

    def encode(self, text):
        """Token ids (list[int]) of text (str). Raises UnicodeEncodeError for a lone surrogate."""
        tokens_of_piece, tokens_of_word = self._pieces.__getitem__, self._words.__getitem__
        head, blocks = head_and_blocks(text)
        ids = list(_flatten(map(tokens_of_piece, pieces(head))))
        for block in blocks:
            keys = cut(block)
            if keys is None:
                ids += _flatten(map(tokens_of_piece, pieces(block)))
            else:
                ids += _flatten(map(tokens_of_word, keys))
        return ids
