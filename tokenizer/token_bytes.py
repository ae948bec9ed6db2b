"""From ids to bytes: a short list by looking each id up, a long one in numpy; both in blocks that the caches hold."""

from array import array
from operator import itemgetter

BLOCK = 1 << 14  # ids


class TokenBytes:
    """Joins the bytes of ids. token_bytes: {id: bytes}, ids from 0 on, with gaps perhaps.

    numpy joins a list of at least `long_list` ids once there have been `much` of them in all: it takes half the time,
    but its import a twentieth of a second.
    """

    long_list, much = 1 << 12, 1 << 18

    def __init__(self, token_bytes):
        self._table = [token_bytes.get(id) for id in range(max(token_bytes) + 1)]  # None is a gap
        self._seen = 0
        self._spans = None

    def join(self, ids):
        """The bytes of ids (list[int]). Raises IndexError, OverflowError or TypeError if one of them is no id."""
        self._seen += len(ids)
        join = self._join_in_numpy if len(ids) >= self.long_list and self._seen >= self.much else self._join
        return b"".join([join(ids[start : start + BLOCK]) for start in range(0, len(ids), BLOCK)])

    def _join(self, ids):
        array("I", ids)  # raises OverflowError for a negative one, twice as fast as min()
        # One call looks up all; for a single id it would return the bytes themselves, not a tuple of them.
        return b"".join(itemgetter(*ids)(self._table)) if len(ids) > 1 else self._table[ids[0]] + b""

    def _join_in_numpy(self, ids):
        import numpy as np

        from .spans import stretches

        if self._spans is None:
            lengths = np.array([-1 if token is None else len(token) for token in self._table], np.int32)
            starts = np.cumsum(lengths.clip(0), dtype=np.int32) - lengths
            self._spans = np.frombuffer(b"".join(filter(None, self._table)), np.uint8), starts, lengths
        text, starts, lengths = self._spans
        at = np.frombuffer(array("I", ids), np.uint32)
        starts, lengths = starts.take(at), lengths.take(at)
        if lengths.min() < 0:
            raise IndexError
        return text.take(stretches(starts, lengths)).tobytes()
