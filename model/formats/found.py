"""What each reader gives: a config, tensors under Hugging Face's names, and what became of what the files held."""

from dataclasses import dataclass, field

import torch

from model.checkpoints.pretrained import load_weights
from model.config import GPT2Config
from model.gpt2 import GPT2

END_OF_TEXT = 50256

# The tensors of a block under Hugging Face's names; those of a linear layer with the order of their axes there.
BLOCK = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)


@dataclass
class Found:
    """config; tensors {name: tensor}, mapped from the file where that can be; notes: what a user should know, in words.

    renamed: {name: its name in the file}. dropped: names in the file that no tensor here came from.
    """

    config: GPT2Config
    tensors: dict
    renamed: dict = field(default_factory=dict)
    dropped: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def model(self):
        """A GPT2 in eval mode with these tensors as its parameters, not copied.

        Raises ValueError where one is missing, of another shape, or one too many.
        """
        with torch.device("meta"):
            model = GPT2(self.config)
        load_weights(model, self.tensors)
        return model.eval()


def config_of(**fields):
    """A GPT2Config, whose special tokens are GPT-2's where the vocabulary holds them, and else None."""
    if fields["vocab_size"] <= END_OF_TEXT:
        fields.update(bos_token_id=None, eos_token_id=None)
    return GPT2Config(**fields)


def is_linear(name):
    """Whether it is the weight of a linear layer of a block, [in, out] here and [out, in] in most other places."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def names(config):
    """The names of a model's tensors, in the order of a forward pass; the head's, if it has one of its own, last."""
    blocks = [f"transformer.h.{layer}.{name}" for layer in range(config.n_layer) for name in BLOCK]
    head = [] if config.tie_word_embeddings else ["lm_head.weight"]
    return [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *blocks,
        *[f"transformer.ln_f.{x}" for x in _NORM],
        *head,
    ]


_NORM = ("weight", "bias")


def check_plain(config, what, activations):
    """Raises ValueError where another project's GPT-2, called `what`, would compute something else from the weights."""
    plain = {
        "n_inner": config.inner_dim == 4 * config.n_embd,
        "layer_norm_epsilon": config.layer_norm_epsilon == 1e-5,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": not config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        "activation_function": config.activation_function in activations,
    }
    for name, fulfilled in plain.items():
        if not fulfilled:
            raise ValueError(f"convert: {name} is {getattr(config, name)!r}, which {what} cannot say; not written")


def cut_vocabulary(found, vocab_size):
    """Leaves the first `vocab_size` rows of the embedding and the head, whose others are padding."""
    if vocab_size > found.config.vocab_size:
        raise ValueError(
            f"convert: --vocab-size is {vocab_size}; the checkpoint has {found.config.vocab_size} rows, of which only "
            "padding can be cut"
        )
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in found.tensors:
            found.tensors[name] = found.tensors[name][:vocab_size]
    found.config.vocab_size = vocab_size
    found.config.warn_of_special_tokens()
