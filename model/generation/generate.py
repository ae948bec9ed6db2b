"""generate(): prefill, then one token for each row at a time, from whatever scores the processors leave.

The prompts of a batch are taken without their padding: the cache holds each row from its own position 0, so that a row
gives the tokens that it gives alone. On a CPU that holds to the bit, in every backend (see model/layers/linear.py and
KVCache.attend); on a GPU as far as its matrix products are independent of the number of rows.

On a GPU a decode step is one replayed CUDA graph (model/generation/graph.py), and the host, which runs ahead of the
device, looks at the tokens every SYNC_EVERY steps alone; only a streamer, stop strings and the caller's own functions
see more of them.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from model.cache import KVCache
from model.generation.beam import beam_search
from model.generation.graph import DecodeGraphs, GraphedSteps, refusal
from model.generation.lookup import decode_with_lookup
from model.generation.sampling import build_processors, build_warpers, draw, row_seeds, uniform_draws
from model.generation.settings import Settings
from model.generation.stopping import Stops
from model.inputs import padding_bounds
from model.layers.linear import Linear
from model.outputs import GenerateOutput

SYNC_EVERY = 16  # steps after which a GPU is asked whether all rows have ended


class GenerationMixin:
    """generate() for a model with `transformer`, `lm_head` and `config`."""

    _graphs = None

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        attention_mask=None,
        *,
        eos_token_id=None,
        pad_token_id=None,
        stop_strings=None,
        tokenizer=None,
        stopping_criteria=None,
        logits_processor=None,
        streamer=None,
        seed=None,
        return_dict_in_generate=False,
        output_scores=False,
        **settings,
    ):
        """Continues prompts: token ids [R, L], or a GenerateOutput if return_dict_in_generate.

        input_ids: [B, T] with an attention_mask if padded, on either side, or a list of lists of ids. Returned rows are
        padded on the left, where they must be, so that new tokens start in one column: with pad_token_id, or eos.
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
        eos_token_id: one or several, by default the config's; [] for none.
        seed: one (row r gets seed + r), or one per row: a row's sample then depends on nothing else in the batch.
        stopping_criteria: functions (ids [R, L], scores) -> bool [R]; logits_processor: (ids, scores) -> scores; both
        see rows of one length, without padding. stop_strings need the tokenizer. streamer: put(ids), end(); one row.

        Raises ValueError or TypeError before any work where an argument is wrong or a row would outgrow n_positions.
        On a CPU in fp32 the weights are packed at the first call, which takes a second copy of them in memory.
        """
        try:
            settings = Settings(**settings)
        except TypeError as error:
            raise TypeError(f"generate: {str(error).removeprefix('Settings.__init__() ')}") from None
        eos = _as_list(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        prompts = self._prompts(input_ids, attention_mask, pad if pad not in eos else None)
        budgets = [settings.new_tokens(len(prompt), self.config.n_positions) for prompt in prompts]
        stops = Stops(eos, stop_strings, tokenizer, stopping_criteria)
        if streamer is not None and len(prompts) * settings.num_return_sequences * settings.num_beams > 1:
            raise ValueError("generate: a streamer takes one row, and no beams")
        self.pack_weights()

        run = Decoding(self, settings, prompts, budgets, stops, eos, list(logits_processor or ()), streamer)
        run.fill = pad if pad is not None else eos[0] if eos else 0
        run.output_scores = output_scores
        run.returns_cache = return_dict_in_generate
        with self.graphed_steps(settings) or nullcontext() as run.graphed:
            if settings.num_beams > 1:
                output = run.beams(seed)
            elif settings.prompt_lookup_num_tokens:
                output = run.lookup()
            else:
                output = run.tokens(seed)
        if streamer is not None:
            streamer.end()
        return output if return_dict_in_generate else output.sequences

    @torch.no_grad()
    def pack_weights(self):
        """Packs the weights for decoding on a CPU, where it helps; generate() does it at its first call."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def graphed_steps(self, settings):
        """The replayed decode steps of one call of generate, or None, with the reason logged, where they cannot be."""
        if not settings.cuda_graph:
            return None
        if self._graphs is None:
            self._graphs = DecodeGraphs()
        reason = refusal(self, settings)
        if reason is not None:
            self._graphs.tell(reason)
            return None
        return GraphedSteps(self, self._graphs)

    def release_graphs(self):
        """Lets go of the captured decode steps and of their memory; generate() captures them anew."""
        self._graphs = None

    def train(self, mode=True):
        if mode:
            self.release_graphs()
        return super().train(mode)

    def _prompts(self, input_ids, attention_mask, pad):
        """The prompts as a list of ids [L], without padding."""
        if input_ids is None:
            if self.config.bos_token_id is None:
                raise ValueError("generate: no input_ids, and the config has no bos_token_id to start from")
            input_ids = [[self.config.bos_token_id]]
        if isinstance(input_ids, torch.Tensor):
            if input_ids.dim() != 2:
                raise ValueError(f"generate: input_ids must be [B, T]; its shape is {tuple(input_ids.shape)}")
            if attention_mask is None and pad is not None:
                attention_mask = input_ids != pad
            rows = list(input_ids.to(self.device))
            start, end = padding_bounds(attention_mask, *input_ids.shape)
            if start is not None:
                rows = [row[a:b] for row, a, b in zip(rows, start.tolist(), end.tolist())]
        else:
            if attention_mask is not None:
                raise ValueError("generate: attention_mask goes with a tensor; a list of prompts has no padding")
            rows = [torch.as_tensor(row, dtype=torch.long, device=self.device) for row in input_ids]
        if not rows or not all(len(row) for row in rows):
            raise ValueError("generate: a prompt is empty; each needs at least one token")
        return rows


