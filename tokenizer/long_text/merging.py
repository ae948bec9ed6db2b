"""Byte-pair encoding of many pieces at once, in numpy: the rule of `bpe.py`, one merge in each piece per round.

The tokens of all pieces stand in one array, with a border behind each piece. A round finds in each piece the pair of
the lowest rank, the leftmost of equals, joins it, and looks up the two pairs that the join has made. Pieces in which
nothing merges any more leave the array.
"""

import numpy as np

from .hashing import Table

_BORDER = np.uint64(0xFFFFFFFF)  # no token
_NO_MERGE = np.int64(1 << 30)
_RANK = np.int64(32)  # rank << 32 | position: the smallest is the leftmost pair of the lowest rank


class Merger:
    """encoder: a bpe.BytePairEncoder, whose tables are used."""

    def __init__(self, encoder):
        pairs = np.array(list(encoder.ranks), np.uint64).reshape(-1, 2)
        self._byte_ids, self._products = np.array(encoder.byte_ids, np.uint64), np.array(encoder.products, np.uint64)
        self._table = Table(2 * len(pairs) + 1)
        self._ranks = np.full(self._table.size + 1, _NO_MERGE)  # the last is that of slot -1, none
        keys = _keys(pairs[:, 0], pairs[:, 1])
        self._table.claim(*keys)
        self._ranks[self._table.find(*keys)] = np.fromiter(encoder.ranks.values(), np.int64, len(pairs))

    def encode(self, pieces):
        """(ids, counts) of pieces (Spans, joined, none empty)."""
        ends = np.cumsum(pieces.lengths + 1)
        ids = np.full(ends[-1], _BORDER)
        is_byte = np.ones(len(ids), bool)
        is_byte[ends - 1] = False
        ids[is_byte] = self._byte_ids[pieces.bytes[: pieces.lengths.sum()]]
        piece = np.repeat(np.arange(len(pieces), dtype=np.int32), pieces.lengths + 1)  # of each token
        starts = ends - pieces.lengths - 1
        ranks = np.full(len(ids), _NO_MERGE)
        ranks[:-1] = self._rank(ids[:-1], ids[1:])
        done = []
        while len(ids):
            best = np.minimum.reduceat(ranks << _RANK | np.arange(len(ids)), starts)
            stays = np.ones(len(ids), bool)
            goes_on = best < _NO_MERGE << _RANK
            if not goes_on.all():
                stays = np.repeat(goes_on, np.diff(starts, append=len(ids)))
                done.append((piece[~stays], ids[~stays]))
                best, starts = best[goes_on], starts[goes_on]
            at, rank = best & (1 << 32) - 1, best >> _RANK
            ids[at] = self._products[rank]
            stays[at + 1] = False
            place = np.cumsum(stays) - 1
            ids, ranks, piece, starts, at = ids[stays], ranks[stays], piece[stays], place[starts], place[at]
            changed = np.concatenate((at, at[at > 0] - 1))
            ranks[changed] = self._rank(ids[changed], ids[changed + 1])
        piece, ids = map(np.concatenate, zip(*done))
        is_token = ids != _BORDER
        piece, ids = piece[is_token], ids[is_token]
        return ids[np.argsort(piece, kind="stable")].astype(np.int32), np.bincount(piece, minlength=len(pieces))

    def _rank(self, lefts, rights):
        return self._ranks[self._table.find(*_keys(lefts, rights))]


def _keys(lefts, rights):
    return lefts, rights + np.uint64(1)
