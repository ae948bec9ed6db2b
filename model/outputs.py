"""What the models return: dataclasses that can also be read by key and, as tuples, by position.

As in Hugging Face's ModelOutput, fields that are None do not exist for keys and positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch.utils import _pytree as pytree

from model.cache import KVCache


class ModelOutput(Mapping):
    """Base of the outputs: `out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `out.to_tuple()`."""

    def __init_subclass__(cls):
        """torch.export, DistributedDataParallel and others find the tensors in an output by its pytree."""
        super().__init_subclass__()
        name = f"{cls.__module__}.{cls.__qualname__}"
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values))),
            serialized_type_name=name,
            flatten_with_keys_fn=lambda output: ([(pytree.GetAttrKey(k), v) for k, v in output.items()], list(output)),
        )

    def __getitem__(self, key):
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = getattr(self, key, None) if key in (f.name for f in fields(self)) else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self):
        return (f.name for f in fields(self) if getattr(self, f.name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def to_tuple(self) -> tuple:
        return tuple(self.values())


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """last_hidden_state [B, T, C]; hidden_states: n_layer + 1 of [B, T, C]; attentions: n_layer of [B, H, T, T_k].

    cross_attentions: n_layer of [B, H, T, S], over an encoder's S states.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class CausalLMOutput(ModelOutput):
    """loss, a scalar; logits [B, T, V]; the rest as in BaseModelOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class SequenceClassifierOutput(CausalLMOutput):
    """As CausalLMOutput, with logits [B, K]."""


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """loss, a scalar; logits [B, T, K]; the rest as in BaseModelOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringOutput(ModelOutput):
    """loss, a scalar; start_logits and end_logits [B, T]; the rest as in BaseModelOutput."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class DoubleHeadsOutput(ModelOutput):
    """loss and mc_loss, scalars; logits [B, N, T, V]; mc_logits [B, N]; the rest as in BaseModelOutput, B * N rows."""

    loss: torch.Tensor | None = None
    mc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mc_logits: torch.Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class GenerateOutput(ModelOutput):
    """sequences [R, L]; sequences_scores [R] of beams; of each step: scores [R, V], as processed, and logits [R, V].

    With N beams, R is B * N for what is of a step, and scores are log-probabilities of the next token alone.
    attentions and hidden_states: of each forward pass a tuple, as BaseModelOutput has it: T tokens at first, then one
    at a time. Prompts of several lengths T are there padded on the right.
    forward_passes: how often the model ran, prefill included.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    past_key_values: KVCache | None = None
    forward_passes: int | None = None


# What transformers calls the same.
BaseModelOutputWithPastAndCrossAttentions = BaseModelOutput
CausalLMOutputWithCrossAttentions = CausalLMOutput
GPT2DoubleHeadsModelOutput = DoubleHeadsOutput
QuestionAnsweringModelOutput = QuestionAnsweringOutput
SequenceClassifierOutputWithPast = SequenceClassifierOutput
