"""One call of generate(): prefill, then one token for each row at a time, from whatever scores the processors leave.

The prompts of a batch are taken without their padding: the cache holds each row from its own position 0, so that a row
gives the tokens that it gives alone. On a CPU that holds to the bit, in every backend (see model/layers/onednn.py and
KVCache.attend); on a GPU as far as its matrix products are independent of the number of rows.

On a GPU a decode step is one replayed CUDA graph (model/generation/graph.py), and the host, which runs ahead of the
device, looks at the tokens every SYNC_EVERY steps alone; only a streamer, stop strings and the caller's own functions
see more of them. Where nothing but the logits decides, the graph chooses the ids, too (model/generation/ahead.py).
"""

from dataclasses import dataclass, field

import torch

from model.cache import KVCache
from model.generation.ahead import Rows, go_on, serves
from model.generation.beam import BeamRecord, beam_search
from model.generation.checks import ScoreCheck
from model.generation.graph import GraphedSteps
from model.generation.lookup import decode_with_lookup
from model.generation.prompts import Prompts
from model.generation.sampling import build_processors, build_warpers, draw, row_seeds, uniform_draws
from model.generation.settings import OUTPUTS, Settings
from model.generation.stopping import Stops
from model.layers.observed import is_plain
from model.outputs import GenerateOutput

SYNC_EVERY = 16  # steps after which a GPU is asked whether all rows have ended
ASKED_ALWAYS = ("cpu",)


