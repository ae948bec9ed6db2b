"""Exact memoisation: what a piece's tokens are depends on the piece alone, so remembering them changes no result."""

import re
from itertools import chain

from ..unicode_classes import WHITESPACE

MAX_KEY = 100  # characters: a longer piece is not remembered
PIECES_BYTES = 16 << 20

# ASCII whitespace that starts a run: a cut inside one would part what may be one token.
_RUN = re.compile(f"[\t-\r ](?<![{WHITESPACE}][\t-\r ])")
_SPACES = "".join(re.findall(f"[{WHITESPACE}]", "".join(map(chr, range(0x3001)))))


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
        run = _RUN.search(text)
        head = run.start() if run else len(text)
        ids = self._numpy_words().encode(text[head:].encode())
        ids[:0] = self._pieces.encode(text[:head])
        return ids

    def encode_many(self, texts):
        """Token ids (list[int]) of each of texts, as encode gives them one by one; short ones go together.

        Where a text ends nothing but a run of whitespace depends on what follows: so each is taken from its first
        whitespace on and without its last run, and then they stand one behind the other as one text would.
        """
        size = sum(map(len, texts))
        if self._seen + size < self.much_text:
            return [self.encode(text) for text in texts]
        self._seen += size
        heads, bodies, ends = [], [], []
        for text in texts:
            end = len(text.rstrip(_SPACES))
            run = _RUN.search(text, 0, end)
            head = run.start() if run else end
            heads.append(self._pieces.encode(text[:head]))
            bodies.append(text[head:end].encode())
            ends.append(self._pieces.encode(text[end:]))
        middles = self._numpy_words().encode_many(bodies)
        return [head + middle + end for head, middle, end in zip(heads, middles, ends)]

    def _numpy_words(self):
        if self._words is None:
            from .words import Words

            self._words = Words(self._pieces)
        return self._words
