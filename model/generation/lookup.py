"""Prompt-lookup decoding: draft tokens from earlier n-gram matches, no draft model. Saxena 2023.

One forward pass, which costs little more than a single token's, verifies the whole draft; its tokens are kept as far as
they are greedy decoding's.
"""

import torch

from model.generation.checks import no_choice, refuse

LONGEST_MATCH = 3  # tokens of the text's end that are looked for earlier on


def find_draft(ids, length):
    """At most `length` ids, perhaps none, that followed an earlier match of the last n-gram of ids [L].

    The largest n with a match counts, and of its matches the latest that `length` ids follow, else the first.
    """
    for n in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        windows = ids[:-1].unfold(0, n, 1)  # [L - n, n], each with a successor
        after = (windows == ids[-n:]).all(-1).nonzero()[:, 0] + n
        if len(after):
            with_enough = after[after + length <= len(ids)]
            first = int(with_enough[-1] if len(with_enough) else after[0])
            return ids[first : first + length]
    return ids[:0]


def decode_with_lookup(logits, run, cache, prompt, *, budget, draft_length, processors, stops, emit):
    """Greedy decoding's tokens: ids [at most budget].

    logits [1, V] of the prompt's last position; run(ids [T]) -> logits [T, V] extends the cache; emit(ids [1]) is
    called with each token.
    """
    cache.one_query_at_a_time = True  # on a CPU each new token then gets the bits that it gets alone
    start = len(prompt)
    ids = torch.cat((prompt, prompt.new_empty(budget)))
    end = start

    def say(scores):
        nonlocal end
        for process in processors:
            scores = process(ids[None, :end], scores)
        if no_choice(scores)[0]:
            refuse(0, end - start)
        ids[end] = scores[0].argmax()
        end += 1
        emit(ids[end - 1 : end])
        return end == start + budget or bool(stops(ids[None, :end]))

    is_over = say(logits)
    while not is_over:
        room = min(start + budget - end, cache.n_positions - end)
        draft = find_draft(ids[:end], min(draft_length, room))
        first = end
        logits = run(torch.cat((ids[first - 1 : first], draft)))  # [1 + drafted, V]
        for i in range(len(logits)):
            is_over = say(logits[i : i + 1])
            if is_over or i == len(draft) or ids[end - 1] != draft[i]:
                break
        cache.crop(end - 1)  # what was drafted in vain
    cache.one_query_at_a_time = False
    return ids[start:end]