@dataclass(eq=False)
class Decoding:
    """One call of generate: its prompts, its settings and what it has said so far."""

    model: torch.nn.Module
    settings: Settings
    prompts: list
    budgets: list
    stops: Stops
    eos: list
    extra: list
    streamer: object = None
    fill: int = 0
    output_scores: bool = False
    returns_cache: bool = False
    graphed: GraphedSteps | None = None
    forward_passes: int = 0

    def tokens(self, seed):
        """Greedy decoding or sampling, token by token."""
        settings, repeats = self.settings, self.settings.num_return_sequences
        seeds = row_seeds(seed, len(self.prompts), repeats)
        logits = self.prefill(self.prompts)
        if repeats > 1:
            rows = torch.arange(len(self.prompts)).repeat_interleave(repeats)
            self.prompts = [self.prompts[r] for r in rows]
            self.budgets = [self.budgets[r] for r in rows]
            self.cache.reorder(rows)
            logits = logits[rows.to(logits.device)]

        R, steps, width = len(self.prompts), max(self.budgets), max(map(len, self.prompts))
        device = logits.device
        ids = torch.full((R, width + steps), self.fill, device=device)  # prompts end, and new tokens start, at width
        for row, prompt in zip(ids, self.prompts):
            row[width - len(prompt) : width] = prompt
        first = [width - len(prompt) for prompt in self.prompts]
        groups = [(slice(0, R), first[0])]  # rows of one length, and where their text starts
        if len(set(first)) > 1:
            groups = [(slice(r, r + 1), a) for r, a in enumerate(first)]
        processors = [build_processors(settings, len(prompt), self.eos, self.extra) for prompt in self.prompts]
        warpers = build_warpers(settings) if settings.do_sample else []
        uniform = uniform_draws(seeds, steps, device) if settings.do_sample else None
        budgets = torch.tensor(self.budgets, device=device)
        is_going = torch.ones(R, dtype=torch.bool, device=device)
        said = torch.zeros(R, dtype=torch.long, device=device)
        kept_scores = []
        copies = self.output_scores or bool(self.extra)  # a graph's next logits stand where the last ones stood
        self._stream(ids[0, :width])

        for step in range(steps):
            column = width + step
            scores = logits.to(torch.float32, copy=copies)
            if processors[0]:
                scores = torch.cat([_apply(processors[r.start], ids[r, a:column], scores[r]) for r, a in groups])
            for warp in warpers:
                scores = warp(scores)
            if self.output_scores:
                kept_scores.append(scores)
            token = draw(scores, uniform[:, step]) if settings.do_sample else scores.argmax(-1)
            token = token.masked_fill(~is_going, self.fill)
            ids[:, column] = token
            self._stream(token)
            said += is_going
            if self.stops.needs_rows:
                history = tuple(kept_scores) or None
                ended = torch.cat([self.stops(ids[r, a : column + 1], history) for r, a in groups])
            else:
                ended = self.stops(ids[:, : column + 1])
            is_going = is_going & ~ended & (budgets > step + 1)
            asks = device.type == "cpu" or (step + 1) % SYNC_EVERY == 0
            if step + 1 == steps or (asks and not is_going.any()):
                break
            logits = self.decode(ids, first, column + 1)

        length = int(said.max())
        if self.graphed is not None and self.returns_cache:
            self.graphed.detach(self.cache)
        return GenerateOutput(
            sequences=ids[:, : width + length],
            scores=tuple(kept_scores[:length]) if self.output_scores else None,
            past_key_values=self.cache if settings.use_cache else None,
            forward_passes=self.forward_passes,
        )

    def prefill(self, prompts):
        """Logits [R, V] after each prompt; fills a new cache."""
        if self.settings.sliding_window:
            prompts = [prompt[-self.model.config.n_positions :] for prompt in prompts]
        T = max(map(len, prompts))
        model = self.model
        self.cache = KVCache(model.config, len(prompts), capacity=T + 1, device=model.device, dtype=model.dtype)
        return self._run(prompts, self.cache)

    def decode(self, ids, first, end):
        """Logits [R, V] after ids[:, :end], all of which but the last column the cache holds."""
        n_positions = self.model.config.n_positions
        if not self.settings.use_cache:
            return self.prefill([row[a:end] for row, a in zip(ids, first)])
        for r, length in enumerate(self.cache.lengths):
            if length < n_positions:
                continue
            row = self.cache.row(r)
            row.reset()
            if self.settings.sliding_window:
                keep = n_positions // 2
                self._run([ids[r, end - 1 - keep : end - 1]], row)
            self.cache.lengths[r] = row.lengths[0]  # 0 where the row has ended and only fills its column
        new = ids[:, end - 1 : end]
        logits = None if self.graphed is None else self.graphed.step(new, self.cache)
        if logits is None:
            return self._run(list(new), self.cache)
        self.forward_passes += 1
        return logits

    def beams(self, seed):
        """Beam search or sampling; prompts of different lengths one after the other, as each would go alone."""
        settings, generators, warpers = self.settings, [None] * len(self.prompts), []
        if settings.do_sample:
            generators = [torch.Generator().manual_seed(s) for s in row_seeds(seed, len(self.prompts), 1)]
            warpers = build_warpers(settings, at_least=max(2, 1 + len(self.eos)))  # so that one of them does not end
        if len(set(map(len, self.prompts))) == 1:
            groups = [(self.prompts, self.budgets[0], generators)]
        else:
            groups = [([p], budget, [g]) for p, budget, g in zip(self.prompts, self.budgets, generators)]
        found, scores = [], []
        for prompts, budget, own in groups:
            L = len(prompts[0])
            sequences, values = beam_search(
                self.prefill(prompts).float(),
                lambda tokens: self._run(list(tokens), self.cache).float(),
                lambda rows: self.cache.reorder(rows),
                torch.stack(prompts),
                settings=settings,
                max_length=L + budget,
                eos=self.eos,
                processors=build_processors(settings, L, self.eos, self.extra),
                warpers=warpers,
                generators=own if settings.do_sample else None,
                stops=self.stops,
                fill=self.fill,
            )
            found.extend((L, row) for row in sequences)
            scores.append(values)
        sequences = self._aligned(found)
        return GenerateOutput(sequences, sequences_scores=torch.cat(scores), forward_passes=self.forward_passes)

    def lookup(self):
        """Greedy decoding with drafts from each row's own text, one row after the other."""
        if self.settings.do_sample or self.settings.sliding_window or self.output_scores:
            raise ValueError(
                "generate: prompt_lookup_num_tokens is for greedy decoding, without sliding_window and output_scores"
            )
        found = [(len(prompt), self._lookup_row(prompt, budget)) for prompt, budget in zip(self.prompts, self.budgets)]
        cache = self.cache if len(found) == 1 else None  # each row had its own
        return GenerateOutput(self._aligned(found), past_key_values=cache, forward_passes=self.forward_passes)

    def _lookup_row(self, prompt, budget):
        """The prompt [L] and its continuation."""
        logits = self.prefill([prompt])
        self._stream(prompt)
        said = decode_with_lookup(
            logits.float(),
            lambda tokens: self._run([tokens], self.cache, every_position=True)[0].float(),
            self.cache,
            prompt,
            budget=budget,
            draft_length=self.settings.prompt_lookup_num_tokens,
            processors=build_processors(self.settings, len(prompt), self.eos, self.extra),
            stops=self.stops,
            emit=self._stream,
        )
        return torch.cat((prompt, said))

    def _aligned(self, found):
        """Rows of (the prompt's length, ids) as one tensor [R, L] in which new tokens start in one column."""
        width, new = max(L for L, _ in found), max(len(row) - L for L, row in found)
        ids = torch.full((len(found), width + new), self.fill, device=found[0][1].device)
        for out, (L, row) in zip(ids, found):
            out[width - L : width - L + len(row)] = row
        return ids

    def _run(self, rows, cache, every_position=False):
        """Feeds each row its new ids: logits [R, V] of the last of them, or [R, T, V] of all."""
        self.forward_passes += 1
        lengths = [len(row) for row in rows]
        T = max(lengths)
        mask = None
        if min(lengths) == T:
            ids = torch.stack(rows)  # [R, T]
        else:
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [R, T]
            lengths = torch.tensor(lengths, device=ids.device)
            mask = torch.arange(T, device=ids.device) < lengths[:, None]  # [R, T]
        hidden = self.model.transformer(ids, attention_mask=mask, past_key_values=cache, return_dict=True)
        x = hidden.last_hidden_state  # [R, T, C]
        if not every_position:
            x = x[:, -1] if mask is None else x[torch.arange(len(rows), device=x.device), lengths - 1]  # [R, C]
        return self.model.lm_head(x)

    def _stream(self, ids):
        if self.streamer is not None:
            self.streamer.put(ids.cpu())


def _apply(processors, ids, scores):
    for process in processors:
        scores = process(ids, scores)
    return scores


def _as_list(token):
    return [] if token is None else [token] if isinstance(token, int) else list(token)
