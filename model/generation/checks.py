"""Whether there is a token to choose: of NaN and of nothing but -inf, argmax and sampling would make some id."""

import torch

CAUSES = "the model's logits, or what processors and the settings leave of them"


class ScoreCheck:
    """Watches the scores of each step of R rows; on a GPU what it saw waits there until it is asked."""

    def __init__(self, R, device, is_sampling):
        self.is_sampling = is_sampling
        self.failed_at = torch.full((R,), -1, device=device)  # the new token that could not be chosen

    def see(self, scores, step, is_going):
        """scores [R, V] for new token `step`; is_going [R]: rows that have not ended."""
        failed = no_choice(scores, self.is_sampling) & is_going & (self.failed_at < 0)
        self.failed_at = self.failed_at.masked_fill(failed, step)

    def note(self, failed, step):
        """failed [R, n]: which of new tokens `step` and the next ones could not be chosen."""
        first = step + failed.int().argmax(1)
        self.failed_at = torch.where(failed.any(1) & (self.failed_at < 0), first, self.failed_at)

    def ask(self, logits=None):
        """Raises ValueError where a row had nothing to choose from; logits [R, V], of the last step, tell why."""
        if (self.failed_at >= 0).any():
            row = int((self.failed_at >= 0).int().argmax())
            refuse(row, int(self.failed_at[row]), None if logits is None else logits[row])


def no_choice(scores, is_sampling=False):
    """Which rows of scores [R, V] offer no token: their largest is NaN or -inf or, for a distribution, inf."""
    largest = scores.amax(-1)
    return ~largest.isfinite() if is_sampling else ~(largest > -torch.inf)


def refuse(row, step, logits=None):
    """Raises ValueError; logits [V] of the row, where they are at hand, tell whose fault it is."""
    what = f"the scores of row {row} for new token {step + 1} are NaN or all -inf; they come from {CAUSES}"
    if logits is not None and logits.isnan().any():
        what = f"the logits of row {row} for new token {step + 1} hold NaN: look at the weights and at the dtype"
    elif logits is not None and logits.amax().isfinite():
        what = f"row {row} has no token left for new token {step + 1}: processors and settings have forbidden them all"
    elif logits is not None:
        what = f"the logits of row {row} for new token {step + 1} are infinite: look at the weights and at the dtype"
    raise ValueError(f"generate: {what}")
