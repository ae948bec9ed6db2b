"""From logits to the next token: the processors of Hugging Face's generate, in its order, and sampling by row.

A processor maps (ids [R, L], scores [R, V]) to scores; the rows of one call have one length and no padding. No
host-device sync: no tensor is made from host numbers, and no mask selects an unknown number of values.
"""

import math

import numpy as np
import torch

from model.config import brief

NEVER = -math.inf


def repetition_penalty(penalty):
    """Divides positive scores of tokens that occurred by `penalty` and multiplies negative ones. Keskar et al. 2019."""

    def process(ids, scores):
        seen = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return process


def no_repeat_ngram(n):
    """Bans each token that would repeat an n-gram."""

    def process(ids, scores):
        L = ids.shape[1]
        if n > L:
            return scores
        windows = ids.unfold(1, n, 1)  # [R, L - n + 1, n]
        repeats = (windows[..., :-1] == ids[:, None, L + 1 - n :]).all(-1)  # [R, L - n + 1]
        limits = scores.new_full(repeats.shape, math.inf).masked_fill(repeats, NEVER)
        return scores.scatter_reduce(1, windows[..., -1], limits, "amin")

    return process


def bad_words(sequences):
    """Bans the last token of each sequence of ids whose other tokens are the latest in the text."""

    def process(ids, scores):
        scores = scores.clone()
        for *prefix, last in sequences:
            if len(prefix) <= ids.shape[1]:
                matches = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
                for back, token in enumerate(reversed(prefix), start=1):
                    matches &= ids[:, -back] == token
                scores[:, last].masked_fill_(matches, NEVER)
        return scores

    return process


def suppress(tokens):
    """Forbids these tokens."""

    def process(ids, scores):
        scores = scores.clone()
        for token in tokens:
            scores[:, token].fill_(NEVER)
        return scores

    return process


def sequence_bias(biases):
    """Adds biases[ids] to the score of the last of these ids where its other ids have just been said."""

    def process(ids, scores):
        scores = scores.clone()
        for (*prefix, last), bias in biases.items():
            if len(prefix) <= ids.shape[1]:
                said = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
                for back, token in enumerate(reversed(prefix), start=1):
                    said &= ids[:, -back] == token
                scores[:, last] += scores.new_zeros(len(ids)).masked_fill(said, bias)  # 0 * -inf would be NaN
        return scores

    return process


