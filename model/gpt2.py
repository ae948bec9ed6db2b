"""GPT-2: the transformer, and the language model on top of it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameter names and shapes are Hugging
Face's, so state dicts transfer both ways. B rows, T tokens, C = n_embd, H heads of D = C / H, V = vocab_size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.checks import check_number
from kernels.library import is_autocast_on
from model.attention import attention, check_attention_name, self_attention, split_heads
from model.cache import KVCache
from model.checkpoints.pretrained import PretrainedModel
from model.config import GPT2Config
from model.generation.generate import GenerationMixin
from model.inputs import (
    Padding,
    as_cache,
    can_be_read,
    check_inputs,
    check_range,
    check_shape,
    lookup,
    new_tokens,
    padding_bounds,
)
from model.layers.block import Numbers
from model.layers.blocks import Blocks
from model.layers.cross_attention import CrossAttention, encoder_of
from model.layers.initialisation import init_weights
from model.layers.linear import Conv1D, Head
from model.layers.norm import LayerNorm, add_norm
from model.layers.observed import is_plain, is_unhooked
from model.layers.ops import (
    TANH_GELU,
    activation,
    causal_lm_head_loss,
    causal_lm_loss,
    check_kernels_name,
    linear_activation,
)
from model.nanogpt import NanoGPTNames
from model.outputs import BaseModelOutput, CausalLMOutput


class Attention(nn.Module):
    """Causal self-attention by one of the registry's backends."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.n_head
        self.scale = config.attention_scale(layer_idx)
        self.upcast = config.reorder_and_upcast_attn
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)  # its p is the backend's
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, **context):
        """x [B, T, C] to (y [B, T, C], weights [B, H, T, T_k] or None); context: see Block.forward."""
        y, weights = self.before_dropout(x, **context)
        return self.resid_dropout(y), weights

    def before_dropout(self, x, *, backend, padding, cache, output_attentions):
        options = {
            "backend": backend,
            "scale": self.scale,
            "dropout_p": active_p(self.attn_dropout),
            "upcast": self.upcast,
        }
        bounds = {"kv_start": padding.kv_start, "kv_end": padding.kv_end}
        qkv = self.c_attn(x)  # [B, T, 3C]
        if cache is None and not output_attentions:
            y, weights = self_attention(qkv, self.num_heads, **options, **bounds), None  # [B, T, C]
        else:
            q, k, v = split_heads(qkv, self.num_heads)  # each [B, H, T, D]
            options["return_weights"] = output_attentions
            if cache is None:
                o, weights = attention(q, k, v, **options, **bounds)
            else:
                o, weights = cache.attend(self.layer_idx, q, k, v, padding.counts, **options)
            y = o.transpose(1, 2).flatten(2)  # [B, T, C], a view
        return self.c_proj(y), weights


class Activation(nn.Module):
    """The activation function that Hugging Face calls `name`."""

    def __init__(self, name):
        super().__init__()
        activation(name)  # an unknown one is refused now
        self.name = name

    def forward(self, x):
        return activation(self.name)(x)


