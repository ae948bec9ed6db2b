"""From ids to bytes: a short list by looking each id up, a long one in numpy; both in blocks that the caches hold."""

from array import array
from codecs import getincrementaldecoder
from operator import itemgetter

BLOCK = 1 << 14  # ids
# Ways to treat an error that do not ask where in the text it is.
_ANYWHERE = {"strict", "replace", "ignore", "backslashreplace", "surrogateescape"}


class TokenBytes:
    """Joins the bytes of ids, and decodes them. token_bytes: {id: bytes}, ids from 0 on, with gaps perhaps.

    numpy joins a list of at least `long_list` ids once there have been `much` of them in all: it takes half the time,
    but its import a twentieth of a second.
    """

    long_list, much = 1 << 12, 1 << 18

    def __init__(self, token_bytes):
        self._table = [token_bytes.get(id) for id in range(max(token_bytes) + 1)]  # None is a gap
        self._seen = 0
        self._arrays = None

    def join(self, ids):
        """The bytes of ids (list[int]). Raises IndexError, OverflowError or TypeError if one of them is no id."""
        return b"".join(self._blocks(ids))

    def decode(self, ids, errors):
        """The text of ids, as join(ids).decode("utf-8", errors), but block by block, which is faster."""
        if errors not in _ANYWHERE:
            return self.join(ids).decode("utf-8", errors)
        decoder = getincrementaldecoder("utf-8")(errors)
        try:
            return "".join([*map(decoder.decode, self._blocks(ids)), decoder.decode(b"", final=True)])
        except UnicodeDecodeError:
            return self.join(ids).decode("utf-8", errors)  # raises it again, with positions in the whole

    def _blocks(self, ids):
        self._seen += len(ids)
        join = self._join_in_numpy if len(ids) >= self.long_list and self._seen >= self.much else self._join
        return (join(ids[start : start + BLOCK]) for start in range(0, len(ids), BLOCK))

    def _join(self, ids):
        array("I", ids)  # raises OverflowError for a negative one, twice as fast as min()
        # One call looks up all; for a single id it would return the bytes themselves, not a tuple of them.
        return b"".join(itemgetter(*ids)(self._table)) if len(ids) > 1 else self._table[ids[0]] + b""

    def _join_in_numpy(self, ids):
        import numpy as np

        if self._arrays is None:
            table = [token or b"" for token in self._table]
            lengths = np.array([-1 if token is None else len(token) for token in self._table])
            eights = np.frombuffer(b"".join(token[:16].ljust(16, b"\0") for token in table), "<u8").reshape(-1, 2)
            self._arrays = lengths, eights[:, 0].copy(), eights[:, 1].copy()
        all_lengths, first_eight, second_eight = self._arrays
        at = np.frombuffer(array("I", ids), np.uint32)
        lengths = all_lengths.take(at)
        if lengths.min() < 0:
            raise IndexError
        ends = lengths.cumsum()
        starts = ends - lengths
        joined = np.empty(ends[-1] + 8, np.uint8)
        eight_at = np.ndarray(ends[-1] + 1, "<u8", joined, strides=(1,))
        # Eight bytes are written at once, in order: what a token writes beyond its end, the next ones write again.
        (longer,) = np.nonzero(lengths > 8)
        eight_at[starts[longer] + 8] = second_eight.take(at[longer])
        eight_at[starts] = first_eight.take(at)
        for i in np.flatnonzero(lengths > 16).tolist():
            joined[starts[i] : ends[i]] = np.frombuffer(self._table[ids[i]], np.uint8)
        return joined[:-8].tobytes()
