"""generate(): its arguments, checked; the decoding itself is in model/generation/decoding.py."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from model.cache import KVCache
from model.config import SPECIAL_TOKENS, GPT2Config, brief
from model.generation.config import FILE, GenerationConfig, merge
from model.generation.decoding import Decoding
from model.generation.graph import DecodeGraphs, GraphedSteps, refusal, refuse
from model.generation.prompts import Prompts
from model.generation.settings import Settings, token_ids
from model.generation.stopping import Stops
from model.generation.streaming import tells_streamer
from model.layers import onednn
from model.layers.linear import Linear


class GenerationMixin(torch.nn.Module):
    """generate() for a model with `transformer`, `lm_head` and `config`."""

    config: GPT2Config
    _graphs: DecodeGraphs | None = None
    _generation_config: GenerationConfig | None = None

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of generate(): a GenerationConfig, saved and loaded with the weights."""
        if self._generation_config is None:
            self._generation_config = GenerationConfig(self.config)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | dict) -> None:
        values = config if isinstance(config, dict) else config.to_dict()
        self._generation_config = GenerationConfig.from_dict(values, self.config)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **inputs: Any,
    ) -> dict:
        """The arguments of the next forward pass of somebody else's decoding loop; generate() has its own.

        input_ids [B, T]: a whole text, of which a cache's tokens are left out. inputs_embeds are taken where the cache
        is empty. The mask, and what else there is, goes along as it is; cache_position, which a cache knows, does not.
        """
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {name: value for name, value in inputs.items() if name != "cache_position" and value is not None}
        if inputs_embeds is not None and not held:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            inputs["input_ids"] = input_ids[:, held:]
        return {**inputs, "attention_mask": attention_mask, "past_key_values": past_key_values}

    def read_beside(self, source: Any) -> None:
        path = source.find(FILE)
        if path is not None:
            self._generation_config = GenerationConfig.from_json_file(path, self.config)

    def write_beside(self, directory: str | os.PathLike) -> None:
        """Where nothing is set, there is no file: config.json has the special tokens."""
        if self.generation_config.is_set:
            self.generation_config.save_pretrained(directory)
        else:
            (Path(directory) / FILE).unlink(missing_ok=True)

    @torch.no_grad()
    @tells_streamer
    def generate(
        self,
        input_ids: torch.Tensor | list[list[int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        generation_config: Any = None,
        inputs: torch.Tensor | list[list[int]] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        tokenizer: Any = None,
        stopping_criteria: list[Callable] | None = None,
        logits_processor: list[Callable] | None = None,
        streamer: Any = None,
        seed: int | list[int] | None = None,
        **settings: Any,
    ) -> Any:
        """Continues prompts: token ids [R, L], or a GenerateOutput if return_dict_in_generate.

        input_ids: [B, T] with an attention_mask if padded, on either side, or a list of lists of ids. Returned rows are
        padded on the left, where they must be, so that new tokens start in one column, at T: with pad_token_id, or eos.
        settings: max_length (a row's own, prompt included), max_new_tokens (20 if neither is given), min_length,
        min_new_tokens, do_sample, temperature, top_k (50), top_p, min_p, repetition_penalty, no_repeat_ngram_size,
        bad_words_ids, num_beams, num_return_sequences, length_penalty, early_stopping, use_cache, with Hugging Face's
        meaning and defaults;
        sliding_window: past n_positions, drop the older half of a row's tokens instead of refusing;
        num_beams > 1 with do_sample: beam sampling; the candidates of each step are drawn;
        prompt_lookup_num_tokens: draft so many tokens from earlier repetitions; greedy, the same tokens; several rows
        are continued one after the other;
        cuda_graph: on a GPU, capture the decode step of greedy decoding and sampling, once for each number of rows and
        each 256 tokens of length, and replay it. The graphs and their cache memory stay with the model until
        release_graphs() or train(). Where it cannot be done the ordinary step runs, and the logger
        "model.generation.graph" says why. False: never.
        decode_kernel: "auto", "fused", "persistent" or "plain": whether a captured step goes by kernels of its own
        (kernels/decode; a second copy of the layers' matrices stays with the graphs) or by those of the forward pass,
        which gives the ordinary step's bits. "auto": fused where they can, for at most 4 rows; "fused": for at most 16,
        and ValueError elsewhere; "persistent": likewise, in one launch a token, and without drafts. Prompt lookup with
        at most 16 drafts is captured by the fused ones alone.
        weights: "model", or "int8": the decode kernels read the layers' matrices and the head as int8 with a scale for
        each output, half the bytes of fp16, packed anew where they have changed; the prompt goes through the model's
        own weights. At most 16 rows; ValueError where those kernels cannot.
        Also typical_p, suppress_tokens, sequence_bias, prefix_allowed_tokens_fn(row, ids), renormalize_logits;
        max_time, in seconds; output_scores, output_logits, output_attentions, output_hidden_states, of each forward
        pass, in a GenerateOutput. inputs: another name of input_ids.
        inputs_embeds [B, T, C]: read in place of input_ids, and under the attention_mask; the rows returned then begin
        with input_ids if they too are given, or with the first new token. position_ids [B, T] or [1, T]: of the
        prompts; new tokens count on from the last. past_key_values: a KVCache that holds the first tokens of each row,
        extended in place (with beams or several sequences, a copy of it): give the whole text.
        generation_config: a GenerationConfig, transformers', or a dict. What it does not set is as in
        self.generation_config, which a checkpoint's generation_config.json fills; an argument goes before both, and
        None as one switches its setting off. eos_token_id: one or several; [] for none.
        seed: one (row r gets seed + r), or one per row: a row's sample then depends on nothing else in the batch.
        stopping_criteria: functions (ids [R, L], scores) -> bool [R]; logits_processor: (ids, scores) -> scores; both
        see rows of one length, without padding. stop_strings need the tokenizer. streamer: put(ids), end(); one row.

        Raises ValueError or TypeError before any work where an argument is wrong or a row would outgrow n_positions.
        On a CPU in fp32 the weights are packed at the first call, which takes a second copy of them in memory.
        """
        if inputs is not None and input_ids is not None:
            raise ValueError("generate: inputs is another name of input_ids; give one of them")
        input_ids = inputs if input_ids is None else input_ids
        merged = merge(self.generation_config, generation_config, settings)
        bos, eos, pad = (merged.pop(name, None) for name in SPECIAL_TOKENS)
        stop_strings = merged.pop("stop_strings", None)
        try:
            chosen = Settings(**merged)
        except TypeError as error:
            raise TypeError(
                f"generate: {str(error).removeprefix('Settings.__init__() ').removeprefix('generate: ')}"
            ) from None
        V = self.config.vocab_size
        chosen.check_vocabulary(V)
        eos = [token for token in token_ids("eos_token_id", eos) if 0 <= token < V]  # others are never said
        pad = next(iter(token_ids("pad_token_id", pad)), None)
        if pad is not None and not 0 <= pad < V:
            raise ValueError(
                f"generate: pad_token_id is {pad}; the vocabulary has 0 to {V - 1}: give one of them, or None"
            )
        given = (input_ids, attention_mask, inputs_embeds, position_ids, past_key_values)
        prompts = Prompts.read(self, *given, bos=bos, pad=pad if pad not in eos else None)
        for name, value in zip(("inputs_embeds", "position_ids", "past_key_values"), given[2:]):
            if value is not None:
                chosen.check_goes_on(name)
        budgets = [chosen.new_tokens(used, self.config.n_positions) for used in prompts.used()]
        prompts.check_positions(budgets, self.config.n_positions)
        rows = len(prompts.ids)
        stopping_criteria = _functions("stopping_criteria", stopping_criteria)
        stops = Stops(eos, stop_strings, tokenizer, stopping_criteria, chosen.max_time)
        if streamer is not None and rows * chosen.num_return_sequences * chosen.num_beams > 1:
            raise ValueError("generate: a streamer takes one row, and no beams")
        run = Decoding(
            self,
            chosen,
            prompts.ids,
            prompts.width,
            prompts,
            budgets,
            stops,
            eos,
            processors=_functions("logits_processor", logits_processor),
            streamer=streamer,
            fill=pad if pad is not None else eos[0] if eos else 0,
        )
        with self.packed_weights(), self.graphed_steps(chosen, prompts) or nullcontext() as run.graphed:
            if chosen.num_beams > 1:
                output = run.search_beams(seed)
            elif chosen.prompt_lookup_num_tokens:
                output = run.verify_drafts()
            else:
                output = run.choose_tokens(seed)
        if streamer is not None:
            streamer.end()
        return output if chosen.return_dict_in_generate else output.sequences

    @contextmanager
    def packed_weights(self) -> Iterator[None]:
        """Within this block a CPU decodes with packed weights, where it helps, as generate() does.

        They are packed at the first such block; at each later one they are read once, to see that they are the same.
        Within the block they must not change.
        """
        with onednn.using(self.pack_weights()):
            yield

    @torch.no_grad()
    def pack_weights(self) -> set:
        """The PackedWeights of all layers, or of none where that is of no use; see packed_weights()."""
        return {module.pack() for module in self.modules() if isinstance(module, Linear)} - {None}

    def graphed_steps(self, settings: Any, prompts: Any = None) -> GraphedSteps | None:
        """The replayed decode steps of one call of generate, or None, with the reason logged, where they cannot be."""
        kernel, weights = settings.decode_kernel, settings.weights
        if not settings.cuda_graph:
            refuse(kernel, weights, "it is for captured steps; cuda_graph=False has none")
            return None
        if self._graphs is None:
            self._graphs = DecodeGraphs()
        reason = refusal(self, settings, prompts)
        if reason is not None:
            refuse(kernel, weights, reason)
            self._graphs.tell(reason)
            return None
        keeps_cache = settings.return_dict_in_generate or (prompts is not None and prompts.past is not None)
        return GraphedSteps(self, self._graphs, keeps_cache, settings)

    def release_graphs(self) -> None:
        """Lets go of the captured decode steps and of their memory; generate() captures them anew."""
        self._graphs = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.release_graphs()
        return super().train(mode)


def _functions(name, given):
    """The caller's functions as a list; transformers' lists of them are lists."""
    if given is None:
        return []
    if not isinstance(given, list | tuple) or not all(map(callable, given)):
        raise TypeError(f"generate: {name} is {brief(given)}; it must be a list of functions")
    return list(given)
