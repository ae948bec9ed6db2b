"""Batches of token ids from shards (tokenizer/shards.py). Batch number i is the same whenever it is asked for.

Nothing is remembered between batches, so that training goes on from any step with the tokens that it would have seen.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tokenizer.shards import read_shard, shard_paths


class Tokens:
    """The tokens of one split of a directory, and windows of T of them, each within a shard."""

    def __init__(self, directory, split, T):
        """Raises FileNotFoundError where there are no shards, ValueError where none has T tokens."""
        self.paths = shard_paths(directory, split)
        if not self.paths:
            raise FileNotFoundError(
                f"{directory} has no {split}-*.bin; python -m tokenizer.prepare TEXTS --out {directory} writes them"
            )
        self.shards, self.T = [read_shard(path) for path in self.paths], T
        sizes = np.array([len(shard) for shard in self.shards])
        self.number = int(sizes.sum())
        self._starts = np.maximum(sizes - T + 1, 0).cumsum()  # of windows that begin anywhere
        self._cells = (sizes // T).cumsum()  # of windows side by side
        if not self._starts[-1]:
            raise ValueError(
                f"{directory}: the longest shard of {split!r} has {sizes.max()} tokens; windows of {T} need as many"
            )

    def anywhere(self, i):
        """Window [T] number i of all `positions`, which begin at every token."""
        return self._window(self._starts, i, 1)

    def cell(self, i):
        """Window [T] number i of all `cells`, which do not overlap."""
        return self._window(self._cells, i, self.T)

    @property
    def positions(self):
        return int(self._starts[-1])

    @property
    def cells(self):
        return int(self._cells[-1])

    def _window(self, ends, i, step):
        shard = int(np.searchsorted(ends, i, "right"))
        start = (i - (int(ends[shard - 1]) if shard else 0)) * step
        return self.shards[shard][start : start + self.T]

    def where(self, ids):
        """The path of the shard that ids [T] are from, for an error."""
        return next(path for path, shard in zip(self.paths, self.shards) if np.shares_memory(ids, shard))


def check_ids(rows, tokens, vocab_size):
    """Raises ValueError, with the shard, where a row holds an id that the model has no embedding for."""
    for row in rows:
        if row.max() >= vocab_size:
            raise ValueError(
                f"{tokens.where(row)} holds token {row.max()}; the model's vocabulary has 0 to {vocab_size - 1}: it "
                "was prepared with another tokenizer"
            )


class Batches:
    """Batches [B, T] of int64 by number, drawn from `tokens`, on a device.

    once: every window once in each epoch, in an order of its own; else windows that begin anywhere. The next batch is
    read while the device works on this one.
    """

    def __init__(self, tokens, B, *, seed, once=False, vocab_size, device="cpu"):
        self.tokens, self.B, self.seed, self.once = tokens, B, seed, once
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._order = None, None  # of an epoch
        self._reader, self._next = ThreadPoolExecutor(1), (None, None)

    def batch(self, number, following=None):
        """Batch `number`; `following` is the one that will be asked for next, if that is known."""
        known, future = self._next
        ids = future.result() if known == number else self._read(number)
        self._next = (None, None) if following is None else (following, self._reader.submit(self._read, following))
        return ids.to(self.device, non_blocking=True)

    def _read(self, number):
        rows = self._once(number) if self.once else self._anywhere(number)
        check_ids(rows, self.tokens, self.vocab_size)
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids.pin_memory() if self.device.type == "cuda" else ids

    def shards_of(self, number):
        """The paths of the shards that batch `number` is from."""
        rows = self._once(number) if self.once else self._anywhere(number)
        return sorted({str(self.tokens.where(row)) for row in rows})

    def _anywhere(self, number):
        starts = np.random.default_rng([self.seed, number]).integers(self.tokens.positions, size=self.B)
        return [self.tokens.anywhere(int(i)) for i in starts]

    def _once(self, number):
        cells, rows = self.tokens.cells, []
        for place in range(number * self.B, (number + 1) * self.B):
            epoch, i = divmod(place, cells)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(cells)
            rows.append(self.tokens.cell(int(self._order[1][i])))
        return rows
