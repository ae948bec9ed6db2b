"""A hash table that answers for a whole array of keys at once, in numpy: open addressing with linear probing.

Each step of a search is taken by all keys that are still searching. Most end at their first slot, so a search costs a
few passes over the array, some nanoseconds per key each, where a dict costs a call and an object.
"""

import secrets

import numpy as np

# Drawn anew in each process, so that nobody can prepare text whose words all meet in one slot.
_MIX_A, _MIX_B = (np.uint64(secrets.randbits(64) | 1) for _ in range(2))
_HALF = np.uint64(32)
FULLEST = 0.5  # share of slots in use, at most


class Table:
    """Slots of keys. A key is two uint64 (a, b) with b != 0; whoever uses the table keeps values beside it, by slot."""

    def __init__(self, number):
        """Room for so many keys."""
        bits = int(number / FULLEST).bit_length()
        self.size, self.used = 1 << bits, 0
        # a and b side by side: 16 bytes are fetched at once, as those of a complex number.
        self._keys = np.zeros(self.size, np.complex128)
        self.a, self.b = self._keys.view(np.uint64)[::2], self._keys.view(np.uint64)[1::2]
        self._claimant = np.empty(self.size, np.int32)
        self._shift = np.uint64(64 - bits)

    def has_room(self, number):
        """Whether so many more keys fit."""
        return self.used + number <= FULLEST * self.size

    def find(self, a, b):
        """The slot [n] of each key; -1 of one that is absent."""
        slots = self._first_slots(a, b)
        held = self._keys[slots].view(np.uint64)
        open = np.flatnonzero((held[1::2] != b) | (held[::2] != a))
        held = held[1::2][open]
        while len(open):
            is_free = held == 0
            slots[open[is_free]] = -1
            open = open[~is_free]
            slots[open] = at = slots[open] + 1 & self.size - 1
            held = self.b[at]
            differs = (held != b[open]) | (self.a[at] != a[open])
            open, held = open[differs], held[differs]
        return slots

    def used_keys(self):
        """(slots, a, b) of all keys."""
        slots = np.flatnonzero(self.b)
        return slots, self.a[slots], self.b[slots]

    def claim(self, a, b):
        """Gives each key a slot: (slots, the positions of those that had none, of equal ones only one)."""
        slots, open, new = self._first_slots(a, b), np.arange(len(a)), []
        while len(open):
            at = slots[open]
            is_free = self.b[at] == 0
            if is_free.any():
                # Of several keys at one slot the last is written; it alone finds itself there.
                free, place = open[is_free], at[is_free]
                self._claimant[place] = free
                won = self._claimant[place] == free
                free, place = free[won], place[won]
                self.a[place], self.b[place] = a[free], b[free]
                new.append(free)
            differs = (self.b[at] != b[open]) | (self.a[at] != a[open])
            open = open[differs]
            slots[open] = at[differs] + 1 & self.size - 1
        claimed = np.concatenate(new) if new else open
        self.used += len(claimed)
        return slots, claimed

    def _first_slots(self, a, b):
        mixed = b * _MIX_B  # (a ^ b B) A = m, then (m ^ m >> 32) A, of which the upper bits; all in place
        mixed ^= a
        mixed *= _MIX_A
        mixed ^= mixed >> _HALF
        mixed *= _MIX_A
        mixed >>= self._shift
        return mixed.view(np.int64)
