"""The decode step by kernels of its own (kernels/decode) in place of the model's forward pass."""

import torch

from kernels.attention import MAX_HEAD_DIM
from kernels.checks import FLOATS
from kernels.decode import MAX_ROWS, DecodeBuffers, Packed, decode_step, pack
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


class FusedStep:
    """What kernels/decode takes of a model: its weights, the matrices packed, and buffers for T tokens of B texts.

    weights: "model" or "int8"; the head is packed in int8 alone, for the model's own has the form that is read.
    """

    def __init__(self, model, B, capacity, T=1, weights="model"):
        self.model, config = model, model.config
        transformer = model.transformer
        self.sources = [matrix for block in transformer.h for matrix in matrices(block)]
        self.packed = [pack(matrix.out_in(), weights) for matrix in self.sources]
        self.head = Packed(model.lm_head.weight)
        if weights == "int8":
            self.head = pack(model.lm_head.weight, weights)
            self.sources.append(model.lm_head)
            self.packed.append(self.head)
        self.layers = []
        for i, block in enumerate(transformer.h):
            pairs = [(self.packed[4 * i + j], linear.bias) for j, linear in enumerate(matrices(block))]
            ln_1, ln_2 = ((norm.weight, norm.bias) for norm in (block.ln_1, block.ln_2))
            self.layers.append((ln_1, *pairs[:2], ln_2, *pairs[2:]))
        self.scales = [block.attn.scale for block in transformer.h]
        sizes = B * T, config.n_embd, config.n_head, config.inner_dim, capacity
        self.buffers = DecodeBuffers.make(*sizes, model.dtype, model.device)

    def refresh(self):
        """Packs the matrices anew, at the same addresses: the model's may have changed in place."""
        for matrix, packed in zip(self.sources, self.packed):
            packed.write(matrix.out_in())

    def run(self, ids, lengths, cache, logits, counts=None):
        """Writes logits [B T, V] fp32 after ids [B, T], of which counts [B] int32 are some; lengths [B] int32 stay."""
        transformer, config = self.model.transformer, self.model.config
        decode_step(
            ids,
            lengths,
            cache,
            self.layers,
            (transformer.wte.weight, transformer.wpe.weight),
            (transformer.ln_f.weight, transformer.ln_f.bias),
            self.head,
            logits,
            self.buffers,
            config.n_head,
            self.scales,
            config.layer_norm_epsilon,
            counts,
        )