def prefix_allowed_tokens(allowed, first_row, beams):
    """Keeps the tokens that allowed(row, ids [L]) lists; `beams` rows at a time are one row of the caller's.

    Where none of them has any probability left they become equally likely, as in transformers: the constraint holds.
    """

    def process(ids, scores):
        mask = torch.full_like(scores, NEVER)
        for r, row in enumerate(ids):
            tokens = list(allowed(first_row + r // beams, row))
            if not tokens:
                raise ValueError(f"generate: prefix_allowed_tokens_fn allows no token in row {first_row + r // beams}")
            mask[r, tokens] = 0.0
        kept = scores + mask
        hopeless = (kept.amax(-1) == NEVER).view(-1, beams).all(-1).repeat_interleave(beams)[:, None]
        return torch.where(hopeless & ~scores.isnan().any(-1, keepdim=True), mask, kept)

    return process


def min_length(length, eos):
    """Bans EOS below `length` tokens."""

    def process(ids, scores):
        if ids.shape[1] >= length:
            return scores
        scores = scores.clone()
        for token in eos:
            scores[:, token].fill_(NEVER)
        return scores

    return process


def temperature(value):
    return lambda scores: scores / value


def top_k(k, at_least=1):
    """Keeps the k highest scores, at least `at_least`, and ties with the lowest of them."""
    k = max(k, at_least)
    return lambda scores: scores.masked_fill(scores < scores.topk(min(k, scores.shape[-1])).values[:, -1:], NEVER)


def top_p(p, at_least=1):
    """Nucleus sampling: the fewest likeliest tokens, at least `at_least`, with probability p. Holtzman et al. 2019."""

    def process(scores):
        ascending, order = scores.sort()
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - p
        beyond[:, -at_least:] = False
        return scores.masked_fill(beyond.scatter(1, order, beyond), NEVER)

    return process


def min_p(p, at_least=1):
    """Keeps tokens of at least p times the highest probability, and the `at_least` likeliest."""

    def process(scores):
        probabilities = scores.softmax(-1)
        unlikely = probabilities < p * probabilities.amax(-1, keepdim=True)
        unlikely.scatter_(1, scores.topk(min(at_least, scores.shape[-1])).indices, False)
        return scores.masked_fill(unlikely, NEVER)

    return process


def typical_p(mass, at_least=1):
    """Keeps the tokens closest to the expected surprise whose probability reaches `mass`. Meister et al. 2022."""

    def process(scores):
        surprise = -scores.log_softmax(-1)
        expected = (surprise * scores.softmax(-1)).nansum(-1, keepdim=True)  # of a forbidden token inf * 0
        ascending, order = (surprise - expected).abs().sort()
        count = (scores.gather(1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True)  # [R, 1]
        beyond = ascending > ascending.gather(1, count.clamp(max=scores.shape[-1] - 1))
        beyond[:, :at_least] = False
        return scores.masked_fill(beyond.scatter(1, order, beyond), NEVER)

    return process


def build_processors(settings, prompt_length, eos, extra=(), first_row=0):
    """The processors that look at the tokens, in Hugging Face's order; the caller's own come last.

    first_row: what the caller calls the first of the rows that they are for.
    """
    processors = []
    if settings.sequence_bias:
        processors.append(sequence_bias(settings.sequence_bias))
    if settings.repetition_penalty != 1.0:
        processors.append(repetition_penalty(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        processors.append(no_repeat_ngram(settings.no_repeat_ngram_size))
    if settings.bad_words_ids:
        processors.append(bad_words([word for word in settings.bad_words_ids if word not in [[i] for i in eos]]))
    shortest = max(settings.min_length, prompt_length + settings.min_new_tokens)
    if eos and shortest > prompt_length:
        processors.append(min_length(shortest, eos))
    if settings.prefix_allowed_tokens_fn is not None:
        processors.append(prefix_allowed_tokens(settings.prefix_allowed_tokens_fn, first_row, settings.num_beams))
    if settings.suppress_tokens:
        processors.append(suppress(settings.suppress_tokens))
    return [*processors, *extra]


def build_warpers(settings, at_least=1):
    """What shapes the distribution that a token is drawn from: scores [R, V] to scores, in Hugging Face's order.

    They leave `at_least` so many tokens in it. Where none is drawn, the scores are renormalized at most.
    """
    normalize = [lambda scores: scores.log_softmax(-1)] if settings.renormalize_logits else []
    if not settings.do_sample:
        return normalize
    warpers = []
    if settings.temperature != 1.0:
        warpers.append(temperature(settings.temperature))
    if settings.top_k:
        warpers.append(top_k(settings.top_k, at_least))
    if settings.top_p < 1.0:
        warpers.append(top_p(settings.top_p, at_least))
    if settings.min_p is not None:
        warpers.append(min_p(settings.min_p, at_least))
    if settings.typical_p < 1.0:
        warpers.append(typical_p(settings.typical_p, at_least))
    return warpers + normalize


def row_seeds(seed, rows, repeats):
    """One seed per sequence, rows * repeats of them; from a single seed s, sequence r has s + r."""
    if seed is None:
        return torch.randint(2**62, (rows * repeats,), device="cpu").tolist()
    one = isinstance(seed, int | np.integer)
    several = [] if one else seed.tolist() if isinstance(seed, torch.Tensor | np.ndarray) else seed
    is_list = isinstance(several, list | tuple | range)
    if isinstance(seed, bool) or not is_list or not all(type(s) is int or isinstance(s, np.integer) for s in several):
        raise TypeError(f"generate: seed is {brief(seed)}; it must be an integer, or a list of one for each row")
    if one:
        return [int(seed) + r for r in range(rows * repeats)]
    seed = several
    if len(seed) != rows:
        raise ValueError(f"generate: seed holds {len(seed)} numbers for {rows} rows; give one, or one per row")
    return [s + i for s in seed for i in range(repeats)]


def uniform_draws(seeds, steps, device):
    """Uniform numbers [R, steps] in [0, 1): a generator per row, on the CPU, so the same for every device."""
    kind = {"dtype": torch.float32, "device": "cpu"}
    draws = [torch.rand(steps, generator=torch.Generator("cpu").manual_seed(seed), **kind) for seed in seeds]
    return torch.stack(draws).double().to(device)


def draw(scores, uniform):
    """Inverse-CDF sampling: each row's first token whose cumulative probability exceeds uniform [R]."""
    cumulative = scores.double().softmax(-1).cumsum(-1)  # [R, V]
    # float32's largest number below 1, times the total, stays below the total: a token of probability 0 is never drawn.
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=scores.shape[-1] - 1)  # of NaN, which is refused a little later on a GPU
