"""What generate() continues, row by row and without padding: ids, or embeddings, and what a cache already holds."""

from dataclasses import dataclass

import numpy as np
import torch

from model.cache import KVCache
from model.config import brief
from model.generation.settings import token_ids
from model.inputs import as_cache, check_inputs, check_shape, padding_bounds


@dataclass(eq=False)
class Prompts:
    """The rows of one call of generate().

    ids: what each row says so far, [L] each, perhaps empty beside embeddings. width: the column at which new tokens
    start. inputs: what the first forward pass reads of each row, ids [T] or embeddings [T, C]. positions: of those,
    [T] each, or None. past: a cache that holds what comes before them, or None.
    """

    ids: list
    width: int
    inputs: list
    positions: list | None = None
    past: KVCache | None = None

    @classmethod
    def read(cls, model, input_ids, attention_mask, inputs_embeds, position_ids, past_key_values, *, bos, pad):
        """From generate()'s arguments. pad: the id that is padding where no mask came, or None.

        Raises TypeError or ValueError where they do not fit each other.
        """
        if isinstance(attention_mask, int):
            raise TypeError(
                f"generate: attention_mask is {attention_mask}; it must be a tensor. How many tokens to say is "
                "max_new_tokens"
            )
        if inputs_embeds is None:
            if input_ids is None:
                if bos is None:
                    raise ValueError("generate: no input_ids, and the config has no bos_token_id to start from")
                input_ids = [[bos]]
            if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and attention_mask is None:
                attention_mask = None if pad is None else _between_pads(input_ids, pad)
            ids, width = _id_rows(model, input_ids, attention_mask)
            if not ids or not all(map(len, ids)):
                raise ValueError("generate: a prompt is empty; each needs at least one token")
            inputs, shape = ids, (len(ids), width)
        else:
            inputs = _embedding_rows(model, inputs_embeds, attention_mask)
            shape = inputs_embeds.shape[:2]
            ids, width = [torch.empty(0, dtype=torch.long, device=model.device)] * len(inputs), 0
            if input_ids is not None:
                ids, width = _id_rows(model, input_ids, None)
                if len(ids) != len(inputs):
                    raise ValueError(f"generate: input_ids has {len(ids)} rows and inputs_embeds {len(inputs)}")
        positions = None if position_ids is None else _position_rows(model, position_ids, attention_mask, inputs, shape)
        past = as_cache(past_key_values, model.config)
        if past is not None:
            held = _held(model, past, inputs)
            inputs = [row[n:] for row, n in zip(inputs, held)]
            positions = positions and [row[n:] for row, n in zip(positions, held)]
        return cls(ids, width, inputs, positions, past)

    def used(self):
        """How many positions each row occupies before its first new token."""
        held = [0] * len(self.inputs) if self.past is None else self.past.lengths
        return [n + len(row) for n, row in zip(held, self.inputs)]

    def check_positions(self, budgets, n_positions):
        """Raises ValueError where position_ids, or those of the new tokens after them, leave the table."""
        for row, budget in zip(self.positions or (), budgets):
            low, high = int(row.min()), int(row.max())
            last = max(high, int(row[-1]) + budget - 1)  # the last token is not fed back
            if low < 0 or last >= n_positions:
                raise ValueError(
                    f"generate: position_ids range from {low} to {high}, to {last} with the new tokens; they must be "
                    f"at least 0 and below {n_positions}"
                )


def _id_rows(model, input_ids, attention_mask):
    """(ids [L] of each row, without padding; how wide they came, padding included)."""
    if isinstance(input_ids, torch.Tensor):
        check_inputs("generate", model.device, input_ids=input_ids, attention_mask=attention_mask)
        if input_ids.dim() != 2:
            raise ValueError(f"generate: input_ids must be [B, T]; its shape is {tuple(input_ids.shape)}")
        return _without_padding(input_ids.to(model.device), attention_mask), input_ids.shape[1]
    if attention_mask is not None:
        raise ValueError("generate: attention_mask goes with a tensor; a list of prompts has no padding")
    if isinstance(input_ids, np.ndarray):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, list | tuple) or isinstance(next(iter(input_ids), []), int | float | str):
        raise TypeError(
            f"generate: input_ids is {brief(input_ids)}; it must be a tensor [B, T], or a list of lists of ids"
        )
    rows = [torch.tensor(_prompt(row), dtype=torch.long, device=model.device) for row in input_ids]
    return rows, max(map(len, rows), default=0)


def _embedding_rows(model, embeds, attention_mask):
    """Embeddings [L, C] of each row, without padding."""
    check_inputs("generate", model.device, inputs_embeds=embeds, attention_mask=attention_mask)
    if embeds.dim() != 3 or embeds.shape[2] != model.config.n_embd:
        raise ValueError(
            f"generate: inputs_embeds must be [B, T, n_embd = {model.config.n_embd}]; its shape is "
            f"{tuple(embeds.shape)}"
        )
    rows = _without_padding(embeds.to(model.device), attention_mask)
    if not rows or not all(map(len, rows)):
        raise ValueError("generate: a row of inputs_embeds is empty; each needs at least one token")
    return rows


def _position_rows(model, position_ids, attention_mask, inputs, shape):
    """Positions [L] of each row's tokens."""
    check_inputs("generate", model.device, position_ids=position_ids)
    if any(len(row) != shape[1] for row in inputs) and attention_mask is None:
        raise ValueError("generate: position_ids goes with a tensor of ids or embeddings, of which it has the columns")
    check_shape("position_ids", position_ids, tuple(shape), (1, shape[1]))
    return _without_padding(position_ids.to(model.device).expand(*shape), attention_mask)


def _held(model, past, inputs):
    """How many tokens of each row the cache holds. Raises ValueError where rows do not go on from there."""
    if not isinstance(past, KVCache):
        raise TypeError(f"generate: past_key_values is a {type(past).__name__}; it must be a KVCache")
    if past.batch_size != len(inputs):
        raise ValueError(f"generate: past_key_values holds {past.batch_size} rows; the input has {len(inputs)}")
    if past.data.device != model.device or past.data.dtype != model.dtype:
        raise ValueError(
            f"generate: past_key_values is {past.data.dtype} on {past.data.device}; the model is {model.dtype} on "
            f"{model.device}"
        )
    for row, (text, held) in enumerate(zip(inputs, past.tokens)):
        if held >= len(text):
            raise ValueError(
                f"generate: row {row} has {len(text)} tokens and past_key_values holds {held} of them; give the whole "
                "text, with at least one token that is not in the cache"
            )
    return past.tokens


def _without_padding(rows, attention_mask):
    """The rows of a tensor [B, T, ...], each cut to what its mask [B, T] leaves."""
    start, end = padding_bounds(attention_mask, *rows.shape[:2])
    if start is None:
        return list(rows)
    return [row[a:b] for row, a, b in zip(rows, start.tolist(), end.tolist())]


def _prompt(row):
    """A prompt's ids, in a list, tuple, array or tensor, as a list."""
    ids = row.tolist() if hasattr(row, "tolist") else row
    if isinstance(ids, list | tuple) and any(isinstance(i, float | bool) for i in ids):
        raise TypeError(f"generate: input_ids holds {brief(ids)}; ids are integers")
    return token_ids("input_ids", ids)


def _between_pads(ids, pad):
    """The mask of ids [B, T] whose padding is what stands at either end; within a text `pad` is a token."""
    is_text = ids != pad
    return (is_text.cumsum(1) > 0) & (is_text.flip(1).cumsum(1).flip(1) > 0)
