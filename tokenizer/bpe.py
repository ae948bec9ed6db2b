"""From the bytes of one piece to tokens: byte-pair encoding (Sennrich et al. 2016, section 3.2, on bytes).

The rule: start from single bytes; as long as some adjacent pair stands in the table of merges, join the pair with the
lowest rank, the leftmost one first. Both functions below follow it and give the same tokens; they differ in what they
look at again after a join. `_merge_short` searches all ranks for the smallest: n^2, but each step is one call into C,
which wins for words. `_merge_long` keeps the ranks in a heap: n log n.
"""

from heapq import heapify, heappop, heappush
from itertools import pairwise, repeat

NO_MERGE = 1 << 40
SHORT = 128


class BytePairEncoder:
    """Encodes pieces of text by a table of merges.

    byte_ids: the token id of each of the 256 bytes. ranks: {(left id, right id): rank}. products: the id of the token
    that the merge of a given rank makes.
    """

    def __init__(self, byte_ids, ranks, products):
        self.byte_ids, self.ranks, self.products = byte_ids, ranks, products

    def encode(self, piece):
        """Token ids (list[int]) of a piece (bytes)."""
        ids = list(map(self.byte_ids.__getitem__, piece))
        merge = _merge_short if len(ids) <= SHORT else _merge_long
        return merge(ids, self.ranks, self.products)


def _merge_short(ids, ranks, products):
    rank_of = ranks.get
    pairs = list(map(rank_of, pairwise(ids), repeat(NO_MERGE)))  # pairs[i] is the rank of ids[i], ids[i + 1]
    while pairs:
        best = min(pairs)
        if best == NO_MERGE:
            break
        i = pairs.index(best)
        ids[i] = joined = products[best]
        del ids[i + 1], pairs[i]
        if i:
            pairs[i - 1] = rank_of((ids[i - 1], joined), NO_MERGE)
        if i < len(pairs):
            pairs[i] = rank_of((joined, ids[i + 1]), NO_MERGE)
    return ids


def _merge_long(ids, ranks, products):
    """Tokens form a doubly linked list over the positions of their first bytes.

    A heap entry is `rank * n + position`: one int compares faster than a tuple, and orders equal ranks from the left.
    An entry is stale, and skipped, when the pair that now starts at its position has another rank.
    """
    n = len(ids)
    rank_of = ranks.get
    following = list(range(1, n + 1))
    preceding = list(range(-1, n - 1))
    pairs = list(map(rank_of, pairwise(ids), repeat(NO_MERGE)))
    pairs.append(NO_MERGE)
    heap = [rank * n + i for i, rank in enumerate(pairs) if rank != NO_MERGE]
    heapify(heap)
    while heap:
        rank, i = divmod(heappop(heap), n)
        if pairs[i] != rank:
            continue
        ids[i] = joined = products[rank]
        gone = following[i]
        right = following[i] = following[gone]
        ids[gone], pairs[gone] = None, NO_MERGE
        left = preceding[i]
        if left >= 0:
            pairs[left] = rank = rank_of((ids[left], joined), NO_MERGE)
            if rank != NO_MERGE:
                heappush(heap, rank * n + left)
        pairs[i] = NO_MERGE
        if right < n:
            preceding[right] = i
            pairs[i] = rank = rank_of((joined, ids[right]), NO_MERGE)
            if rank != NO_MERGE:
                heappush(heap, rank * n + i)
    return [token for token in ids if token is not None]
