"""GPT-2 with Hugging Face's other heads: multiple choice beside the language model, texts, tokens and answers.

Names, arguments and losses are transformers', and so are the parameters' names: checkpoints go both ways. A plain GPT-2
checkpoint has no such head: from_pretrained then initialises it, and the logger "model.checkpoints.pretrained" names
the new keys. Losses are computed in fp32. B rows, T tokens, C = n_embd, V = vocab_size, K = num_labels, N choices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.cache import KVCache
from model.checkpoints.pretrained import PretrainedModel
from model.config import GPT2Config
from model.gpt2 import GPT2, GPT2Model
from model.inputs import LABELS, check_inputs, check_range, check_shape
from model.layers.initialisation import init_weights
from model.layers.ops import activation, causal_lm_loss
from model.outputs import DoubleHeadsOutput, QuestionAnsweringOutput, SequenceClassifierOutput, TokenClassifierOutput


class _Headed:
    """What these models share. `options` of their forwards are GPT2Model's: output_hidden_states, output_attentions."""

    def _hidden(self, ids, cache, mask, types, positions, embeds, use_cache, options):
        """GPT2Model's output for the inputs of a forward, in forward's order."""
        inputs = {"past_key_values": cache, "attention_mask": mask, "token_type_ids": types, "position_ids": positions}
        inputs.update(inputs_embeds=embeds, use_cache=use_cache)
        return self.transformer(ids, **{**inputs, **options, "return_dict": True})

    def _apply_head(self, head, hidden, *inputs):
        """As in GPT2, no graph is recorded with a cache."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and hidden.past_key_values is None):
            return head(*inputs)

    def _output(self, output_class, hidden, return_dict, **values):
        for name in ("past_key_values", "hidden_states", "attentions", "cross_attentions"):
            if name in output_class.__dataclass_fields__:
                values[name] = getattr(hidden, name)
        output = output_class(**values)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class SequenceSummary(nn.Module):
    """One token's vector [..., C], or the mean of all, from x [..., T, C]; then projected: [..., K] or [..., C].

    config.summary_type: "last", "first", "mean", or "cls_index", the token that the caller names, by default the last.
    Unlike transformers', the first three look along T also where x is [B, N, T, C]; there they would mix choices.
    """

    def __init__(self, config):
        super().__init__()
        self.summary_type = config.summary_type
        self.summary = nn.Identity()
        if config.summary_use_proj:
            outputs = config.num_labels if config.summary_proj_to_labels else config.n_embd
            self.summary = nn.Linear(config.n_embd, outputs)
        name = config.summary_activation
        self.activation = activation(name, "summary_activation") if name else nn.Identity()
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout or 0.0)

    def forward(self, x, index=None):
        return self.last_dropout(self.activation(self.summary(self.first_dropout(self._token(x, index)))))

    def _token(self, x, index):
        if self.summary_type == "mean":
            return x.mean(-2)
        if self.summary_type == "first":
            return x[..., 0, :]
        if self.summary_type == "last" or index is None:
            return x[..., -1, :]
        check_shape("mc_token_ids", index, tuple(x.shape[:-2]))
        check_range("mc_token_ids", index, x.shape[-2])
        index = index.long()[..., None, None].expand(*index.shape, 1, x.shape[-1])  # [..., 1, C]
        return x.gather(-2, index).squeeze(-2)


class GPT2DoubleHeadsModel(_Headed, GPT2):
    """The language model and, beside its head, one that scores choices. Sets config.num_labels to 1."""

    head_name: str = "multiple_choice_head"

    def __init__(
        self, config: GPT2Config, *, attn_implementation: str = "auto", kernel_implementation: str = "auto"
    ) -> None:
        super().__init__(config, attn_implementation=attn_implementation, kernel_implementation=kernel_implementation)
        config.num_labels = 1
        self.multiple_choice_head = SequenceSummary(config)
        init_weights(self.multiple_choice_head, config)

    def forward(  # type: ignore[override]  # its arguments and their order are transformers'
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mc_token_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mc_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """input_ids [B, N, T], of N choices, to a DoubleHeadsOutput: logits [B, N, T, V], mc_logits [B, N].

        Without the N, the rows are the choices of one question. mc_token_ids [B, N]: the token of each choice that
        speaks for it, by default the last. labels as input_ids, shifted here, -100 ignored: the language model's loss;
        mc_labels [B]: the right choice, for mc_loss. A cache, hidden_states and attentions have B * N rows.
        """
        check_inputs(
            "GPT2DoubleHeadsModel",
            self.device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mc_token_ids=mc_token_ids,
            labels=labels,
            mc_labels=mc_labels,
            return_dict=return_dict,
        )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and not given.numel():
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(f"GPT2DoubleHeadsModel: {name} has shape {tuple(given.shape)}; a token is required")
        mask, types, positions = (_rows(tensor, 1) for tensor in (attention_mask, token_type_ids, position_ids))
        ids, embeds = _rows(input_ids, 1), _rows(inputs_embeds, 2)
        hidden = self._hidden(ids, past_key_values, mask, types, positions, embeds, use_cache, options)
        x = hidden.last_hidden_state  # [B * N, T, C]
        shape = tuple(input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1])  # type: ignore[union-attr]
        if labels is not None:
            check_shape("labels", labels, shape)
            check_range("labels", labels, self.config.vocab_size, ignored=-100)
        logits = self._apply_head(self.lm_head, hidden, x)  # [B * N, T, V]
        mc_logits = self._apply_head(self.multiple_choice_head, hidden, x.view(*shape, -1), mc_token_ids).squeeze(-1)
        if mc_labels is not None and mc_logits.shape != shape[:-1]:
            raise ValueError(
                "GPT2DoubleHeadsModel: mc_labels need one score for each choice, but mc_logits are "
                f"{tuple(mc_logits.shape)}; set summary_use_proj and summary_proj_to_labels in the config"
            )
        kernels = self.transformer.kernel_implementation
        return self._output(
            DoubleHeadsOutput,
            hidden,
            return_dict,
            loss=None if labels is None else causal_lm_loss(logits, _rows(labels, 1), kernels),
            mc_loss=None if mc_labels is None else _class_loss("mc_labels", torch.atleast_2d(mc_logits), mc_labels),
            logits=logits.view(*shape, -1),
            mc_logits=mc_logits,
        )


class _Classifier(_Headed, PretrainedModel):
    """The transformer and one linear layer, called `head_name`."""

    head_name: str

    def __init__(
        self,
        config: GPT2Config,
        outputs: int,
        bias: bool = True,
        *,
        attn_implementation: str = "auto",
        kernel_implementation: str = "auto",
    ) -> None:
        super().__init__(config)
        if outputs < 1:
            raise ValueError(f"{type(self).__name__}: num_labels is {outputs}; it must be at least 1")
        self.transformer = GPT2Model(
            config, attn_implementation=attn_implementation, kernel_implementation=kernel_implementation
        )
        head = nn.Linear(config.n_embd, outputs, bias=bias)
        init_weights(head, config)
        self.add_module(self.head_name, head)

    def set_attn_implementation(self, name: str) -> None:
        self.transformer.set_attn_implementation(name)


class GPT2ForSequenceClassification(_Classifier):
    """K scores for each row, from its last token."""

    head_name: str = "score"

    def __init__(self, config: GPT2Config, **implementations: Any) -> None:
        super().__init__(config, config.num_labels, bias=False, **implementations)

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
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """input_ids [B, T] to a SequenceClassifierOutput with logits [B, K].

        A row's last token is the attention_mask's last 1; without a mask, the last id that is not config.pad_token_id;
        with inputs_embeds and no mask, the last. (transformers reads pad_token_id alone: it differs where a text holds
        that token.) Several rows with neither a mask nor a pad_token_id raise ValueError.
        labels: [B] classes; [B, K] of 0 and 1; or, for regression, [B, K] numbers ([B] if K = 1): config.problem_type,
        which as in transformers the first labels set: regression if K = 1, else classes if they are integers.
        """
        name = "GPT2ForSequenceClassification"
        check_inputs(name, self.device, input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=return_dict)
        check_inputs(name, self.device, LABELS, labels=labels)
        given = inputs_embeds if input_ids is None else input_ids
        pad = self.config.pad_token_id
        if given is not None and len(given) != 1 and attention_mask is None and pad is None:
            raise ValueError(
                f"GPT2ForSequenceClassification: {len(given)} rows without attention_mask, and config.pad_token_id is "
                "None; to find each row's last token, one of them is required"
            )
        inputs = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        hidden = self._hidden(*inputs, use_cache, options)
        x = hidden.last_hidden_state  # [B, T, C]
        B, T = x.shape[:2]
        is_token = None
        if attention_mask is not None:
            is_token = attention_mask[:, -T:].bool()
        elif input_ids is not None and pad is not None:
            is_token = input_ids != pad
        column = torch.arange(T, device=x.device)
        last = T - 1 if is_token is None else (column * is_token).amax(-1)  # [B]; 0 where there is only padding
        logits = self._apply_head(self.score, hidden, x[torch.arange(B, device=x.device), last])  # [B, K]
        loss = None if labels is None else self._loss(logits, labels)
        return self._output(SequenceClassifierOutput, hidden, return_dict, loss=loss, logits=logits)

    def _loss(self, logits, labels):
        B, K = logits.shape
        config = self.config
        if config.problem_type is None:
            is_classes = labels.dtype in (torch.int64, torch.int32)
            several = "single_label_classification" if is_classes else "multi_label_classification"
            config.problem_type = "regression" if K == 1 else several
        if config.problem_type == "single_label_classification":
            check_shape("labels", labels, (B,), (B, 1))
            return _class_loss("labels", logits, labels)
        check_shape("labels", labels, (B, K), *([(B,)] if K == 1 else []))
        of = F.mse_loss if config.problem_type == "regression" else F.binary_cross_entropy_with_logits
        return of(logits.float(), labels.view(B, K).to(logits.device).float())


class GPT2ForTokenClassification(_Classifier):
    """K scores for each token. Dropout before them: config.classifier_dropout, else hidden_dropout, else 0.1."""

    head_name: str = "classifier"

    def __init__(self, config: GPT2Config, **implementations: Any) -> None:
        super().__init__(config, config.num_labels, **implementations)
        given = [*(getattr(config, name) for name in ("classifier_dropout", "hidden_dropout")), 0.1]
        self.dropout = nn.Dropout(next(p for p in given if p is not None))

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
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """input_ids [B, T] to a TokenClassifierOutput with logits [B, T, K]; labels [B, T], -100 is ignored."""
        name = "GPT2ForTokenClassification"
        check_inputs(name, self.device, LABELS, labels=labels, use_cache=use_cache, return_dict=return_dict)
        inputs = (input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        hidden = self._hidden(*inputs, bool(use_cache), options)  # the output holds no cache
        x = self.dropout(hidden.last_hidden_state)  # [B, T, C]
        logits = self._apply_head(self.classifier, hidden, x)
        if labels is not None:
            check_shape("labels", labels, tuple(x.shape[:2]))
        loss = None if labels is None else _class_loss("labels", logits, labels)
        return self._output(TokenClassifierOutput, hidden, return_dict, loss=loss, logits=logits)


class GPT2ForQuestionAnswering(_Classifier):
    """Two scores for each token: as the first of the answer, and as its last."""

    head_name: str = "qa_outputs"

    def __init__(self, config: GPT2Config, **implementations: Any) -> None:
        super().__init__(config, 2, **implementations)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """input_ids [B, T] to a QuestionAnsweringOutput with start_logits and end_logits [B, T].

        start_positions and end_positions, [B] each, give the loss. As in transformers, one that lies after the last
        token is ignored, and a negative one counts as 0.
        """
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        check_inputs("GPT2ForQuestionAnswering", self.device, **positions, return_dict=return_dict)
        if (start_positions is None) != (end_positions is None):
            came = "start_positions" if end_positions is None else "end_positions"
            raise ValueError(f"GPT2ForQuestionAnswering: {came} came alone; give start_positions and end_positions")
        inputs = (input_ids, None, attention_mask, token_type_ids, position_ids, inputs_embeds)
        hidden = self._hidden(*inputs, False, options)  # the output holds no cache
        start_logits, end_logits = self._apply_head(self.qa_outputs, hidden, hidden.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            start_loss = self._loss("start_positions", start_logits, start_positions)
            loss = (start_loss + self._loss("end_positions", end_logits, end_positions)) / 2
        return self._output(
            QuestionAnsweringOutput, hidden, return_dict, loss=loss, start_logits=start_logits, end_logits=end_logits
        )

    def _loss(self, name, logits, positions):
        B, T = logits.shape
        check_shape(name, positions, (B,), (B, 1))
        return _class_loss(name, logits, positions.clamp(min=0).masked_fill(positions >= T, -100))


def _class_loss(name, logits, labels):
    """Mean cross-entropy of logits [..., K] against as many labels; -100 is ignored."""
    if labels.is_floating_point():
        raise ValueError(f"GPT2: {name} are {labels.dtype}; they must be integers, the index of a class each")
    labels = labels.flatten().to(logits.device, torch.int64)
    logits = logits.flatten(0, -2).float()
    if len(labels) != len(logits):
        raise ValueError(f"GPT2: {len(labels)} {name} came; there must be one for each of {len(logits)}")
    check_range(name, labels, logits.shape[-1], ignored=-100)
    return F.cross_entropy(logits, labels, ignore_index=-100)


def _rows(tensor, last):
    """[B, N, ...] as [B * N, ...], where `last` dimensions follow; a tensor without the N, or None, as it is."""
    return tensor if tensor is None or tensor.dim() <= last + 1 else tensor.flatten(0, -last - 1)
