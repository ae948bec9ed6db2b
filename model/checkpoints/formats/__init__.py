"""Checkpoints of other projects, read and written: `python -m model.convert`.

Each module has is_one(path), read(path) -> Weights, and write(model) -> (the name of the large file, a function that
writes it to a file, what there is to say[, {name: content} of the small ones]).
"""

from typing import NamedTuple

import torch

from model.config import GPT2Config
from model.gpt2 import GPT2


class Weights(NamedTuple):
    """A checkpoint in our names: config's fields, {name: tensor} without the tied head, and what there is to say."""

    config: dict
    tensors: dict
    notes: list


def build(weights, where):
    """A GPT2 in eval mode with these weights. Raises ValueError, with the tensor, where they do not fit the config."""
    config = GPT2Config.from_dict(weights.config)
    with torch.device("meta"):
        model = GPT2(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, shape in expected.items():
        if name not in weights.tensors:
            raise ValueError(f"{where}: {name} is missing; the config asks for it")
        if weights.tensors[name].shape != shape:
            came = tuple(weights.tensors[name].shape)
            raise ValueError(f"{where}: {name} is {came}; with its config it must be {tuple(shape)}")
    unknown = weights.tensors.keys() - expected.keys()
    if unknown:
        raise ValueError(f"{where}: {min(unknown)} is no tensor of a GPT-2 of {config.n_layer} layers")
    tensors = {**weights.tensors, "lm_head.weight": weights.tensors["transformer.wte.weight"]}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


def own_vocabulary(embedding, V):
    """The first V rows of a padded embedding, as a tensor of its own."""
    return embedding if len(embedding) == V else embedding[:V].clone()
