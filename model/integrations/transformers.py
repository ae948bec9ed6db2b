"""Our kernels inside Hugging Face's transformers: attention for its decoders, the other operations for its GPT-2.

    from model.integrations.transformers import patch_gpt2, register

    register()
    model = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="triton_flash")
    patch = patch_gpt2(model)      # LayerNorm with the residual addition, GELU with its bias, the loss
    patch.undo()

`triton_flash` is causal or full attention with padding on either side and any of transformers' caches, forward and
backward, for any model whose attention goes through AttentionInterface, grouped-query included: each head of a group
reads the keys and values where they are. What is not an interval of keys for each row (sliding windows, packed rows,
masks of a model's own), softcaps, sinks and position biases are refused, each by its name.
"""

import functools
import sys

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model
from transformers.pytorch_utils import Conv1D
from transformers.utils import generic

from kernels import add_layer_norm, bias_gelu, cross_entropy, flash_attention, layer_norm
from model.inputs import padding_bounds

NAME = "triton_flash"
_UNSUPPORTED = ("softcap", "sliding_window", "s_aux", "position_bias", "attention_chunk_size")
_FULL = ("bidirectional_mask_function",)  # by name: not every version has it
_RETURNS_TUPLES = int(transformers.__version__.partition(".")[0]) < 5


