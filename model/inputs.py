"""Validation of forward's arguments; padding from attention_mask."""

from dataclasses import dataclass

import torch

from kernels.checks import check_flag, check_tensor
from model.cache import KVCache

_IDS = (torch.int64, torch.int32)
_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The dtypes of forward's tensors, by argument; what is not here is a switch, True or False.
_DTYPES = {
    "input_ids": _IDS,
    "position_ids": _IDS,
    "token_type_ids": _IDS,
    "mc_token_ids": _IDS,
    "inputs_embeds": _FLOATS,
    "encoder_hidden_states": _FLOATS,
    "encoder_attention_mask": _NUMBERS + _FLOATS,
    "attention_mask": _NUMBERS + _FLOATS,
    "labels": (torch.int64,),
    "mc_labels": _IDS,
    "start_positions": _IDS,
    "end_positions": _IDS,
}
LABELS = {"labels": (*_DTYPES["mc_labels"], *_FLOATS)}  # of texts: a class, or numbers


def check_inputs(function, device, dtypes=_DTYPES, **arguments):
    """The kinds of forward's arguments, for a model on `device`: None, or a tensor of the right dtype, or a switch."""
    for name, value in arguments.items():
        if value is None:
            continue
        allowed = dtypes.get(name)
        if allowed is None:
            check_flag(function, value, name)
            continue
        check_tensor(function, value, name)
        if value.dtype not in allowed:
            words = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{function}: {name} is {value.dtype}; its dtype must be {words}")
        if value.is_meta and device.type != "meta":
            raise ValueError(f"{function}: {name} is on meta, without values; the model is on {device}")


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

    (None, None) where there is no padding. Raises ValueError for another shape, a mask with holes, and one to be added
    to scores, whose padding is a large negative number; while values cannot be read, traced or on "meta", there are
    always bounds, and neither is noticed.
    """
    if attention_mask is None:
        return None, None
    if tuple(attention_mask.shape) != (B, T):
        raise ValueError(f"attention_mask: its shape is {tuple(attention_mask.shape)}; it must be [B, T] = {(B, T)}")
    valid = attention_mask.bool()
    if can_be_read(valid):
        lowest = attention_mask.amin() if attention_mask.numel() else 1
        if lowest > 0:
            return None, None
        if not lowest >= 0 or (attention_mask.is_floating_point() and not valid.any()):
            raise ValueError(
                f"attention_mask: its least value is {float(lowest):.4g}, as in a mask that is added to scores; "
                "it must be 1 for tokens and 0 for padding: (mask >= 0).long() makes one of the other"
            )
    count = valid.sum(-1, dtype=torch.int32)
    start = valid.int().argmax(-1).int()  # the first 1; 0 where there is none
    if not can_be_read(valid):
        return start, start + count
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


def can_be_read(tensor):
    """Whether Python can branch on a tensor's values: not where torch.compile or torch.export traces, nor on "meta"."""
    return not (tensor.is_meta or torch.compiler.is_compiling())


def as_cache(past, config):
    """A KVCache, or what serves as one; keys and values in tuples become one. Raises TypeError for anything else."""
    if past is None or hasattr(past, "attend"):
        return past
    if isinstance(past, tuple | list):
        if not all(isinstance(layer, tuple | list) and len(layer) >= 2 for layer in past):
            raise TypeError(
                "GPT2: past_key_values is a sequence whose items must be (keys, values), one for each layer"
            )
        return KVCache.from_layers(config, past)
    if isinstance(past, torch.Tensor):
        raise TypeError(
            "GPT2: past_key_values is a tensor; it is forward's second argument, as in transformers: pass a mask or "
            "labels by name, attention_mask= or labels="
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
        hint = "" if ignored is None or low >= 0 else f", or {ignored} where they are to be ignored"
        raise ValueError(f"GPT2: {name} range from {low} to {high}; they must be at least 0 and below {limit}{hint}")


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
