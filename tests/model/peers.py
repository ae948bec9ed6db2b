"""The same GPT-2 twice: ours and transformers', with the same random weights."""

import torch
from optional import transformers

from model import GPT2, GPT2Config

TINY = {
    "vocab_size": 101,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "eos_token_id": 0,
    "bos_token_id": 0,
}


def tiny_config(**fields):
    return GPT2Config(**{**TINY, **fields})


def their_config(config, **options):
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    return transformers.GPT2Config(**values, **options)


TALKATIVE = 0.2  # the spread at which a tiny model says different things rather than one word again and again


def spread(model, std=0.05):
    """Weights larger than GPT-2's initialisation, and biases that are not 0, so that every term shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=std if parameter.dim() > 1 else 0.2)
    return model


def pair(config=None, *, attn="eager", theirs="eager", cls=GPT2, their_cls=None, std=0.05):
    """(ours, theirs), both in eval mode, with equal weights."""
    config = tiny_config() if config is None else config
    ours = spread(cls(config, attn_implementation=attn), std).eval()
    their_cls = their_cls or transformers.GPT2LMHeadModel
    peer = their_cls(their_config(config, attn_implementation=theirs)).eval()
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def padded_batch(vocab_size, lengths, T, *, side="right"):
    """Random ids [B, T] and the mask [B, T] of rows of the given lengths, padded on one side."""
    ids = torch.randint(0, vocab_size, (len(lengths), T))
    column = torch.arange(T)
    lengths = torch.tensor(lengths)[:, None]
    mask = (column < lengths if side == "right" else column >= T - lengths).long()
    return ids, mask
