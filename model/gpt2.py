"""GPT-2: the transformer, and the language model on top of it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameter names and shapes are Hugging
Face's, so state dicts transfer both ways. B rows, T tokens, C = n_embd, H heads of D = C / H, V = vocab_size.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import attention, check_attention_name, self_attention, split_heads
from model.inputs import check_shape, lookup, padding_bounds
from model.ops import activation, causal_lm_loss, layer_norm
from model.outputs import BaseModelOutput, CausalLMOutput
from model.weights import PretrainedModel


class Conv1D(nn.Module):
    """A linear layer that stores its weight as [in, out], as GPT-2's checkpoints do."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x):
        y = torch.addmm(self.bias, x.flatten(0, -2), self.weight)  # [B * T, out]
        return y.view(*x.shape[:-1], -1)  # [B, T, out]


class Attention(nn.Module):
    """Causal self-attention by one of the registry's backends."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.num_heads = config.n_head
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.upcast = config.reorder_and_upcast_attn
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, backend, bounds, output_attentions):
        kv_start, kv_end = bounds
        options = {
            "backend": backend,
            "scale": self.scale,
            "kv_start": kv_start,
            "kv_end": kv_end,
            "dropout_p": self.attn_pdrop if self.training else 0.0,
            "upcast": self.upcast,
        }
        qkv = self.c_attn(x)  # [B, T, 3C]
        weights = None
        if output_attentions:
            q, k, v = split_heads(qkv, self.num_heads)  # each [B, H, T, D]
            o, weights = attention(q, k, v, return_weights=True, **options)
            y = o.transpose(1, 2).flatten(2)  # [B, T, C], a view
        else:
            y = self_attention(qkv, self.num_heads, **options)  # [B, T, C]
        return self.resid_dropout(self.c_proj(y)), weights


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner_dim)
        self.c_proj = Conv1D(config.inner_dim, config.n_embd)
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, backend, bounds, output_attentions):
        attended, weights = self.attn(layer_norm(x, self.ln_1), backend, bounds, output_attentions)
        x = x + attended
        return x + self.mlp(layer_norm(x, self.ln_2)), weights


class GPT2Model(PretrainedModel):
    """The transformer without a head.

    attn_implementation: "auto" or the name of a backend in model/attention.py.
    """

    def __init__(self, config, *, attn_implementation="auto"):
        super().__init__(config)
        self.set_attn_implementation(attn_implementation)
        self.gradient_checkpointing = False
        # nn.Embedding's own random initialisation would be overwritten: from_pretrained has none.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        init_weights(self, config)

    def set_attn_implementation(self, name):
        """Chooses the attention backend of every layer."""
        self.attn_implementation = check_attention_name(name)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        token_type_ids=None,
        inputs_embeds=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """input_ids [B, T] or inputs_embeds [B, T, C] to a BaseModelOutput.

        attention_mask: [B, T], 1 for tokens and 0 for padding on either side; a mask with holes raises ValueError.
        Reading it costs a GPU one synchronisation: leave it out where nothing is padded.
        position_ids: [B, T] or [1, T], by default 0 to T - 1, also where the mask pads on the left. They choose
        position embeddings and nothing else. token_type_ids: [B, T], embedded by wte and added.
        A token or position id outside its table raises ValueError on a CPU; on a GPU the embedding kernel asserts.
        """
        x = self._embed(input_ids, position_ids, token_type_ids, inputs_embeds)  # [B, T, C]
        bounds = padding_bounds(attention_mask, *x.shape[:2])
        output_hidden_states = _default(output_hidden_states, self.config.output_hidden_states)
        output_attentions = _default(output_attentions, self.config.output_attentions)
        checkpointing = self.gradient_checkpointing and self.training

        hidden_states, attentions = [], []
        for block in self.h:
            hidden_states.append(x)
            arguments = (x, self.attn_implementation, bounds, output_attentions)
            x, weights = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
            attentions.append(weights)
        x = layer_norm(x, self.ln_f)
        hidden_states.append(x)

        output = BaseModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()

    def _embed(self, input_ids, position_ids, token_type_ids, inputs_embeds):
        """Token, position and type embeddings, summed: [B, T, C]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GPT2Model: give input_ids or inputs_embeds, and not both")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given.dim() != (2 if inputs_embeds is None else 3):
            name = "input_ids must be [B, T]" if inputs_embeds is None else "inputs_embeds must be [B, T, C]"
            raise ValueError(f"GPT2Model: {name}; its shape is {tuple(given.shape)}")
        B, T = given.shape[:2]
        if self.config.n_positions < T:
            raise ValueError(f"GPT2Model: the input has {T} tokens; n_positions is {self.config.n_positions}")
        if position_ids is None:
            positions = self.wpe.weight[:T]  # [T, C], a view
        else:
            check_shape("position_ids", position_ids, (B, T), (1, T))
            positions = lookup(self.wpe, position_ids, "position_ids", "n_positions")  # [B or 1, T, C]
        if inputs_embeds is None:
            inputs_embeds = lookup(self.wte, input_ids, "input_ids", "vocab_size")  # [B, T, C]
        elif inputs_embeds.shape[-1] != self.config.n_embd:
            raise ValueError(
                f"GPT2Model: inputs_embeds has width {inputs_embeds.shape[-1]}; n_embd is {self.config.n_embd}"
            )
        x = inputs_embeds + positions
        if token_type_ids is not None:
            check_shape("token_type_ids", token_type_ids, (B, T))
            x = x + lookup(self.wte, token_type_ids, "token_type_ids", "vocab_size")
        return self.drop(x)


class GPT2(PretrainedModel):
    """GPT-2 with its language-modelling head, which shares wte's weight if config.tie_word_embeddings."""

    def __init__(self, config, *, attn_implementation="auto"):
        super().__init__(config)
        self.transformer = GPT2Model(config, attn_implementation=attn_implementation)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        if not config.tie_word_embeddings:
            self.lm_head.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
            init_weights(self.lm_head, config)
        self.tie_weights()

    def tie_weights(self):
        """Makes lm_head and wte one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def set_attn_implementation(self, name):
        self.transformer.set_attn_implementation(name)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        token_type_ids=None,
        inputs_embeds=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        logits_to_keep=0,
    ):
        """As GPT2Model, to a CausalLMOutput with logits [B, T, V] and, if labels [B, T] are given, the loss.

        labels are shifted here, so labels=input_ids trains the model to predict the next token; -100 is ignored.
        logits_to_keep: how many of the last positions to compute logits for (0: all), or a tensor of positions.
        """
        hidden = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        x = hidden.last_hidden_state  # [B, T, C]
        if labels is not None:
            check_shape("labels", labels, tuple(x.shape[:2]))
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            if labels is not None:
                raise ValueError("GPT2: labels need the logits of every position; leave logits_to_keep at 0")
            keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-logits_to_keep, None)
            x = x[:, keep]
        logits = self.lm_head(x)  # [B, T, V]
        output = CausalLMOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
        )
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()


GPT2LMHeadModel = GPT2


@torch.no_grad()
def init_weights(module, config):
    """GPT-2's initialisation: normal with std initializer_range, biases 0, norms 1 and 0.

    The projections into the residual stream are scaled by 1 / sqrt(2 * n_layer), one for each of its additions.
    """
    for name, part in module.named_modules():
        if isinstance(part, Conv1D | nn.Linear | nn.Embedding):
            scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
            part.weight.normal_(0.0, config.initializer_range * scale)
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()


def _default(given, otherwise):
    return otherwise if given is None else given
