"""The decode step by kernels of its own (kernels/decode) in place of the model's forward pass."""

import torch

from kernels.attention import MAX_HEAD_DIM
from kernels.checks import FLOATS
from kernels.decode import MAX_ROWS, DecodeBuffers, decode_step, pack_layer
from model.attention import get_attention
from model.layers.linear import Head
from model.layers.norm import LayerNorm
from model.layers.observed import is_plain
from model.layers.ops import TANH_GELU, use_triton


def refusal(model, B):
    """Why these kernels cannot take a decode step of B rows of this model, in words, or None if they can."""
    transformer, config = model.transformer, model.config
    weight = transformer.wte.weight
    request = {"device": model.device, "dtype": model.dtype, "head_dim": config.head_dim}
    backend = get_attention(transformer.attn_implementation, **request).name
    dtypes = {parameter.dtype for parameter in model.parameters()}
    for holds, reason in (
        (B > MAX_ROWS, f"there are {B} rows; at most {MAX_ROWS} are served"),
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


def _matrices(block):
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


class FusedStep:
    """What kernels/decode takes of a model: its weights, the matrices packed, and buffers for B rows."""

    def __init__(self, model, B, capacity):
        self.model, config = model, model.config
        transformer = model.transformer
        self.packed = [pack_layer([x.weight for x in _matrices(block)]) for block in transformer.h]
        self.layers = []
        for block, packed in zip(transformer.h, self.packed):
            qkv, out, fc, proj = ((w, linear.bias) for w, linear in zip(packed, _matrices(block)))
            norms = ((norm.weight, norm.bias) for norm in (block.ln_1, block.ln_2))
            ln_1, ln_2 = norms
            self.layers.append((ln_1, qkv, out, ln_2, fc, proj))
        self.scales = [block.attn.scale for block in transformer.h]
        sizes = B, config.n_embd, config.n_head, config.inner_dim, capacity
        self.buffers = DecodeBuffers.make(*sizes, model.dtype, model.device)

    def refresh(self):
        """Packs the matrices anew, at the same addresses: the model's may have changed in place."""
        for block, packed in zip(self.model.transformer.h, self.packed):
            pack_layer([x.weight for x in _matrices(block)], packed)

    def run(self, ids, lengths, cache, logits):
        """Writes logits [B, V] fp32 after ids [B, 1]; lengths [B] int32 stay as they are."""
        transformer, config = self.model.transformer, self.model.config
        decode_step(
            ids,
            lengths,
            cache,
            self.layers,
            (transformer.wte.weight, transformer.wpe.weight),
            (transformer.ln_f.weight, transformer.ln_f.bias),
            self.model.lm_head.weight,
            logits,
            self.buffers,
            config.n_head,
            self.scales,
            config.layer_norm_epsilon,
        )