@dataclass(eq=False)
class Decoding:
    """One call of generate: its prompts, its settings, its cache."""

    model: torch.nn.Module
    settings: Settings
    prompts: list  # the ids of each row
    width: int  # the column at which new tokens start
    given: Prompts  # what is read of each row at first
    budgets: list
    stops: Stops
    eos: list
    processors: list  # the caller's own, after those of the settings
    streamer: object = None
    fill: int = 0
    graphed: GraphedSteps | None = None
    cache: KVCache | None = None  # made by prefill
    forward_passes: int = 0
    positions_ahead: torch.Tensor | None = None  # [B]: by how much a row's positions are ahead of its cache
    passes: list = field(default_factory=list)  # (attentions, hidden states) of each forward pass, where wanted

    def choose_tokens(self, seed):
        """Greedy decoding or sampling, token by token."""
        settings, repeats = self.settings, self.settings.num_return_sequences
        seeds = row_seeds(seed, len(self.prompts), repeats)
        given = self.given
        logits = self.prefill(given.inputs, given.past, given.positions)
        if repeats > 1:
            rows = torch.arange(len(self.prompts), device="cpu").repeat_interleave(repeats)
            self.prompts = [self.prompts[r] for r in rows]
            self.budgets = [self.budgets[r] for r in rows]
            self.cache = self.cache.select(rows)
            logits = logits[rows.to(logits.device)]
            self.passes = [_each(lambda x: x.repeat_interleave(repeats, 0), kept) for kept in self.passes]

        R, steps, width = len(self.prompts), max(self.budgets), self.width
        device = logits.device
        ids = torch.full((R, width + steps), self.fill, device=device)  # prompts end, and new tokens start, at width
        for row, prompt in zip(ids, self.prompts):
            row[width - len(prompt) : width] = prompt
        first = [width - len(prompt) for prompt in self.prompts]
        groups = [(slice(0, R), first[0])]  # rows of one length, and where their text starts
        if len(set(first)) > 1:
            groups = [(slice(r, r + 1), a) for r, a in enumerate(first)]
        processors = [
            build_processors(settings, len(prompt), self.eos, self.processors, r)
            for r, prompt in enumerate(self.prompts)
        ]
        warpers = build_warpers(settings)
        uniform = uniform_draws(seeds, steps, device) if settings.do_sample else None
        rows = Rows(ids, width, torch.tensor(self.budgets, device=device), self.fill)
        every = 1 if device.type in ASKED_ALWAYS or self.streamer is not None else SYNC_EVERY
        by_itself = serves(self) and not processors[0] and not warpers  # may the captured step choose?
        check = ScoreCheck(R, device, settings.do_sample)
        kept_scores, kept_logits = [], []
        copies = (
            settings.output_scores or settings.output_logits or bool(self.processors)
        )  # a graph's next logits stand where the last ones stood
        self.stream(self.prompts[0])

        step = 0
        while True:
            column = width + step
            scores = logits.to(torch.float32, copy=copies)
            if settings.output_logits:
                kept_logits.append(scores)
            if processors[0]:
                scores = torch.cat([_apply(processors[r.start], ids[r, a:column], scores[r]) for r, a in groups])
            for warp in warpers:
                scores = warp(scores)
            if settings.output_scores:
                kept_scores.append(scores)
            check.see(scores, step, rows.is_going)
            asks = device.type == "cpu" or (step + 1) % SYNC_EVERY == 0 or step + 1 == steps
            if asks:
                check.ask(logits if device.type == "cpu" else None)
            token = draw(scores, uniform[:, step]) if settings.do_sample else scores.argmax(-1)
            token = token.masked_fill(~rows.is_going, self.fill)
            ids[:, column] = token
            self.stream(token)
            rows.new_tokens += rows.is_going
            if self.stops.needs_rows:
                history = tuple(kept_scores) or None
                ended = torch.cat([self.stops(ids[r, a : column + 1], history) for r, a in groups])
            else:
                ended = self.stops(ids[:, : column + 1])
            rows.is_going &= ~ended & (rows.budgets > step + 1)
            step += 1
            if step == steps or (asks and not rows.is_going.any()):
                break
            if by_itself:
                step, is_all = go_on(self, rows, step, steps, every, check)
                if is_all:
                    break
            logits = self.decode(ids, first, width + step)

        length = int(rows.new_tokens.max())
        return GenerateOutput(
            sequences=ids[:, : width + length],
            scores=tuple(kept_scores[:length]) if settings.output_scores else None,
            logits=tuple(kept_logits[:length]) if settings.output_logits else None,
            past_key_values=self.cache if settings.use_cache else None,
            forward_passes=self.forward_passes,
            **self._watched(length),
        )

    def prefill(self, inputs, past=None, positions=None):
        """Logits [R, V] after each row of ids [L] or embeddings [L, C]; extends `past`, or fills a new cache."""
        if self.model.device.type == "meta":
            raise ValueError("generate: the weights are on device meta; they hold no values, so no token can be chosen")
        if self.settings.sliding_window:
            inputs = [row[-self.model.config.n_positions :] for row in inputs]
        T, model = max(map(len, inputs)), self.model
        self.cache = past
        if past is None:
            self.cache = KVCache(model.config, len(inputs), capacity=T + 1, device=model.device, dtype=model.dtype)
        logits = self._feed(inputs, self.cache, positions=positions)
        if positions is not None:
            ends = [int(row[-1]) + 1 - length for row, length in zip(positions, self.cache.lengths)]
            self.positions_ahead = torch.tensor(ends, device=model.device)
        return logits

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
                self._feed([ids[r, end - 1 - keep : end - 1]], row)
            self.cache.lengths[r] = row.lengths[0]  # 0 where the row has ended and only fills its column
        new = ids[:, end - 1 : end]
        logits = None if self.graphed is None else self.graphed.step(new, self.cache)
        if logits is None:
            return self._feed(list(new), self.cache)
        self.forward_passes += 1
        return logits

    def search_beams(self, seed):
        """Beam search or sampling; prompts of different lengths one after the other, as each would go alone."""
        settings, generators = self.settings, [None] * len(self.prompts)
        if settings.do_sample:
            generators = [torch.Generator("cpu").manual_seed(s) for s in row_seeds(seed, len(self.prompts), 1)]
        warpers = build_warpers(settings, at_least=max(2, 1 + len(self.eos)))  # so that one of them does not end
        given, groups = self.given, [range(len(self.prompts))]
        if len({(len(prompt), used) for prompt, used in zip(self.prompts, given.used())}) > 1:
            groups = [[row] for row in groups[0]]
            outputs = [name for name in OUTPUTS if getattr(settings, name)]
            if outputs:
                raise ValueError(
                    f"generate: {outputs[0]} with num_beams takes prompts of one length; those of several lengths are "
                    "searched one after the other, each in steps of its own"
                )
        found, scores, kept = [], [], BeamRecord(settings)
        for rows in groups:
            prompts, budget = [self.prompts[row] for row in rows], self.budgets[rows[0]]
            L = len(prompts[0])
            sequences, values = beam_search(
                self.prefill(
                    [given.inputs[row] for row in rows],
                    None if given.past is None else given.past.select(rows),
                    given.positions and [given.positions[row] for row in rows],
                ).float(),
                lambda tokens: self._feed(list(tokens), self.cache).float(),
                lambda rows: self.cache.reorder(rows),
                torch.stack(prompts),
                settings=settings,
                max_length=L + budget,
                eos=self.eos,
                processors=build_processors(settings, L, self.eos, self.processors, rows[0]),
                warpers=warpers,
                generators=[generators[row] for row in rows] if settings.do_sample else None,
                stops=self.stops,
                fill=self.fill,
                rows=rows,
                record=kept,
            )
            found.extend((L, row) for row in sequences)
            scores.append(values)
        N = settings.num_beams
        self.passes[:1] = [_each(lambda x: x.repeat_interleave(N, 0), first) for first in self.passes[:1]]
        return GenerateOutput(
            self._align(found),
            sequences_scores=torch.cat(scores),
            scores=tuple(kept.scores) if settings.output_scores else None,
            logits=tuple(kept.logits) if settings.output_logits else None,
            forward_passes=self.forward_passes,
            **self._watched(len(self.passes)),
        )

    def verify_drafts(self):
        """Greedy decoding with drafts from each row's own text, one row after the other."""
        found = [
            (len(prompt), self._verify_drafts_of_row(prompt, budget))
            for prompt, budget in zip(self.prompts, self.budgets)
        ]
        cache = self.cache if len(found) == 1 else None  # each row had its own
        return GenerateOutput(self._align(found), past_key_values=cache, forward_passes=self.forward_passes)

    def _verify_drafts_of_row(self, prompt, budget):
        """The prompt [L] and its continuation."""
        logits = self.prefill([prompt])
        self.stream(prompt)
        new = decode_with_lookup(
            logits.float(),
            self._verify,
            self.cache,
            prompt,
            budget=budget,
            draft_length=self.settings.prompt_lookup_num_tokens,
            processors=build_processors(self.settings, len(prompt), self.eos, self.processors),
            stops=self.stops,
            emit=self.stream,
        )
        return torch.cat((prompt, new))

    def _verify(self, tokens):
        """Logits [T, V] after each of the ids [T], the last one said and its drafts."""
        logits = None if self.graphed is None else self.graphed.step(tokens[None], self.cache)
        if logits is None:
            return self._feed([tokens], self.cache, every_position=True)[0].float()
        self.forward_passes += 1
        return logits

    def _align(self, found):
        """Rows of (prompt length, ids) as one tensor [R, L], left-padded so that new tokens start in one column."""
        width, new = self.width, max(len(row) - L for L, row in found)
        ids = torch.full((len(found), width + new), self.fill, device=found[0][1].device)
        for out, (L, row) in zip(ids, found):
            out[width - L : width - L + len(row)] = row
        return ids

    def _feed(self, rows, cache, every_position=False, positions=None):
        """A forward pass over each row's new ids, or embeddings: logits [R, V] of the last, or [R, T, V] of all."""
        self.forward_passes += 1
        settings = self.settings
        lengths = [len(row) for row in rows]
        T = max(lengths)
        mask = None
        ids = _stack(rows)  # [R, T], or [R, T, C]
        if positions is not None:
            positions = _stack(positions)  # [R, T]
        elif self.positions_ahead is not None:
            held = torch.tensor(cache.lengths, device=ids.device)  # [R]
            ahead = self.positions_ahead.repeat_interleave(len(rows) // len(self.positions_ahead))  # [R]
            positions = (held + ahead)[:, None] + torch.arange(T, device=ids.device)  # [R, T]
        if min(lengths) < T:
            lengths = torch.tensor(lengths, device=ids.device)
            mask = torch.arange(T, device=ids.device) < lengths[:, None]  # [R, T]
        at = (slice(None), -1) if mask is None else (torch.arange(len(rows), device=ids.device), lengths - 1)
        at = slice(None) if every_position else at
        model, inputs = self.model, {"attention_mask": mask, "past_key_values": cache, "return_dict": True}
        inputs.update(position_ids=positions, output_attentions=settings.output_attentions)
        inputs.update(output_hidden_states=settings.output_hidden_states)
        ids, embeds = (ids, None) if ids.dim() == 2 else (None, ids)
        if is_plain(model, type(model)):
            output = model.transformer(ids, inputs_embeds=embeds, **inputs)
            logits = model.lm_head(output.last_hidden_state[at])
        else:
            output = model(ids, inputs_embeds=embeds, **inputs)
            logits = output.logits[at]  # its hooks see all positions, as they do outside generate()
        if settings.output_attentions or settings.output_hidden_states:
            self.passes.append((output.attentions, output.hidden_states))
        return logits

    def _watched(self, steps):
        """The attentions and hidden states of the first `steps` forward passes, as GenerateOutput has them."""
        settings, passes = self.settings, self.passes[:steps]
        return {
            "attentions": tuple(attentions for attentions, _ in passes) if settings.output_attentions else None,
            "hidden_states": tuple(states for _, states in passes) if settings.output_hidden_states else None,
        }

    def stream(self, ids):
        if self.streamer is not None:
            self.streamer.put(ids.cpu())


def _stack(rows):
    """Rows [T, ...] as one tensor [R, T, ...], padded on the right where they differ in length."""
    if len(set(map(len, rows))) == 1:
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _each(change, kept):
    """What a forward pass left, (attentions, hidden states), with each tensor changed."""
    return tuple(tensors and tuple(map(change, tensors)) for tensors in kept)


def _apply(processors, ids, scores):
    for process in processors:
        scores = process(ids, scores)
    return scores
