"""Encoding long text in numpy, a block at a time: all its words are looked up at once, and new ones learned together.

A word of up to 15 bytes, with its length, is a number of 128 bits: to look it up is to compare two integers, and what
is found is exact, for a word's tokens depend on it alone. The table begins with the vocabulary's own tokens. Pieces
are looked up in it too, so of a new word only those pieces are merged that are new themselves, all of a block at once.
A longer word, of which few come twice, is put together from its pieces each time; longer pieces, and runs of
whitespace, are kept in a dict up to 100 bytes.
"""

import os
import threading
import weakref
from functools import cached_property
from itertools import chain, repeat

import numpy as np

from . import spans
from .hashing import Table
from .merging import Merger
from .spans import SHORT, Spans, stretches

LONG = 100  # bytes: longer pieces are not remembered
MERGED = 80  # bytes: longer pieces are not merged with the others, who would have done long before
# What is remembered, at the most, when a block has been encoded.
MOST_WORDS = 1 << 18  # in the table, the vocabulary's among them: 13 MB
MOST_IDS = 1 << 20  # of words: 4 MB, and as much again while they are moved
MOST_LONG = 1 << 15  # in the dict: 8 MB
_COUNT = np.int64(32)
_CLAIMED = 1 << 16  # keys: for so many, of which several may be equal, the table makes room at once
_every: weakref.WeakSet = weakref.WeakSet()


