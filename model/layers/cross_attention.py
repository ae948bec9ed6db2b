"""Cross-attention: the tokens' queries over the keys and values of an encoder's states, not causal."""

from dataclasses import dataclass

import torch
from torch import nn

from kernels.library import is_autocast_on
from model.attention import attention
from model.inputs import check_shape, padding_bounds
from model.layers.linear import Conv1D


@dataclass(frozen=True)
class Encoder:
    """states [B, S, C], or None where a cache holds what was made of them; kv_start, kv_end: as in Padding."""

    states: torch.Tensor | None
    kv_start: torch.Tensor | None = None
    kv_end: torch.Tensor | None = None


def encoder_of(config, states, mask, B, cache, dtype):
    """The Encoder of a forward pass, or None where there is none. Raises TypeError or ValueError for what does not fit.

    dtype: the model's, which the states have, too, but under autocast.
    A cache that has seen an encoder's states goes on with those; states that come again must be of the same shape.
    """
    held = getattr(cache, "encoder", None)
    if states is None and mask is not None:
        raise ValueError("GPT2Model: encoder_attention_mask came without encoder_hidden_states")
    if states is None:
        return held
    if not config.add_cross_attention:
        raise ValueError("GPT2Model: encoder_hidden_states came, but config.add_cross_attention is False")
    S = states.shape[1] if states.dim() == 3 else 1
    check_shape("encoder_hidden_states", states, (B, S, config.n_embd))
    if states.dtype != dtype and not is_autocast_on(states.device.type):
        raise TypeError(f"GPT2Model: encoder_hidden_states is {states.dtype}; the model is {dtype}: .to(model.dtype)")
    if S == 0:
        raise ValueError("GPT2Model: encoder_hidden_states has no token; at least one is required")
    if held is not None:
        seen = cache.cross[0][0].shape[2]
        if seen != S:
            raise ValueError(f"GPT2Model: encoder_hidden_states has {S} tokens; past_key_values has seen {seen}")
        return held
    return Encoder(states, *padding_bounds(mask, B, S))


class CrossAttention(nn.Module):
    """x [B, T, C] to (y [B, T, C], weights [B, H, T, S] or None), by one of the registry's backends."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.n_head
        self.scale = config.attention_scale(layer_idx)
        self.upcast = config.reorder_and_upcast_attn
        self.q_attn = Conv1D(config.n_embd, config.n_embd)
        self.c_attn = Conv1D(config.n_embd, 2 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)  # its p is the backend's
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, *, encoder, backend, cache, output_attentions):
        q = self._heads(self.q_attn(x))  # [B, H, T, D]
        k, v = self._keys_and_values(encoder, cache)  # each [B, H, S, D]
        o, weights = attention(
            q,
            k,
            v,
            backend=backend,
            scale=self.scale,
            causal=False,
            kv_start=encoder.kv_start,
            kv_end=encoder.kv_end,
            dropout_p=self.attn_dropout.p if self.attn_dropout.training else 0.0,
            upcast=self.upcast,
            return_weights=output_attentions,
        )
        y = self.c_proj(o.transpose(1, 2).flatten(2))  # [B, T, C]
        return self.resid_dropout(y), weights

    def _keys_and_values(self, encoder, cache):
        if cache is not None and self.layer_idx in cache.cross:
            return cache.cross[self.layer_idx]
        k, v = (self._heads(part) for part in self.c_attn(encoder.states).chunk(2, -1))
        if cache is not None:
            cache.cross[self.layer_idx] = k, v
        return k, v

    def _heads(self, x):
        """[B, T, C] as [B, H, T, D], a view."""
        return x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads)).transpose(1, 2)
