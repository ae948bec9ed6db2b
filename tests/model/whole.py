"""Checkpoints that show whether they are whole: one number is in every weight, in the config and in the depth."""

import torch

from model import GPT2, GPT2Config


def marked(mark):
    """A tiny model whose every weight is `mark`, as is a key of its config."""
    config = GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=8,
        n_layer=1 + mark % 2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        extra={"mark": mark},
    )
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(mark)
    model.tie_weights()
    return model


def load_mark(directory, cls=GPT2):
    """The mark of the checkpoint that a directory holds. Fails where it is a mixture of two."""
    model = cls.from_pretrained(directory)
    config = model.config
    mark = config.extra["mark"] if isinstance(config, GPT2Config) else config.mark
    weights = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    assert weights == {mark}, f"the config is of {mark}, the weights of {weights}"
    assert config.n_layer == 1 + mark % 2
    return mark
