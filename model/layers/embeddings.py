"""The token embeddings of a model and the head that may be tied to them: how to reach, replace and resize both."""

from typing import Any

import torch
from torch import nn

from model.config import GPT2Config, brief

MEAN_SPREAD = 1e-9  # variance of new rows, as a share of the old rows'; Hewitt 2021, "Initializing New Word Embeddings"
_ROWS_AT_ONCE = 64


class TokenEmbeddings:
    """Methods of a model that has wte itself or in `transformer`, and perhaps lm_head. A tied head stays tied."""

    config: GPT2Config

    def get_input_embeddings(self) -> nn.Module:
        model: Any = getattr(self, "transformer", self)
        return model.wte

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head, or None."""
        return getattr(self, "lm_head", None)

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        """Takes an nn.Embedding [vocab_size, n_embd] for wte; config.vocab_size becomes its number of rows."""
        C = self.config.n_embd
        if not isinstance(embedding, nn.Embedding) or embedding.embedding_dim != C:
            raise ValueError(
                f"{type(self).__name__}.set_input_embeddings: {embedding!r} came; "
                f"an nn.Embedding of {C} columns is required"
            )
        is_tied = self._head_is_tied()
        model: Any = getattr(self, "transformer", self)
        model.wte = embedding
        self.config.vocab_size = embedding.num_embeddings
        if is_tied:
            self.lm_head.weight = embedding.weight

    def set_output_embeddings(self, head: nn.Module) -> None:
        """Takes a head of the language model: a module with a weight [vocab_size, n_embd]."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"{type(self).__name__}.set_output_embeddings: this model has no language-modelling head")
        self.lm_head = head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Gives wte, and the head, so many rows, and config.vocab_size with them; returns wte.

        pad_to_multiple_of rounds the number up. New rows stand at the end: around the mean of the old ones, or, with
        mean_resizing=False, as at initialisation. With neither number nothing changes. Optimizers hold the old weights.
        """
        where = f"{type(self).__name__}.resize_token_embeddings"
        embedding: Any = self.get_input_embeddings()
        head: Any = self.get_output_embeddings()
        rows = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of)):
            if name == "pad_to_multiple_of" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(f"{where}: {name} is {brief(value)}; it must be a positive integer below 2**31")
        rows = -(-rows // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        if rows == embedding.num_embeddings:
            return embedding
        std = None if mean_resizing else self.config.initializer_range
        is_tied = self._head_is_tied()
        embedding.weight = _resized(embedding.weight, rows, std)
        embedding.num_embeddings = rows
        if head is not None:
            head.weight = embedding.weight if is_tied else _resized(head.weight, rows, std)
        self.config.vocab_size = rows
        self.config.warn_of_special_tokens(stacklevel=3)
        return embedding

    def _head_is_tied(self):
        head = self.get_output_embeddings()
        return head is not None and head.weight is self.get_input_embeddings().weight


@torch.inference_mode(False)  # a weight made in that mode could never be trained
@torch.no_grad()
def _resized(weight, rows, std):
    """A parameter [rows, C] that begins as weight [V, C] does; std None draws new rows around the old ones' mean."""
    V, C = weight.shape
    new = weight.new_empty(rows, C)
    new[:V] = weight[:rows]
    if rows > V and std is not None:
        new[V:].normal_(0.0, std)
    elif rows > V:
        mean = weight.float().mean(0)  # [C]
        centred = weight.float() - mean  # [V, C]; sums of its rows with random factors have the old rows' covariance
        for added in new[V:].split(_ROWS_AT_ONCE):
            factors = torch.randn(len(added), V, dtype=torch.float32, device=weight.device) * (MEAN_SPREAD / V) ** 0.5
            added.copy_(mean + factors @ centred)
    return nn.Parameter(new, requires_grad=weight.requires_grad)