def register(name=NAME):
    """Makes `name` an attn_implementation of every transformers model in this process."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, bounds)
    if "flash" in name:
        _tell_from_flash_attention(name)


def _tell_from_flash_attention(name):
    """transformers 5 takes each name with "flash" in it for a FlashAttention package and loads that; not this one."""
    asked = vars(generic).get("is_flash_attention_requested")
    if asked is None or name in getattr(asked, "others", ()):
        return
    others = {name, *getattr(asked, "others", ())}

    @functools.wraps(asked)
    def is_flash_attention_requested(config=None, requested_attention_implementation=None, version=None):
        if (requested_attention_implementation or getattr(config, "_attn_implementation", None)) in others:
            return False
        return asked(config, requested_attention_implementation, version)

    is_flash_attention_requested.others = others
    for module in list(sys.modules.values()):
        if vars(module).get("is_flash_attention_requested") is asked:
            module.is_flash_attention_requested = is_flash_attention_requested


def bounds(
    batch_size,
    q_length=None,
    kv_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    cache_position=None,
    **others,
):
    """What takes the place of a mask: int32 [B, 1, 1, 3] of q_start, kv_start, kv_end; None where nothing is padded.

    Of four dimensions, because what has those is what generate() hands on as it is.

    attention_mask: [B, kv_length], or shorter where a static cache has room left. Raises ValueError for a mask with
    holes, and for a mask function that is not plain causal or full attention.
    """
    if cache_position is not None:  # transformers 4
        q_length, q_offset = len(cache_position), cache_position[0]
    is_full = getattr(mask_function, "__name__", "") in _FULL
    if mask_function is not causal_mask_function and not is_full:
        raise ValueError(
            f"{NAME}: the model masks by {getattr(mask_function, '__name__', mask_function)}, which is neither plain "
            "causal nor full attention (a sliding window, packed rows?). attn_implementation='sdpa' takes any mask"
        )
    if isinstance(q_length, torch.Tensor):  # in some versions, positions
        q_length, q_offset = len(q_length), q_length[0]
    is_plain = not isinstance(q_offset, torch.Tensor) and (is_full or q_offset + q_length == kv_offset + kv_length)
    start = end = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"{NAME}: the mask is {tuple(attention_mask.shape)}; it must be [B, T], 1 for tokens")
        mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        start, end = padding_bounds(mask, *mask.shape)
        is_plain &= mask.shape[1] == kv_length
    if start is None and is_plain:
        return None
    device = attention_mask.device if attention_mask is not None else others.get("device")
    rows = torch.empty(batch_size, 3, dtype=torch.int32, device=device)
    rows[:, 0], rows[:, 1] = kv_length if is_full else q_offset - kv_offset, 0  # after all keys, a query sees them all
    rows[:, 2] = kv_length if attention_mask is None else mask.shape[1]
    if start is not None:
        rows[:, 1], rows[:, 2] = start, end
    return rows[:, None, None]


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **others):
    """transformers' attention interface: query [B, H, T, D], key and value [B, H_kv, T_k, D] to ([B, T, H, D], None).

    attention_mask: what bounds() gave.
    """
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(f"{NAME}: {name}={others[name]!r} came; attn_implementation='sdpa' or 'eager' may take it")
    if others.get("output_attentions"):
        raise ValueError(f"{NAME}: output_attentions needs the weights, which are never stored; 'eager' has them")
    options = {"scale": scaling, "dropout_p": dropout}
    options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        if attention_mask.dtype != torch.int32 or attention_mask.shape != (query.shape[0], 1, 1, 3):
            raise ValueError(
                f"{NAME}: the model brought a mask {tuple(attention_mask.shape)} of {attention_mask.dtype} of its own; "
                "only those that register() makes are intervals. attn_implementation='sdpa' takes any mask"
            )
        # The bounds know what is causal; is_causal is then False in some versions, where a mask says all.
        options["causal"] = True
        options["q_start"], options["kv_start"], options["kv_end"] = attention_mask[:, 0, 0].unbind(1)
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        o = flash_attention(query, key, value, **options)  # [B, H, T, D]
    else:  # head h reads keys of h // groups
        parts = [flash_attention(query[:, g::groups], key, value, **options) for g in range(groups)]
        o = torch.stack(parts, 2).flatten(1, 2)  # [B, H, T, D]
    return o.transpose(1, 2), None  # [B, T, H, D]


class Patch:
    """What patch_gpt2 replaced; undo() puts it back."""

    def __init__(self):
        self._undo = []

    def set(self, target, name, value):
        """Sets an attribute of an instance, until undo()."""
        had = name in target.__dict__
        before = target.__dict__.get(name)
        setattr(target, name, value)
        self._undo.append((target, name, had, before))

    def undo(self):
        """Makes the model what it was. Does nothing the second time."""
        for target, name, had, before in reversed(self._undo):
            if had:
                setattr(target, name, before)
            else:
                delattr(target, name)
        self._undo = []


def patch_gpt2(model):
    """Replaces operations of a live transformers GPT-2, of any head, by our kernels; its attention is register()'s.

    LayerNorm, with the residual addition before it; GELU with its bias, where the activation is gelu_new; the loss of
    the language model. Weights, names and outputs stay what they are; a module with hooks, or one of another class in
    its place, as LoRA's, is called as it is. Returns a Patch. Raises TypeError where the model has no GPT-2 in it.
    """

    if not any(isinstance(module, GPT2Model) for module in model.modules()):
        raise TypeError(f"patch_gpt2: model is {type(model).__name__}; a GPT-2 of transformers is required")
    patch = Patch()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            patch.set(module, "forward", _norm(module))
        elif isinstance(module, GPT2Block):
            patch.set(module, "forward", _block(module))
            if module.mlp.act.__class__.__name__ == "NewGELUActivation":
                patch.set(module.mlp, "forward", _mlp(module.mlp))
    if hasattr(model, "lm_head"):
        patch.set(model, "_loss_function", causal_lm_loss)
    return patch


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **others):
    """transformers' loss of a language model, by our cross-entropy: logits [B, T, V], labels [B, T], shifted here."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return cross_entropy(logits.reshape(-1, vocab_size), target, ignore_index=ignore_index)
    total = cross_entropy(logits.reshape(-1, vocab_size), target, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch


def _norm(norm):
    def forward(x):
        return layer_norm(x, norm.weight, norm.bias, norm.eps)

    return forward


def _mlp(mlp):
    whole = mlp.forward

    def forward(x):
        if not _is_plain(mlp.c_fc, Conv1D) or mlp.act._forward_hooks or mlp.act._forward_pre_hooks:
            return whole(x)
        hidden = (x.flatten(0, -2) @ mlp.c_fc.weight).view(*x.shape[:-1], -1)  # [B, T, 4C]; its bias with the GELU
        return mlp.dropout(mlp.c_proj(bias_gelu(hidden, mlp.c_fc.bias.to(hidden.dtype))))  # under autocast they differ

    return forward


def _block(block):
    whole = block.forward

    def forward(x, past_key_values=None, attention_mask=None, encoder_hidden_states=None, *rest, **others):
        if encoder_hidden_states is not None or rest or not _is_plain(block.ln_2, nn.LayerNorm):
            return whole(x, past_key_values, attention_mask, encoder_hidden_states, *rest, **others)
        others.pop("encoder_attention_mask", None)
        update, *weights = block.attn(
            block.ln_1(x), past_key_values=past_key_values, attention_mask=attention_mask, **others
        )
        norm = block.ln_2
        y, x = add_layer_norm(update.to(x.dtype), x, norm.weight, norm.bias, norm.eps)
        x = x + block.mlp(y)
        return (x, *weights) if _RETURNS_TUPLES else x

    return forward


def _is_plain(module, cls):
    """Whether nothing but our own forward would be left out by not calling the module."""
    return type(module) is cls and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
