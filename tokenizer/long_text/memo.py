"""Exact memoisation: what a piece's tokens are depends on the piece alone, so remembering them changes no result."""

from itertools import chain

MAX_KEY = 100  # characters: a longer piece is not remembered
PIECES_BYTES = 16 << 20


class Pieces(dict):
    """{piece: its tokens}, bounded: an entry counts 200 bytes for a string, a tuple and a place, and what they hold.

    A dict with `__missing__`: `map(pieces.__getitem__, ...)` runs no line of Python for a piece that was met before.

    encoder: a BytePairEncoder. known: {piece: token} of pieces that are one token. cut: what cuts text into parts that
    are encoded alone, as `pretokenize.pieces` does.
    """

    def __init__(self, encoder, known, cut):
        self.encoder, self.known, self.cut = encoder, known, cut
        self.room = PIECES_BYTES

    def clear(self):
        super().clear()
        self.room = PIECES_BYTES

    def encode(self, text):
        """Token ids (list[int]) of text (str)."""
        return list(chain.from_iterable(map(self.__getitem__, self.cut(text))))

    def __missing__(self, piece):
        token = self.known.get(piece)
        tokens = tuple(self.encoder.encode(piece.encode())) if token is None else (token,)
        self._remember(piece, tokens)
        return tokens

    def _remember(self, piece, tokens):
        if len(piece) > MAX_KEY:
            return
        self.room -= 200 + 4 * len(piece) + 8 * len(tokens)
        if self.room < 0:
            self.clear()
        self[piece] = tokens


class Memo:
    """Encodes text without special tokens. As for `Pieces`.

    Short text goes by its pieces, in plain Python. Long text goes by its words, in numpy, once there has been so much
    text that numpy's import and the tables are worth their tenths of a second.
    """

    long_text = 1 << 12  # characters
    much_text = 1 << 20

    def __init__(self, encoder, known, cut):
        self._pieces = Pieces(encoder, known, cut)
        self._words = None
        self._seen = 0  # characters

    def __reduce__(self):
        """Copied or sent to another process, it has seen nothing."""
        return Memo, (self._pieces.encoder, self._pieces.known, self._pieces.cut)

    def clear(self):
        """Forgets everything, as when new."""
        self._pieces.clear()
        if self._words:
            self._words.clear()

    def encode(self, text):
        """Token ids (list[int]) of text (str). Raises UnicodeEncodeError for a lone surrogate."""
        self._seen += len(text)
        if len(text) < self.long_text or self._seen < self.much_text:
            return self._pieces.encode(text)
        ids, _ = self._numpy_words().encode([text.encode()])
        return ids.tolist()

    def encode_many(self, texts):
        """Token ids (list[int]) of each of texts, as encode gives them one by one; short ones go together."""
        if not self._is_much(texts, self.much_text):
            return [self.encode(text) for text in texts]
        ids, counts = self._encode_together([text.encode() for text in texts])
        ids, ends = ids.tolist(), counts.cumsum().tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends)]

    def encode_to_arrays(self, texts):
        """Of texts in UTF-8 (bytes): the ids of all (int32), one behind the other, and how many each has (int64)."""
        import numpy as np

        if self._is_much(texts, self.much_text >> 3):  # numpy is there
            return self._encode_together(texts)
        rows = [self.encode(text.decode()) for text in texts]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, counts.sum()), counts

    def _is_much(self, texts, much):
        return self._seen + sum(map(len, texts)) >= much

    def _encode_together(self, texts):
        self._seen += sum(map(len, texts))
        return self._numpy_words().encode(texts)

    def _numpy_words(self):
        if self._words is None:
            from .words import Words

            self._words = Words(self._pieces)
        return self._words
