"""Beam search and beam sampling, with Hugging Face's rules for what ends it."""

import torch

from model.generation.checks import no_choice, refuse

UNLIKELY = -1e9  # a log-probability that loses against every real one and can still be added to


class _Finished:
    """The N best finished sequences of each prompt, best first."""

    def __init__(self, sequences, scores):
        self.sequences = sequences  # [B, N, max_length]
        self.scores = scores  # [B, N]
        self.done = torch.zeros_like(scores, dtype=torch.bool)
        self.lengths = torch.zeros_like(scores, dtype=torch.long)  # tokens generated

    def merge(self, sequences, scores, done, length):
        """Keeps the best of what is held and of new candidates [B, K, max_length] with their scores [B, K]."""
        N = self.scores.shape[1]
        lengths = torch.full_like(done, length, dtype=torch.long)
        self.scores, kept = torch.cat((self.scores, scores), 1).topk(N)
        self.sequences = torch.cat((self.sequences, sequences), 1).gather(
            1, kept[:, :, None].expand(-1, -1, sequences.shape[2])
        )
        self.done = torch.cat((self.done, done), 1).gather(1, kept)
        self.lengths = torch.cat((self.lengths, lengths), 1).gather(1, kept)


class BeamRecord:
    """What each step scored, where the settings want it: [B * N, V] in fp32, of the beams as they stood before it."""

    def __init__(self, settings):
        self.wants_scores, self.wants_logits = settings.output_scores, settings.output_logits
        self.scores, self.logits = [], []

    def add(self, logits, scores):
        if self.wants_logits:
            self.logits.append(logits)
        if self.wants_scores:
            self.scores.append(scores)


def _sample(total, count, generators):
    """Draws `count` entries of each row of log-probabilities [B, M] without replacement: indices [B, count], in order.

    The largest sums with Gumbel noise are such draws (Kool et al. 2019, "Stochastic Beams and Where to Find Them").
    The noise of a row is its own generator's, drawn on the CPU: the same for each device and any neighbours.
    """
    blank = torch.empty(total.shape[1], dtype=torch.float64, device="cpu")
    waits = [blank.clone().exponential_(generator=g) for g in generators]
    return (total - torch.stack(waits).log().to(total.device)).topk(count).indices


def beam_search(
    logits,
    step,
    reorder,
    ids,
    *,
    settings,
    max_length,
    eos,
    processors,
    warpers=(),
    generators=None,
    stops,
    fill,
    rows,
    record,
):
    """The best sequences of each of B equally long prompts.

    logits [B, V]: of the prompts' last position. step(tokens [B * N, 1]) -> logits [B * N, V]; reorder(rows) lets the
    model's row r continue what row rows[r] was. ids [B, L]. Returns (sequences [B * R, at most max_length] filled with
    `fill`, scores [B * R]): log-probability divided by the length generated to the power of length_penalty.

    rows: what the prompts are called in errors. record: a BeamRecord, told of the log-probabilities of each step.
    generators: one for each prompt. With them the candidates of a step are drawn instead of being the best, by their
    log-probabilities after the warpers; these are also what is summed to the score.
    """
    B, L = ids.shape
    N, R, V = settings.num_beams, settings.num_return_sequences, logits.shape[-1]
    candidates = max(2, 1 + len(eos)) * N  # enough that N of them do not end
    device = ids.device
    running = torch.full((B, N, max_length), fill, device=device)
    running[:, :, :L] = ids[:, None]
    running_scores = torch.full((B, N), UNLIKELY, dtype=torch.float32, device=device)
    running_scores[:, 0] = 0.0  # the beams of a prompt are equal at first: count one
    best = _Finished(running.clone(), running_scores.new_full((B, N), UNLIKELY))
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)
    logits = logits.repeat_interleave(N, 0)
    reorder(torch.arange(B, device=device).repeat_interleave(N))

    for length in range(L, max_length):
        flat = running[:, :, :length].flatten(0, 1)
        scores = logits.log_softmax(-1)
        for process in processors:
            scores = process(flat, scores)
        for warp in warpers:
            scores = warp(scores)
        record.add(logits, scores)
        total = (scores.view(B, N, V) + running_scores[:, :, None]).flatten(1)  # [B, N * V]
        failed = no_choice(total)
        if failed.any():
            b = int(failed.int().argmax())
            refuse(rows[b], length - L, logits[b * N])
        top = _sample(total, candidates, generators) if generators else total.topk(candidates).indices
        top_scores = total.gather(1, top)  # [B, candidates]
        beam, token = top // V, top % V
        extended = running.gather(1, beam[:, :, None].expand(-1, -1, max_length))  # [B, candidates, max_length]
        extended[:, :, length] = token
        ends = stops(extended[:, :, : length + 1].flatten(0, 1)).view(B, candidates) | (length + 1 == max_length)

        continued = top_scores + ends * UNLIKELY
        chosen = continued.topk(N).indices
        running = extended.gather(1, chosen[:, :, None].expand(-1, -1, max_length))
        running_scores = continued.gather(1, chosen)

        # Only those among the best N that end are results; the other candidates are there to continue.
        is_result = ends & (torch.arange(candidates, device=device) < N)
        full = best.done.all(1, keepdim=True) & (settings.early_stopping is True)
        value = top_scores / (length + 1 - L) ** settings.length_penalty
        value = value + full * UNLIKELY + ~improvable * UNLIKELY + ~is_result * UNLIKELY
        best.merge(extended, value, is_result, length + 1 - L)

        to_come = max_length if settings.early_stopping == "never" and settings.length_penalty > 0 else length + 1
        hope = running_scores[:, :1] / (to_come - L) ** settings.length_penalty
        worst = torch.where(best.done, best.scores.amin(1, keepdim=True), UNLIKELY)
        improvable = improvable & (hope > worst).any(1, keepdim=True)
        if ends.all() or not improvable.any() or (settings.early_stopping is True and best.done.all()):
            break
        reorder((beam.gather(1, chosen) + N * torch.arange(B, device=device)[:, None]).flatten())
        logits = step(running[:, :, length].reshape(-1, 1))

    sequences, lengths = best.sequences[:, :R].flatten(0, 1), best.lengths[:, :R].flatten()
    return sequences[:, : L + int(lengths.max())], best.scores[:, :R].flatten()
