"""Byte-pair encoding of many pieces at once, in numpy: the rule of `bpe.py`, one merge in each piece per round.

A piece's tokens are a doubly linked list over the positions of its first bytes, as in `bpe._merge_long`. A round finds
in each piece the pair of the lowest rank, the leftmost of equals, joins it, and looks up the two pairs that the join
has made. Its cost is one pass over the pairs' keys, and some over the pieces in which something merged.
"""

import numpy as np

from .hashing import Table
from .spans import stretches

_RANK = np.int64(32)  # rank << 32 | position: the smallest is the leftmost pair of the lowest rank
_NO_MERGE = np.int64(1 << 30)
_NOTHING = _NO_MERGE << _RANK  # and above: the key of a pair that does not merge


class Merger:
    """encoder: a bpe.BytePairEncoder, whose tables are used."""

    def __init__(self, encoder):
        pairs = np.array(list(encoder.ranks), np.uint64).reshape(-1, 2)
        self._byte_ids, self._products = np.array(encoder.byte_ids, np.uint64), np.array(encoder.products, np.uint64)
        self._table = Table(2 * len(pairs) + 1)
        self._ranks = np.full(self._table.size + 1, _NO_MERGE)  # the last is that of slot -1, none
        keys = _keys(pairs[:, 0], pairs[:, 1])
        slots, _ = self._table.claim(*keys)
        self._ranks[slots] = np.fromiter(encoder.ranks.values(), np.int64, len(pairs))
        first, second = np.divmod(np.arange(1 << 16), 256)
        self._ranks_of_bytes = self._rank(self._byte_ids[first], self._byte_ids[second])  # where most is looked up

    def encode(self, pieces):
        """(ids, counts) of pieces (Spans, joined, none empty)."""
        order = np.argsort(-pieces.lengths, kind="stable")
        ids, counts = self._encode_sorted(pieces[order].joined())
        first, number = np.empty_like(counts), np.empty_like(counts)
        first[order], number[order] = np.cumsum(counts) - counts, counts
        return ids[stretches(first, number)], number

    def _encode_sorted(self, pieces):
        """As encode, of pieces the longest of which come first: those that still merge then stand in front."""
        starts, ends = pieces.starts, pieces.starts + pieces.lengths
        N = ends[-1]
        text = pieces.bytes[:N]
        ids = self._byte_ids[text]  # of the token that begins here, if one does
        following, preceding = np.arange(1, N + 1), np.arange(-1, N - 1)
        is_token = np.ones(N, bool)
        keys = np.full(N, _NOTHING)  # of the pair that begins here
        keys[:-1] = self._ranks_of_bytes[text[:-1].astype(np.uint16) << 8 | text[1:]] << _RANK | preceding[1:]
        keys[ends - 1] = _NOTHING
        number = len(pieces)  # of pieces to be looked at
        while number:
            best = np.minimum.reduceat(keys[: ends[number - 1]], starts[:number])
            (merging,) = np.nonzero(best < _NOTHING)
            if not len(merging):
                break
            number = merging[-1] + 1
            best = best[merging]
            at = best & (1 << 32) - 1
            ids[at] = joined = self._products[best >> _RANK]
            gone = following[at]
            right, left = following[gone], preceding[at]
            following[at] = right
            is_token[gone], keys[gone], keys[at] = False, _NOTHING, _NOTHING
            has_left, has_right = left >= starts[merging], right < ends[merging]
            left, right = left[has_left], right[has_right]
            preceding[right] = before = at[has_right]
            changed = np.concatenate((left, before))
            lefts = np.concatenate((ids[left], joined[has_right]))
            rights = np.concatenate((joined[has_left], ids[right]))
            keys[changed] = self._rank(lefts, rights) << _RANK | changed
        return ids[is_token].astype(np.int32), np.add.reduceat(is_token, starts, dtype=np.int64)

    def _rank(self, lefts, rights):
        return self._ranks[self._table.find(*_keys(lefts, rights))]


def _keys(lefts, rights):
    return lefts, rights + np.uint64(1)