class Words:
    """Encodes blocks of text. pieces: a memo.Pieces, whose encoder and known pieces are used here as well."""

    def __init__(self, pieces):
        self._pieces = pieces
        self._merger = Merger(pieces.encoder)
        self.renew_lock()
        _every.add(self)
        known = [piece for piece in pieces.known if len(piece) <= SHORT]  # all ASCII
        lengths = np.fromiter(map(len, known), np.int64, len(known))
        self._known = Spans("".join(known).encode(), np.cumsum(lengths) - lengths, lengths).numbers()
        self._known_ids = np.fromiter(map(pieces.known.__getitem__, known), np.int32, len(known))
        self._clear()

    def renew_lock(self):
        """For a forked process, in which the thread that held the lock does not go on."""
        self._lock = threading.Lock()

    def clear(self):
        """Forgets everything but the vocabulary, as when new."""
        with self._lock:
            self._clear()

    def _clear(self):
        self._is_whole = False
        number = len(self._known_ids)
        self._ids, self._kept = np.empty(2 * number + 1024, np.int32), 0  # of one word after the other
        self._clear_long()
        self._set_table(Table(2 * number))
        slots, _ = self._table.claim(*self._known)
        self._set(slots, self._keep(self._known_ids, np.ones(number, np.int64)), 1)
        self._is_whole = True

    def _clear_long(self):
        self._long = {}  # {piece of more than SHORT bytes: where its ids begin << 32 | their number}

    def encode(self, texts):
        """Token ids (int32) of texts, each UTF-8 (bytes), one behind the other, and how many each has (int64)."""
        ids, counts = [np.empty(0, np.int32)], np.zeros(len(texts), np.int64)
        with self._lock:
            for owners, parts in spans.together(texts):
                some, number = self._encode_parts(parts)
                ids.append(some)
                np.add.at(counts, owners, number)
            if len(self._ids) > 2 * MOST_IDS:
                self._ids = self._ids[: self._kept].copy()
        return np.concatenate(ids), counts

    def _encode_parts(self, parts):
        """(ids, how many each part has) of parts of about a block in all, none of them empty."""
        if not self._is_whole:
            self._clear()
        self._is_whole = False  # a word may have its slot and not yet its ids, and an interrupt may come
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        words, is_run = spans.words(b"".join(parts), ends)
        first, count, lasting = self._look_up(words, is_run)
        ids = self._ids[stretches(first, count)]
        number = np.add.reduceat(count, np.searchsorted(words.starts, ends - np.diff(ends, prepend=0)), dtype=np.int64)
        self._kept = lasting
        self._is_whole = True
        if len(self._long) > MOST_LONG:
            self._clear_long()
        if self._table.used > MOST_WORDS or self._kept > MOST_IDS:
            self._clear()
        return ids, number

    def _look_up(self, words, is_run):
        """(first, count, lasting): where the ids of each word begin in _ids, and how many they are.

        lasting: how many of _ids to keep; those behind belong to words too long to be remembered.
        """
        is_short = words.lengths <= SHORT
        (short,), (long,) = np.nonzero(is_short), np.nonzero(~is_short)
        a, b = words[short].numbers()
        slots, new_short = self._find_or_claim(a, b)

        lasting = self._kept
        new = np.concatenate((short[new_short], long))
        first, count = np.empty(len(words), np.int32), np.empty(len(words), np.int32)
        if len(new):
            table = self._table
            first[new], count[new], lasting = self._learn(words[new], is_run[new], len(long))
            if self._table is not table:
                slots = self._table.find(a, b)
            self._set(slots[new_short], first[short[new_short]], count[short[new_short]])
        first[short], count[short] = self._first[slots], self._count[slots]
        return first, count, lasting

    def _learn(self, words, is_run, forgotten):
        """As _look_up, of new words, from their pieces. The last `forgotten` words will not be remembered."""
        pieces, counts = spans.pieces(words[~is_run].joined(), lambda: self._closing)
        runs = words[is_run].texts()  # one piece each, behind the pieces of the other words
        first_piece, pieces_of = np.empty(len(words), np.int64), np.ones(len(words), np.int64)
        first_piece[~is_run], pieces_of[~is_run] = np.cumsum(counts) - counts, counts
        first_piece[is_run] = len(pieces) + np.arange(len(runs))
        first, count = map(np.concatenate, zip(self._look_up_pieces(pieces), self._look_up_long(runs)))

        first_id, ids_of = first[first_piece], count[first_piece]
        lasting = self._kept
        (several,) = np.nonzero(pieces_of > 1)
        if len(several):
            pieces_of = pieces_of[several]
            parts = stretches(first_piece[several], pieces_of)
            ids_of[several] = np.add.reduceat(count[parts], np.cumsum(pieces_of) - pieces_of)
            first_id[several] = self._keep(self._ids[stretches(first[parts], count[parts])], ids_of[several])
            lasting = self._kept - ids_of[several[several >= len(words) - forgotten]].sum()
        return first_id, ids_of, lasting

    def _look_up_pieces(self, pieces):
        """(first, count) of each piece that is no run."""
        first, count = np.empty(len(pieces), np.int64), np.empty(len(pieces), np.int64)
        (short,), (long,) = np.nonzero(pieces.lengths <= SHORT), np.nonzero(pieces.lengths > SHORT)
        slots, _ = self._find_or_claim(*pieces[short].numbers())
        (new,) = np.nonzero(self._count[slots] == 0)
        self._first[slots[new]] = new  # of several at a slot, one stays
        new = new[self._first[slots[new]] == new]
        if len(new):
            ids, counts = self._merger.encode(pieces[short[new]].joined())
            self._set(slots[new], self._keep(ids, counts), counts)
        first[short], count[short] = self._first[slots], self._count[slots]
        first[long], count[long] = self._look_up_long(pieces[long].texts())
        return first, count

    def _look_up_long(self, texts):
        """(first, count) of each of texts (bytes) that are one piece; of equal ones, one is encoded."""
        places = np.fromiter(map(self._long.get, texts, repeat(-1)), np.int64, len(texts))
        if len(absent := np.flatnonzero(places < 0)):
            absent = absent.tolist()
            new = list(dict.fromkeys(map(texts.__getitem__, absent)))
            self._long.update(zip(new, self._encode_long(new).tolist()))
            places[absent] = list(map(self._long.__getitem__, map(texts.__getitem__, absent)))
            for text in new:
                if len(text) > LONG:
                    del self._long[text]
        return places >> _COUNT, places & 0xFFFFFFFF

    def _encode_long(self, texts):
        """What _long says of each of texts."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        first, count = np.empty_like(lengths), np.empty_like(lengths)
        (together,), (alone,) = np.nonzero(lengths <= MERGED), np.nonzero(lengths > MERGED)
        if len(together):
            all = Spans(b"".join(texts), np.cumsum(lengths) - lengths, lengths)
            ids, count[together] = self._merger.encode(all[together].joined())
            first[together] = self._keep(ids, count[together])
        if len(alone):
            encoded = [self._pieces[texts[i].decode()] for i in alone.tolist()]
            count[alone] = list(map(len, encoded))
            first[alone] = self._keep(np.fromiter(chain.from_iterable(encoded), np.int32), count[alone])
        return first << _COUNT | count

    def _keep(self, ids, counts):
        """Keeps ids. Returns where those of each word, of which there are so many, begin from now on."""
        first, self._kept = self._kept, self._kept + len(ids)
        if self._kept > len(self._ids):
            self._ids = np.concatenate((self._ids[:first], np.empty(self._kept, np.int32)))
        self._ids[first : self._kept] = ids
        return first + np.cumsum(counts) - counts

    def _find_or_claim(self, a, b):
        """(slots, new): the slot of each key, and the positions of keys that had none, of equal ones only one.

        It may make a larger table; slots known before are then no longer right.
        """
        old = self._table
        slots = old.find(a, b)
        (absent,) = np.nonzero(slots < 0)
        new = [absent[:0]]
        for start in range(0, len(absent), _CLAIMED):
            part = absent[start : start + _CLAIMED]
            if not self._table.has_room(len(part)):
                self._grow(len(part))
            slots[part], claimed = self._table.claim(a[part], b[part])
            new.append(part[claimed])
        if self._table is not old:
            slots = self._table.find(a, b)
        return slots, np.concatenate(new)

    def _grow(self, number):
        old, first, count = self._table, self._first, self._count
        used, *keys = old.used_keys()
        self._set_table(Table(old.used + number))
        slots, _ = self._table.claim(*keys)
        self._set(slots, first[used], count[used])

    def _set(self, slots, first, count):
        self._first[slots], self._count[slots] = first, count

    def _set_table(self, table):
        self._table = table
        self._first, self._count = np.zeros(table.size, np.int32), np.zeros(table.size, np.uint8)

    @cached_property
    def _closing(self):
        """Whether each code point is a closing letter, see `borders.py` (bool)."""
        closing = np.zeros(0x110000, bool)
        closing[list(map(ord, self._pieces.cut.closing))] = True
        return closing


def _renew_locks():
    for words in _every:
        words.renew_lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_locks)
