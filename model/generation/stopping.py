"""Stopping criteria: EOS tokens, stop strings, the caller's own, the clock."""

import time

import torch

from model.config import brief


class Stops:
    """Whether rows of ids end: with an EOS token, a stop string, by the caller's criteria, after max_time seconds."""

    def __init__(self, eos, strings=None, tokenizer=None, criteria=None, max_time=None):
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.eos = eos
        self.strings = [strings] if isinstance(strings, str) else [] if strings is None else strings
        if not isinstance(self.strings, list | tuple) or not all(isinstance(s, str) and s for s in self.strings):
            raise TypeError(f"generate: stop_strings is {brief(strings)}; it must be a string, or a list of them")
        self.tokenizer = tokenizer
        self.criteria = list(criteria or ())
        if self.strings and tokenizer is None:
            raise ValueError(
                "generate: stop_strings need the tokenizer that the ids are from: generate(..., tokenizer=)"
            )

    def __call__(self, ids, scores=None):
        """ids [R, L], without padding -> bool [R]."""
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for token in self.eos:
            ended |= ids[:, -1] == token
        if self.strings:
            ended |= torch.tensor([self._ends_in_string(row) for row in ids.tolist()], device=ids.device)
        for criterion in self.criteria:
            ended |= torch.as_tensor(criterion(ids, scores), device=ids.device)
        if self.deadline is not None and time.monotonic() > self.deadline:
            ended.fill_(True)
        return ended

    @property
    def needs_rows(self):
        return bool(self.strings or self.criteria)

    def _ends_in_string(self, ids):
        """Whether the last token completed a stop string."""
        longest = max(len(string.encode()) for string in self.strings)
        tail = ids[-longest - 1 :]  # a token is a byte at least
        now, before = self.tokenizer.decode(tail), self.tokenizer.decode(tail[:-1])
        return any(now.rfind(string) > before.rfind(string) for string in self.strings)
