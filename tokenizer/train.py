"""Learning merges from text: byte-pair encoding as in Sennrich et al. 2016, algorithm 1, with counts kept up to date.

The naive algorithm counts all pairs of the corpus again after each merge. A merge changes only the pieces that hold the
merged pair, so it is enough to know which those are, and to correct the counts of the pairs beside each occurrence.
"""

from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise

from .pretokenize import pieces
from .vocabulary import BYTE_TO_CHAR


def learn_merges(texts, number, progress=True):
    """At most `number` merges, spelled as in `merges.txt`, in order of rank, from an iterable of str.

    Deterministic: of the pairs that occur most often, the one with the smallest (left id, right id) merges. A pair that
    occurs once does not merge.
    """
    frequencies: Counter[str] = Counter()
    for text in texts:
        frequencies.update(pieces(text))
    ids = {byte: id for id, byte in enumerate(BYTE_TO_CHAR)}
    names = list(BYTE_TO_CHAR.values())
    words = [([ids[byte] for byte in piece.encode()], count) for piece, count in frequencies.items()]

    counts: Counter[tuple[int, int]] = Counter()  # pair -> how often
    holders: dict[tuple[int, int], set[int]] = defaultdict(set)  # pair -> indices of words that may hold it
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += count
            holders[pair].add(index)
    # An entry is stale, and skipped, when the pair has another count by now.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)

    merges: list[str] = []
    with _progress(number, progress) as bar:
        while heap and len(merges) < number:
            negative, pair = heappop(heap)
            if counts[pair] != -negative:
                continue
            if negative > -2:
                break
            new = len(names)
            left, right = pair
            merges.append(f"{names[left]} {names[right]}")
            names.append(names[left] + names[right])
            changed: Counter[tuple[int, int]] = Counter()
            for index in holders.pop(pair):
                word, count = words[index]
                merged = _merge(word, left, right, new)
                if len(merged) == len(word):
                    continue
                for old in pairwise(word):
                    changed[old] -= count
                for now in pairwise(merged):
                    changed[now] += count
                    if new in now:
                        holders[now].add(index)
                words[index] = (merged, count)
            for other, change in changed.items():
                if change:
                    counts[other] += change
                    if counts[other] > 0:
                        heappush(heap, (-counts[other], other))
            bar.update()
    return merges


def _merge(word, left, right, new):
    """The word with each occurrence of left, right, from the left, replaced by new."""
    merged, i, last = [], 0, len(word) - 1
    while i <= last:
        if i < last and word[i] == left and word[i + 1] == right:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def _progress(total, enabled):
    from tqdm import tqdm

    return tqdm(total=total, desc="merges", unit="merge", disable=not enabled)
