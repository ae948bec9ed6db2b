"""The KV cache: one preallocated tensor for all layers, and how many tokens of each row it holds.

Rows may have different lengths. Row b occupies slots 0 to lengths[b] - 1 of its own, so a token's slot is its position
and no row pays for another's padding. The lengths live on the host, where generation already knows them; what a GPU
needs of them is made once for all layers of a forward pass, and a decode step copies nothing there.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kernels.checks import check_number
from model.attention import attention
from model.config import GPT2Config, brief

STEP = 256  # slots by which the cache grows


class PerRow:
    """One number per row: a list on the host, mirrored as int32 [B] on a device, at a fixed address."""

    def __init__(self, B, device):
        self.tensor = torch.zeros(B, dtype=torch.int32, device=device)
        self.known = [0] * B  # what the tensor holds; None: anything

    def of(self, numbers):
        """The tensor, holding `numbers`; copied from the host only if no single fill or addition will do."""
        changes = [] if self.known is None else [new - old for new, old in zip(numbers, self.known)]
        if len(set(changes)) == 1:
            if changes[0]:
                self.tensor.add_(changes[0])
        elif len(set(numbers)) == 1:
            self.tensor.fill_(numbers[0])
        else:
            self.tensor.copy_(torch.tensor(numbers, dtype=torch.int32, device="cpu"))
        self.known = list(numbers)
        return self.tensor


def grown_capacity(needed, n_positions):
    """The capacity of a cache that has grown to hold `needed` tokens."""
    return min(n_positions, -(-needed // STEP) * STEP)


def next_places(lengths, T):
    """Index, for store(), of the T slots after lengths [B] int32: rows [B, 1], slots [B, T]."""
    rows = torch.arange(len(lengths), device=lengths.device)[:, None]
    return rows, lengths.long()[:, None] + torch.arange(T, device=lengths.device)


def store(held, new, places):
    """Writes new [B, H, T, D] into held [B, H, capacity, D]."""
    held.transpose(1, 2)[places] = new.transpose(1, 2)  # [B, T, H, D]


class KVCache:
    """Keys and values of every layer, [n_layer, 2, B, H, capacity, D], read in place by attention.

    lengths: tokens held by each row. starts: the first token of each row that may be seen (left padding), or None.
    cross: {layer: (keys, values)} [B, H, S, D] of an encoder's states, from the first forward pass that is given them.
    encoder: which of them each row may see (model/layers/cross_attention.py), or None.
    one_query_at_a_time: on a CPU, computes attention for each new token separately, so that several at once are
    bit-identical to one after the other.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int,
        *,
        capacity: int = STEP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, GPT2Config):
            raise TypeError(f"KVCache: config is {brief(config)}; it must be a GPT2Config")
        check_number("KVCache", batch_size, "batch_size", "from 0 to 2**31", lambda n: 0 <= n <= 2**31, integer=True)
        check_number("KVCache", capacity, "capacity", "at least 0", lambda n: n >= 0, integer=True)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"KVCache: dtype is {brief(dtype)}; it must be a floating-point torch.dtype")
        if device is not None:
            try:
                device = torch.device(device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"KVCache: device is {brief(device)}; it must be one of torch's") from error
        self.n_positions = config.n_positions
        shape = (config.n_layer, 2, batch_size, config.n_head, min(capacity, config.n_positions), config.head_dim)
        # Zeros: where rows differ in length, weights that are 0 meet values that were never written; 0 * NaN is NaN.
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.starts: list[int] | None = None
        self.cross: dict[int, tuple] = {}
        self.encoder: Any = None
        self._places: Any = None
        self.one_query_at_a_time = False
        self._forget_device()

    @property
    def batch_size(self) -> int:
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    @property
    def tokens(self) -> list[int]:
        """How many tokens each row holds, padding before them not counted."""
        return [length - start for length, start in zip(self.lengths, self.starts or [0] * self.batch_size)]

    @property
    def is_uniform(self) -> bool:
        """Whether all rows are equally long."""
        return len(set(self.lengths)) <= 1

    def get_seq_length(self) -> int:
        """The length of the longest row."""
        return max(self.lengths, default=0)

    def positions(self, T: int) -> torch.Tensor:
        """The positions [B, T] of the T tokens that reserve() made room for, where rows differ in length."""
        return self._places[1]

    def reserve(self, T: int) -> None:
        """Makes room for T more tokens in the longest row and computes their slots, once for all layers.

        Raises ValueError where n_positions has no room.
        """
        if self.data.is_inference() and not torch.is_inference_mode_enabled():
            self.data = self.data.clone()  # only inference mode may write to what it made
            self._forget_device()
        needed = self.get_seq_length() + T
        if needed > self.n_positions:
            raise ValueError(
                f"KVCache: the {self.get_seq_length()} tokens held and {T} new ones need {needed} positions; "
                f"n_positions is {self.n_positions}"
            )
        if needed > self.capacity:
            capacity = grown_capacity(needed, self.n_positions)
            self.move(self.data.new_empty((*self.data.shape[:4], capacity, self.data.shape[5])))
        self._places, self._bounds = None, {"q_start": None, "kv_start": None}
        if not self.is_uniform:
            self._bounds["q_start"] = self._on_device("lengths")
            self._places = next_places(self._bounds["q_start"], T)
        if self.starts is not None:
            self._bounds["kv_start"] = self._on_device("starts")

    def move(self, data: torch.Tensor) -> None:
        """Moves the cache to the memory `data`, which may have more slots; the tokens held are copied."""
        held = self.get_seq_length()
        data[..., :held, :].copy_(self.data[..., :held, :])
        data[..., held:, :].zero_()
        self.data = data

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: list[int], **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Appends k and v [B, H, T, D]; attention of q over all keys held.

        counts: how many of the T tokens of each row are tokens; the rest is padding on the right, whose o means
        nothing. Returns (o, weights), as `attention` does.
        """
        self._store(layer, k, v)
        T = q.shape[2]
        longest = self.get_seq_length() + T
        keys, values = self.data[layer, ..., :longest, :].to(
            q.dtype
        )  # under autocast q has fewer bits than what is held
        is_alone = counts == [T] and self.starts is None and not self.one_query_at_a_time
        if q.device.type == "cpu" and not is_alone and not options.get("return_weights"):
            return self._attend_by_row(q, keys, values, counts, options), None
        return attention(q, keys, values, **self._bounds, **options)

    def advance(self, counts: list[int]) -> None:
        """Adds counts to lengths, once every layer has stored its keys and values."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]

    def crop(self, lengths: int | list[int]) -> None:
        """Truncates rows to `lengths` (an int, or one per row); a negative number counts from the end."""
        lengths = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
        self.lengths = [min(old, new if new >= 0 else old + new) for old, new in zip(self.lengths, lengths)]

    def reorder(self, rows: Sequence[int] | torch.Tensor) -> None:
        """Row b becomes what row rows[b] was; `rows` may repeat, leave out, and change the number of rows."""
        index = torch.as_tensor(rows, device=self.data.device)
        self.data = self.data.index_select(2, index)
        rows = index.tolist()
        self.lengths = [self.lengths[row] for row in rows]
        self.starts = None if self.starts is None else [self.starts[row] for row in rows]
        self._select_encoder(index)
        self._forget_device()

    def _select_encoder(self, index):
        """What is held of an encoder, for these rows; the tensors are new, for a copy may hold the old ones."""
        self.cross = {layer: tuple(x[index] for x in pair) for layer, pair in self.cross.items()}
        if self.encoder is not None and self.encoder.kv_start is not None:
            bounds = {"kv_start": self.encoder.kv_start[index], "kv_end": self.encoder.kv_end[index]}
            self.encoder = replace(self.encoder, **bounds)

    def reset(self) -> None:
        """Empties the cache and keeps its memory."""
        self.lengths = [0] * self.batch_size
        self.starts = None
        self.cross, self.encoder = {}, None

    @classmethod
    def from_layers(cls, config: GPT2Config, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> "KVCache":
        """A cache that begins with other tensors' tokens: for each layer (keys, values), each [B, H, T, D], copied.

        Of a transformers cache: KVCache.from_layers(config, [(layer.keys, layer.values) for layer in cache.layers]).
        """
        pairs = [tuple(layer) for layer in layers]
        H, D = config.n_head, config.head_dim
        shape = pairs[0][0].shape if pairs and len(pairs[0]) == 2 else ()
        if (
            len(pairs) != config.n_layer
            or len(shape) != 4
            or any(len(pair) != 2 or any(x.shape != (shape[0], H, shape[2], D) for x in pair) for pair in pairs)
        ):
            raise ValueError(
                f"KVCache: {len(pairs)} layers came; {config.n_layer} pairs of keys and values are required, each "
                f"[B, {H}, T, {D}] and all of one shape"
            )
        first = pairs[0][0]
        cache = cls(config, shape[0], capacity=shape[2] + 1, device=first.device, dtype=first.dtype)
        for held, pair in zip(cache.data, pairs):
            held[..., : shape[2], :].copy_(torch.stack(pair))
        cache.advance([shape[2]] * shape[0])
        return cache

    def select(self, rows: Sequence[int] | torch.Tensor) -> "KVCache":
        """A cache with memory of its own in which row b is this one's rows[b]."""
        copied = copy.copy(self)
        copied.reorder(rows)
        return copied

    def row(self, b: int) -> "KVCache":
        """A view of row b as a cache: shared memory until one of them grows, its own lengths."""
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__, data=self.data[:, :, b : b + 1], lengths=[self.lengths[b]])
        view.starts = None if self.starts is None else [self.starts[b]]
        view._select_encoder(slice(b, b + 1))
        view._forget_device()
        return view

    def _forget_device(self):
        """Drops the device copies, because the rows have changed."""
        self._per_row, self._places, self._bounds = {}, None, {}

    def _on_device(self, name):
        """The attribute `name`, a list with a number for each row, as int32 [B]."""
        if name not in self._per_row:
            self._per_row[name] = PerRow(self.batch_size, self.data.device)
        return self._per_row[name].of(getattr(self, name))

    def _store(self, layer, k, v):
        T = k.shape[2]
        if self.is_uniform:
            slots = slice(self.lengths[0], self.lengths[0] + T)
            self.data[layer, 0, :, :, slots].copy_(k)
            self.data[layer, 1, :, :, slots].copy_(v)
            return
        for held, new in zip(self.data[layer], (k, v)):
            store(held, new, self._places)

    def _attend_by_row(self, q, keys, values, counts, options):
        """Attention row by row, at each row's own length: bit-identical to the row alone (batch invariance).

        On a CPU a call costs microseconds; SDPA there divides the keys among threads by the number of rows.
        """
        B, H, T, D = q.shape
        o = q.new_zeros(B, T, H, D).transpose(1, 2)  # [B, H, T, D]
        for b, (held, count) in enumerate(zip(self.lengths, counts)):
            start = 0 if self.starts is None else self.starts[b]
            first = max(start - held, 0)  # the first new token that is no padding
            step = 1 if self.one_query_at_a_time else max(count - first, 1)
            for t in range(first, count, step):
                queries, seen = slice(t, t + step), slice(start, held + t + step)
                k, v = keys[b : b + 1, :, seen], values[b : b + 1, :, seen]
                o[b : b + 1, :, queries] = attention(q[b : b + 1, :, queries], k, v, **options)[0]
        return o