class MLP(nn.Module):
    """Two linear layers, and an activation between them."""

    kernel_implementation = "auto"

    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner_dim)
        self.act = Activation(config.activation_function)
        self.c_proj = Conv1D(config.inner_dim, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.before_dropout(x))

    def before_dropout(self, x):
        c_fc, act = self.c_fc, self.act
        if is_plain(c_fc, Conv1D) and is_plain(act, Activation):
            hidden = linear_activation(x, c_fc, act.name, self.kernel_implementation)
        else:
            hidden = act(c_fc(x))
        return self.c_proj(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if config.add_cross_attention:
            self.crossattention = CrossAttention(config, layer_idx)
            self.ln_cross_attn = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, *, attentions, **context):
        """x [B, T, C] to x [B, T, C]; the attention weights, or None, are appended to the list `attentions`.

        context: backend, its name; padding, a Padding; cache, a KVCache or None; output_attentions; encoder, an Encoder
        or None. With an encoder the pair of self-attention's and cross-attention's weights is appended.
        """
        x, _, weights = self.fused(x, self.ln_1(x), None, **context)
        attentions.append(weights)
        return x

    def fused(self, x, y, next_norm, *, encoder=None, **context):
        """As forward, given y = ln_1(x): (x, next_norm(x), weights). One kernel adds and computes the norm behind it.

        What something observes, or what stands in a module's place, is called as a module.
        """
        attn, mlp = self.attn, self.mlp
        norm = self.ln_2 if encoder is None else self.ln_cross_attn
        if is_plain(attn, Attention) and is_plain(dropout := attn.resid_dropout, nn.Dropout):
            update, weights = attn.before_dropout(y, **context)
            y, x = add_norm(update, x, norm, active_p(dropout))
        else:
            update, weights = attn(y, **context)
            y, x = add_norm(update, x, norm, 0.0)
        if encoder is not None:
            del context["padding"]
            update, cross_weights = self.crossattention(y, encoder=encoder, **context)
            y, x = add_norm(update, x, self.ln_2, 0.0)
            weights = weights, cross_weights
        if is_plain(mlp, MLP) and is_plain(dropout := mlp.dropout, nn.Dropout):
            y, x = add_norm(mlp.before_dropout(y), x, next_norm, active_p(dropout))
        else:
            y, x = add_norm(mlp(y), x, next_norm, 0.0)
        return x, y, weights

    def parts(self):
        """(module, the class that it must be to compute what its name says) of the block and all in it."""
        attn, mlp = self.attn, self.mlp
        yield from ((self, Block), (attn, Attention), (mlp, MLP), (getattr(mlp, "act", None), Activation))
        yield from ((norm, LayerNorm) for norm in (self.ln_1, self.ln_2))
        for part, names in ((attn, ("c_attn", "c_proj")), (mlp, ("c_fc", "c_proj"))):
            yield from ((getattr(part, name, None), Conv1D) for name in names)

    def operands(self, next_norm):
        """(weights, numbers, kernels) for Blocks; None where a part is observed, or something stands in its place."""
        attn, mlp, ln_2 = map(self._modules.get, ("attn", "mlp", "ln_2"))
        if type(attn) is not Attention or type(mlp) is not MLP:
            return None
        c_attn, a_proj, *dropouts = map(attn._modules.get, ("c_attn", "c_proj", "attn_dropout", "resid_dropout"))
        c_fc, act, m_proj, dropout = map(mlp._modules.get, ("c_fc", "act", "c_proj", "dropout"))
        modules = (attn, mlp, act, *dropouts, dropout, c_attn, a_proj, ln_2, c_fc, m_proj, next_norm)
        if tuple(map(type, modules)) != self._KINDS or act.name not in TANH_GELU:
            return None
        if not is_unhooked(*modules):
            return None
        rates = list(map(active_p, (*dropouts, dropout)))
        if list(map(type, rates)) != [float] * 3:
            return None
        weights = []
        for module in modules[6:]:
            get = module._parameters.get
            weights += get("weight"), get("bias")
        scale, eps = float(attn.scale), (float(ln_2.eps), float(next_norm.eps))
        numbers = Numbers(attn.layer_idx, attn.num_heads, scale, *rates, *eps)
        kernels = ln_2.kernel_implementation, mlp.kernel_implementation, next_norm.kernel_implementation
        return weights, numbers, kernels

    _KINDS = (Attention, MLP, Activation, *[nn.Dropout] * 3, Conv1D, Conv1D, LayerNorm, Conv1D, Conv1D, LayerNorm)


