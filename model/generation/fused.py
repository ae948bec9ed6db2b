"""The decode step by kernels of its own (kernels/decode) in place of the model's forward pass."""

import torch

from kernels.attention import MAX_HEAD_DIM
from kernels.checks import FLOATS
from kernels.decode import (
    MAX_ROWS,
    DecodeBuffers,
    GridBuffers,
    Weights,
    choose,
    decode_step,
    fingerprints,
    persistent_step,
)
from model.attention import get_attention
from model.layers.linear import Head
from model.layers.norm import LayerNorm
from model.layers.observed import is_plain
from model.layers.ops import TANH_GELU, use_triton

MAX_TEXTS = 16  # that the kernels serve, one new token of each
MOST_UNASKED = 4  # texts: with more, the matrix units of the forward pass's kernels win
MAX_DRAFTS = MAX_ROWS - 1  # tokens verified beside the last one of a text


def refusal(model, B, limit=MOST_UNASKED, drafts=0):
    """Why these kernels cannot take a decode step of this model, in words, or None if they can.

    Of B texts, at most `limit`; drafts: tokens of each that are verified in the step.
    """
    transformer, config = model.transformer, model.config
    weight = transformer.wte.weight
    request = {"device": model.device, "dtype": model.dtype, "head_dim": config.head_dim}
    backend = get_attention(transformer.attn_implementation, **request).name
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for holds, reason in (
        (limit < B, f"there are {B} rows; at most {limit} are served"),
        (drafts > MAX_DRAFTS, f"there are {drafts} drafts; at most {MAX_DRAFTS} are verified at once"),
        (backend != "triton", f"attention backend {backend!r} was chosen"),
        (not use_triton(transformer.kernel_implementation, weight), "PyTorch's operations were chosen"),
        (config.activation_function not in TANH_GELU, f"the activation function is {config.activation_function!r}"),
        (config.add_cross_attention, "there is cross-attention"),
        (config.reorder_and_upcast_attn, "reorder_and_upcast_attn is set"),
        (config.head_dim > MAX_HEAD_DIM, f"the head dim is {config.head_dim}; at most {MAX_HEAD_DIM} are served"),
        (
            dtypes != {model.dtype} or model.dtype not in FLOATS,
            f"the weights are {', '.join(sorted(map(str, dtypes)))}",
        ),
        (not all(map(_is_plain, _parts(model))), "a layer was replaced, or something observes it"),
    ):
        if holds:
            return reason
    return None


def _parts(model):
    """(module, the class that it must be), for all whose place the kernels take."""
    transformer = model.transformer
    yield transformer.wte, torch.nn.Embedding
    yield transformer.wpe, torch.nn.Embedding
    yield transformer.ln_f, LayerNorm
    yield model.lm_head, Head
    for block in transformer.h:
        yield from block.parts() if hasattr(block, "parts") else [(block, None)]


def _is_plain(part):
    return is_plain(*part)


def matrices(block):
    """The four linear layers of a block: qkv, out, fc, proj."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


class PackedModel:
    """A model's weights as kernels/decode reads them, packed once for all steps that are captured of it.

    weights: "model" or "int8"; the head is packed in int8 alone, for the model's own has the form that is read.
    """

    def __init__(self, model, weights="model"):
        self.model, config = model, model.config
        self.sources, self.addresses = tensors(model), addresses(tensors(model))
        self.weights = Weights(config.n_layer, config.n_embd, config.inner_dim, model.lm_head.weight.detach(), weights)
        self.fingerprint = None
        self.refresh()

    def is_of(self, model):
        """Whether the model's tensors lie where those did that were packed, whatever has become of their values."""
        return self.addresses == addresses(tensors(model))

    @torch.no_grad()
    def refresh(self):
        """Packs what has changed in place, at the same addresses.

        In the model's dtype that is a copy, which costs no more than to ask whether it is needed. Integers are made
        anew where a fingerprint of all bits is another one: torch's counters would miss what goes through .data.
        """
        if self.weights.head.scale is not None and all(tensor.is_contiguous() for tensor in self.sources):
            fingerprint = fingerprints(self.sources)
            if fingerprint == self.fingerprint:
                return
            self.fingerprint = fingerprint
        transformer = self.model.transformer
        layers = []
        for block in transformer.h:
            pairs = [(linear.out_in(), linear.bias) for linear in matrices(block)]
            layers.append((_pair(block.ln_1), *pairs[:2], _pair(block.ln_2), *pairs[2:]))
        self.weights.write(layers, _pair(transformer.ln_f), self.model.lm_head.weight)


def addresses(tensors):
    """Address, dtype, shape and strides of each, which a captured graph relies on."""
    return tuple((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in tensors)


def tensors(model):
    """All parameters that are packed."""
    transformer = model.transformer
    return [*transformer.h.parameters(), *transformer.ln_f.parameters(), model.lm_head.weight]


def _pair(norm):
    return norm.weight, norm.bias


class FusedStep:
    """A step by kernels/decode: buffers for T tokens of B texts, beside a PackedModel.

    persistent: one launch for one new token of each text. weights: of a PackedModel of its own, where none is given.
    """

    def __init__(self, model, B, capacity, T=1, weights="model", packed=None, persistent=False):
        self.model, config = model, model.config
        self.packed = packed or PackedModel(model, weights)
        self.layers = self.packed.weights.layers
        self.scales = [block.attn.scale for block in model.transformer.h]
        sizes = B * T, config.n_embd, config.n_head, config.inner_dim, capacity
        self.buffers = DecodeBuffers.make(*sizes, model.dtype, model.device)
        self.grid = None
        if persistent:
            self.grid = GridBuffers.make(B, config.vocab_size, capacity, self.buffers, self.scales, config.head_dim)

    def run(self, ids, lengths, cache, logits, counts=None):
        """Writes logits [B T, V] fp32 after ids [B, T], of which counts [B] int32 are some; lengths [B] int32 stay."""
        weights, config = self.packed.weights, self.model.config
        decode_step(
            ids,
            lengths,
            cache,
            self.layers,
            self._embeddings(),
            weights.final_norm,
            weights.head,
            logits,
            self.buffers,
            config.n_head,
            self.scales,
            config.layer_norm_epsilon,
            counts,
        )

    def say(self, ids, lengths, cache, logits, said):
        """One new token of each text: logits [B, V], and the next ids into ids [B, 1] and said [B, capacity]; lengths
        advance. See kernels/decode/choose.py."""
        if self.grid is None:
            self.run(ids, lengths, cache, logits)
            choose(logits, ids, lengths, said)
            return
        weights, eps = self.packed.weights, self.model.config.layer_norm_epsilon
        outputs = logits, self.buffers, self.grid
        persistent_step(ids, lengths, said, cache, weights, self._embeddings(), *outputs, eps)

    def _embeddings(self):
        transformer = self.model.transformer
        return transformer.wte.weight, transformer.wpe.weight
