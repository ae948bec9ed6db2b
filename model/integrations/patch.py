"""A live transformers GPT-2 whose LayerNorms, residual additions, GELU and loss are this project's kernels.

    from model.integrations.transformers import patch_gpt2
    with patch_gpt2(model):          # or: patched = patch_gpt2(model); ...; patched.undo()
        model(input_ids, labels=input_ids).loss.backward()

Only the forwards of the modules change, as attributes of the instances: parameters, hooks, names and checkpoints stay.
One kernel computes a block's first residual addition with the LayerNorm behind it. What a LoRA or a hook has taken the
place of is called as the module that it is.
"""

import inspect
from functools import partial

import torch
from torch import nn

from kernels import add_layer_norm, bias_gelu, cross_entropy, gelu, layer_norm
from model.layers.observed import is_plain
from model.layers.ops import TANH_GELU, autocast_dtype


class Patched:
    """What patch_gpt2 changed. undo() changes it back, as the end of a `with` does; a second undo() does nothing.

    replaced: how many of each there are: {"layer_norm": ..., "residual": ..., "gelu": ..., "loss": ...}.
    """

    def __init__(self):
        self.replaced = dict.fromkeys(("layer_norm", "residual", "gelu", "loss"), 0)
        self._changed = []

    def replace(self, what, owner, name, value):
        self._changed.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = value
        self.replaced[what] += 1

    def undo(self):
        while self._changed:
            owner, name, before = self._changed.pop()
            if before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def patch_gpt2(model):
    """Replaces what the module's docstring says, until the Patched that is returned undoes it.

    model: any GPT-2 model of transformers. The loss is replaced where it is the language model's. An activation that is
    not the tanh GELU stays. Raises TypeError for another model, ValueError where one is patched already.
    """
    try:
        from transformers.models.gpt2 import modeling_gpt2
    except ImportError as error:
        raise ImportError("patch_gpt2: transformers is not installed; the model to patch is one of its") from error
    if not isinstance(model, modeling_gpt2.GPT2PreTrainedModel):
        raise TypeError(f"patch_gpt2: model is a {type(model).__name__}; it must be a GPT-2 of transformers")
    if any("forward" in module.__dict__ for module in model.modules() if type(module) is modeling_gpt2.GPT2Block):
        raise ValueError("patch_gpt2: the model's blocks have forwards of their own; undo() an earlier patch first")
    patched = Patched()
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            patched.replace("layer_norm", module, "forward", partial(_layer_norm, module))
        elif type(module) is modeling_gpt2.GPT2MLP and model.config.activation_function in TANH_GELU:
            patched.replace("gelu", module, "forward", partial(_mlp, module, modeling_gpt2.Conv1D))
        elif type(module) is modeling_gpt2.GPT2Block:
            patched.replace("residual", module, "forward", _BlockForward(module))
    if type(model) is modeling_gpt2.GPT2LMHeadModel:
        patched.replace("loss", model, "_loss_function", causal_lm_loss)
    return patched


def _layer_norm(norm, x):
    return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=autocast_dtype(x))


def _add_layer_norm(x, residual, norm):
    """(norm(x + residual), x + residual)"""
    is_norm = type(norm) is nn.LayerNorm and not (norm._forward_hooks or norm._forward_pre_hooks)
    if is_norm and residual.dtype in (x.dtype, torch.float32):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    total = x + residual
    return norm(total), total


def _mlp(mlp, conv1d, x):
    if is_plain(mlp.c_fc, conv1d):
        rows = torch.mm(x.flatten(0, -2), mlp.c_fc.weight)
        hidden = bias_gelu(rows, mlp.c_fc.bias).view(*x.shape[:-1], -1)
    else:
        hidden = gelu(mlp.c_fc(x))
    return mlp.dropout(mlp.c_proj(hidden))


class _BlockForward:
    """GPT2Block.forward, of transformers 4.56 and newer, with ln_2 (or the cross-attention's norm) fused."""

    def __init__(self, block):
        self.block = block
        self.signature = inspect.signature(type(block).forward)
        self.returns_tuple = "output_attentions" in self.signature.parameters  # transformers 4

    def __call__(self, *args, **options):
        block = self.block
        bound = self.signature.bind(block, *args, **options)
        given = dict(bound.arguments)
        given.pop("self")
        given.update(given.pop("kwargs", {}))
        x = given.pop("hidden_states")
        states, states_mask = given.pop("encoder_hidden_states", None), given.pop("encoder_attention_mask", None)
        update, *weights = block.attn(block.ln_1(x), **given)
        norm = block.ln_2
        if states is not None:
            if not hasattr(block, "crossattention"):
                raise ValueError("GPT2Block: encoder_hidden_states came; config.add_cross_attention must be True")
            kept = ("past_key_values", "attention_mask", "head_mask", "output_attentions")
            y, x = _add_layer_norm(update, x, block.ln_cross_attn)
            update, *cross_weights = block.crossattention(
                y,
                encoder_hidden_states=states,
                encoder_attention_mask=states_mask,
                **{name: given[name] for name in kept if name in given},
            )
            weights += cross_weights
        y, x = _add_layer_norm(update, x, norm)
        x = x + block.mlp(y)
        if not self.returns_tuple:
            return x
        return (x, *weights) if given.get("output_attentions") else (x,)


def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_unused
):
    """transformers' ForCausalLMLoss by the kernel: logits [B, T, V] at t against labels [B, T] at t + 1, fp32.

    num_items_in_batch: divides the sum, where gradients are accumulated over several batches; None takes the mean.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