class GPT2Model(PretrainedModel):
    """The transformer without a head.

    attn_implementation: "auto" or the name of a registered backend (model/attention).
    kernel_implementation: "auto", "triton" or "torch", for LayerNorm, GELU and the loss: model/layers/ops.py.
    """

    def __init__(
        self, config: GPT2Config, *, attn_implementation: str = "auto", kernel_implementation: str = "auto"
    ) -> None:
        super().__init__(config)
        self.set_attn_implementation(attn_implementation)
        self.kernel_implementation = check_kernels_name(kernel_implementation)
        self.checkpointing = None  # options of torch's checkpoint(), where blocks are recomputed
        # nn.Embedding's own random initialisation would be overwritten: from_pretrained has none.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.set_kernel_implementation(kernel_implementation)
        init_weights(self, config)

    def set_attn_implementation(self, name: str) -> None:
        """Chooses the attention backend of every layer."""
        self.attn_implementation = check_attention_name(name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """input_ids [B, T] or inputs_embeds [B, T, C] to a BaseModelOutput.

        attention_mask: [B, T], 1 for tokens and 0 for padding on either side; a mask with holes raises ValueError.
        Reading it costs a GPU one synchronisation: leave it out where nothing is padded.
        position_ids: [B, T] or [1, T], by default 0 to T - 1 after what the cache holds, also where the mask pads on
        the left. They choose position embeddings, nothing else. token_type_ids: [B, T], embedded by wte and added.
        past_key_values: a KVCache, extended in place; use_cache: whether to return one, by default if one was given, or
        if config.use_cache and autograd is off, but for torch.compile and torch.export. With a cache no graph is
        recorded.
        encoder_hidden_states [B, S, C], for config.add_cross_attention, and encoder_attention_mask [B, S], one run of
        ones in each row: what tokens attend to across. A cache remembers them; later calls may leave them out.
        A token or position id outside its table raises ValueError on a CPU; on a GPU the embedding kernel asserts.
        """
        check_inputs(
            "GPT2Model",
            self.device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=return_dict,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        config = self.config
        cache = as_cache(past_key_values, config)
        if use_cache is None:
            keeps = config.use_cache and not torch.is_grad_enabled() and can_be_read(self.wte.weight)
            use_cache = cache is not None or keeps
        output_hidden_states = _default(output_hidden_states, config.output_hidden_states)
        output_attentions = _default(output_attentions, config.output_attentions)
        checkpointing = self.checkpointing if self.training and torch.is_grad_enabled() else None

        B, T = self._check_tokens(input_ids, inputs_embeds, cache)
        if use_cache and cache is None:
            cache = KVCache(config, B, capacity=T, device=self.device, dtype=_compute_dtype(self))
        if cache is None:
            padding = Padding(*padding_bounds(attention_mask, B, T))
        else:
            padding = Padding(counts=new_tokens(attention_mask, B, T, cache))
            cache.reserve(T)
        encoder = encoder_of(config, encoder_hidden_states, encoder_attention_mask, B, cache, self.dtype)

        hidden_states: list = []
        attentions: Any = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self._embed(input_ids, position_ids, token_type_ids, inputs_embeds, cache)  # [B, T, C]
            context = {
                "backend": self.attn_implementation,
                "padding": padding,
                "cache": cache,
                "output_attentions": output_attentions,
                "encoder": encoder,
            }
            plain = output_attentions or encoder is not None
            whole = Blocks.of(x, config.head_dim, self.attn_implementation, padding, cache, plain=plain)
            blocks: list[Any] = list(self.h)
            y = None  # the next norm of x, where the block before has computed it
            for block, after in zip(blocks, [*blocks[1:], None]):
                hidden_states.append(x)
                if is_plain(block, Block):
                    next_norm = self.ln_f if after is None else after.ln_1 if is_plain(after, Block) else None
                    y = block.ln_1(x) if y is None else y
                    operands: Any = None if whole is None else block.operands(next_norm)
                    launches = None if operands is None else whole.serves(x, y, *operands)
                    if launches is not None:
                        run, arguments = whole, (x, y, *operands[:2], launches)
                    else:
                        run, arguments = partial(block.fused, **context), (x, y, next_norm)
                    x, y, weights = (
                        run(*arguments) if checkpointing is None else checkpoint(run, *arguments, **checkpointing)
                    )
                    attentions.append(weights)
                else:
                    run = partial(block, attentions=attentions, **context)
                    x, y = run(x) if checkpointing is None else checkpoint(run, x, **checkpointing), None
            y = self.ln_f(x) if y is None else y
            hidden_states.append(y)
        if cache is not None:
            cache.advance(padding.counts)
            if encoder is not None:
                cache.encoder = replace(encoder, states=None)
        attentions, cross_attentions = (attentions, None) if encoder is None else zip(*attentions)

        output = BaseModelOutput(
            last_hidden_state=y,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions else None,
        )
        return output if _default(return_dict, config.return_dict) else output.to_tuple()

    def _check_tokens(self, input_ids, inputs_embeds, cache):
        """The sizes (B, T) of what forward was given. Raises ValueError where it is not what it must be."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GPT2Model: give input_ids or inputs_embeds, and not both")
        given, C = (input_ids, None) if inputs_embeds is None else (inputs_embeds, self.config.n_embd)
        if given.dim() != (2 if C is None else 3) or given.shape[2:].numel() != (C or 1):
            expected = "input_ids must be [B, T]" if C is None else f"inputs_embeds must be [B, T, n_embd = {C}]"
            raise ValueError(f"GPT2Model: {expected}; its shape is {tuple(given.shape)}")
        if C is not None and torch.promote_types(given.dtype, self.dtype) != self.dtype:
            raise TypeError(
                f"GPT2Model: inputs_embeds is {given.dtype}; the model is {self.dtype}: .to(model.dtype) fits it"
            )
        B, T = given.shape[:2]
        if self.config.n_positions < T:
            raise ValueError(f"GPT2Model: the input has {T} tokens; n_positions is {self.config.n_positions}")
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"GPT2Model: past_key_values holds {cache.batch_size} rows; the input has {B}")
        return B, T

    def _embed(self, input_ids, position_ids, token_type_ids, inputs_embeds, cache):
        """Token, position and type embeddings, summed: [B, T, C]."""
        if inputs_embeds is None:
            inputs_embeds = lookup(self.wte, input_ids, "input_ids", "vocab_size")  # [B, T, C]
        B, T = inputs_embeds.shape[:2]
        if position_ids is not None:
            check_shape("position_ids", position_ids, (B, T), (1, T))
            positions = lookup(self.wpe, position_ids, "position_ids", "n_positions")  # [B or 1, T, C]
        elif cache is None or cache.is_uniform:
            first = 0 if cache is None else cache.get_seq_length()
            if is_plain(self.wpe, nn.Embedding):
                positions = self.wpe.weight[first : first + T]  # [T, C], a view
            else:
                positions = self.wpe(torch.arange(first, first + T, device=self.device)[None])  # [1, T, C]
        else:
            positions = self.wpe(cache.positions(T))  # [B, T, C]
        x = inputs_embeds + positions
        if token_type_ids is not None:
            check_shape("token_type_ids", token_type_ids, (B, T))
            x = x + lookup(self.wte, token_type_ids, "token_type_ids", "vocab_size")
        is_idle = is_plain(self.drop, nn.Dropout) and active_p(self.drop) == 0.0
        return x if is_idle else self.drop(x)


class GPT2(GenerationMixin, NanoGPTNames, PretrainedModel):
    """GPT-2 with its language-modelling head, which shares wte's weight if config.tie_word_embeddings."""

    def __init__(
        self, config: GPT2Config, *, attn_implementation: str = "auto", kernel_implementation: str = "auto"
    ) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(
            config, attn_implementation=attn_implementation, kernel_implementation=kernel_implementation
        )
        self.lm_head = Head(self.transformer.wte.weight)
        if not config.tie_word_embeddings:
            self.lm_head.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
            init_weights(self.lm_head, config)

    def tie_weights(self) -> None:
        """Makes lm_head and wte one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def _apply(self, fn, recurse=True):
        """As torch has it, but the head stays tied where a move makes new parameters: to and from "meta"."""
        is_tied = self.lm_head.weight is self.transformer.wte.weight
        super()._apply(fn, recurse)
        if is_tied:
            self.lm_head.weight = self.transformer.wte.weight
        return self

    def set_attn_implementation(self, name: str) -> None:
        self.transformer.set_attn_implementation(name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """As GPT2Model, to a CausalLMOutput with logits [B, T, V] and, if labels [B, T] are given, the loss.

        labels are shifted here, so labels=input_ids trains the model to predict the next token; -100 is ignored.
        logits_to_keep: how many of the last positions to compute logits for (0: all), or a tensor of positions.
        return_logits: False leaves logits None and takes the loss without ever holding all of them.
        """
        check_inputs("GPT2", self.device, labels=labels, return_dict=return_dict, return_logits=return_logits)
        if isinstance(logits_to_keep, torch.Tensor):
            if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
                came = f"{logits_to_keep.dtype} of shape {tuple(logits_to_keep.shape)}"
                raise TypeError(
                    f"GPT2: logits_to_keep is {came}; it must be a number, or positions [K] of int64 or int32"
                )
        else:
            check_number("GPT2", logits_to_keep, "logits_to_keep", "at least 0", lambda n: n >= 0, integer=True)
        hidden = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        x = hidden.last_hidden_state  # [B, T, C]
        if labels is not None:
            check_shape("labels", labels, tuple(x.shape[:2]))
            check_range("labels", labels, self.config.vocab_size, ignored=-100)
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            if labels is not None:
                raise ValueError("GPT2: labels need the logits of every position; leave logits_to_keep at 0")
            keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)
            x = x[:, keep]
        logits = loss = None
        kernels = self.transformer.kernel_implementation
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.past_key_values is None):
            if return_logits:
                logits = self.lm_head(x)  # [B, T, V]
        if labels is not None:
            if return_logits:
                loss = causal_lm_loss(logits, labels, kernels)
            elif not is_plain(self.lm_head, Head):
                loss = causal_lm_loss(self.lm_head(x), labels, kernels)
            else:
                loss = causal_lm_head_loss(x, self.lm_head.weight, labels, kernels)
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=hidden.past_key_values,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
            cross_attentions=hidden.cross_attentions,
        )
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()


GPT2LMHeadModel = GPT2


def _compute_dtype(model):
    device = model.device.type
    return torch.get_autocast_dtype(device) if is_autocast_on(device) else model.dtype


def active_p(dropout):
    """The dropout probability in effect: 0 in eval mode."""
    return dropout.p if dropout.training else 0.0


def _default(given, otherwise):
    return otherwise if given is None else given
