"""Validation of forward's arguments; padding from attention_mask."""

from dataclasses import dataclass

import torch

from model.cache import KVCache


@dataclass(frozen=True)
class Padding:
    """The valid tokens of each row: [kv_start, kv_end) without a cache; the first `counts` new ones with it.

    kv_start, kv_end: [B] int32, or None where nothing is padded. counts: a list; what a cache holds it knows itself.
    """

    kv_start: torch.Tensor | None = None
    kv_end: torch.Tensor | None = None
    counts: list | None = None


def padding_bounds(attention_mask, B, T):
    """A mask [B, T] of ones and zeros as bounds: the ones of row b are [kv_start[b], kv_end[b]), int32.

    (None, None) where there is no padding. Raises ValueError for another shape and for a mask with holes.
    """
    if attention_mask is None:
        return None, None
    if tuple(attention_mask.shape) != (B, T):
        raise ValueError(f"attention_mask: its shape is {tuple(attention_mask.shape)}; it must be [B, T] = {(B, T)}")
    valid = attention_mask.bool()
    if valid.all():
        return None, None
    count = valid.sum(-1, dtype=torch.int32)
    start = valid.int().argmax(-1).int()  # the first 1; 0 where there is none
    is_one_run = (valid.cumsum(-1, dtype=torch.int32).argmax(-1) + 1 == start + count) | (count == 0)
    if not is_one_run.all():
        row = int(is_one_run.logical_not().int().argmax())
        raise ValueError(f"attention_mask: row {row} has a hole; the ones of each row must be one run")
    return start, start + count


def new_tokens(attention_mask, B, T, cache):
    """The number of valid tokens among T new ones, per row, as a list; left padding is stored in the cache.

    The cache remembers what it holds, so of a mask [B, past + T] only the last T columns are read.
    """
    if attention_mask is None:
        return [T] * B
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: its shape is {tuple(attention_mask.shape)}; with past_key_values it must be "
            f"[B, T] = {(B, T)} or wider"
        )
    start, end = padding_bounds(attention_mask[:, -T:], B, T)
    if start is None:
        return [T] * B
    starts = start.tolist()
    if any(starts):
        if cache.get_seq_length():
            raise ValueError(
                "attention_mask: padding before new tokens; a cache that holds tokens takes it only after them"
            )
        cache.starts = starts
    return end.tolist()


def as_cache(past, config):
    """A KVCache, or what serves as one; keys and values in tuples become one. Raises TypeError for anything else."""
    if past is None or hasattr(past, "attend"):
        return past
    if isinstance(past, tuple | list):
        return KVCache.from_layers(config, past)
    if isinstance(past, torch.Tensor):
        raise TypeError(
            "GPT2: past_key_values is a tensor; it is forward's second argument, as in transformers: pass a mask by "
            "its name, attention_mask="
        )
    raise TypeError(
        f"GPT2: past_key_values is a {type(past).__name__}; a KVCache, as the model returns it, or a tuple of (keys, "
        "values) for each layer is required. Leave it out to begin with an empty one; KVCache.from_layers(config, "
        "[(layer.keys, layer.values) for layer in past.layers]) takes over what a transformers cache holds"
    )


def check_range(name, index, limit, ignored=None):
    """On a CPU, where numpy looks at them without an operation of torch; a GPU would be synchronised, and asserts."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or type(index) is not torch.Tensor:
        return
    values = index.numpy(force=True)
    if ignored is not None:
        values = values[values != ignored]
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(f"GPT2: {name} range from {low} to {high}; they must be at least 0 and below {limit}")


def check_shape(name, tensor, *allowed):
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"GPT2: {name} has shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, allowed))}")


def lookup(embedding, ids, name, limit):
    """embedding(ids); on a CPU, where torch checks anyway, an id out of range raises ValueError."""
    try:
        return embedding(ids)
    except IndexError as error:
        low, high = ids.min().item(), ids.max().item()
        raise ValueError(
            f"GPT2: {name} range from {low} to {high}; they must be at least 0 and below {limit} = "
            f"{embedding.num_embeddings}"
        ) from error
