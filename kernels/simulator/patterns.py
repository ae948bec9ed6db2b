"""Which shared-memory addresses the threads of a request want: bank conflicts, and who wants the same as another.

The same patterns recur in every block, iteration and launch, so each is analysed once and kept.
"""

from dataclasses import dataclass

import numpy as np

BANKS, BANK_BYTES = 32, 4
_KEPT = 4096


@dataclass(frozen=True)
class Pattern:
    """requests: warps that access. wavefronts: passes over the banks that they need. conflicts: those beyond the fewest
    that so many bytes need. distinct: the accesses (indices) left when each warp names each address once, or None if
    none is named twice.
    """

    requests: int
    wavefronts: int
    conflicts: int
    distinct: np.ndarray | None


class Patterns:
    """The patterns of one program."""

    def __init__(self):
        self._known = {}

    def find(self, team, addresses, size, threads):
        """addresses: one per access of `size` bytes by `threads` of the team (None: all of them)."""
        key = (size, addresses.tobytes(), None if threads is None else threads.tobytes())
        if key not in self._known:
            if len(self._known) == _KEPT:
                self._known.clear()
            threads = np.arange(team.size) if threads is None else threads
            self._known[key] = _analyse(addresses.astype(np.int64), size, threads)
        return self._known[key]


def _analyse(addresses, size, threads):
    """A wavefront serves one 4-byte word of each bank. Accesses of 8 and 16 bytes are served in halves and quarters of
    the warp. Lanes that want the same word share it.
    """
    warps = threads // 32
    named, first = np.unique((warps << 32) | addresses, return_index=True)
    part = threads // min(32, BANKS * BANK_BYTES // max(size, BANK_BYTES))
    words = (addresses // BANK_BYTES)[:, None] + np.arange(max(size // BANK_BYTES, 1))
    wanted = np.unique((part << 32)[:, None] | words)
    cells = (wanted >> 32) * BANKS + (wanted & (BANKS - 1))
    load = np.bincount(cells, minlength=(int(part.max()) + 1) * BANKS).reshape(-1, BANKS).max(1)
    return Pattern(
        requests=1 + int(np.count_nonzero(np.diff(warps))),
        wavefronts=int(load.sum()),
        conflicts=int(np.maximum(load - 1, 0).sum()),
        distinct=None if len(named) == len(addresses) else first,
    )
