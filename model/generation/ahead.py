"""Greedy decoding by the captured step itself: it chooses each next id, and the host looks at several at once.

That is where nothing but the logits decides, and nobody wants to see them. A token is then one replay; ends, budgets
and what fills a row behind its end are seen to for all tokens of a look together.
"""

import torch


class Rows:
    """The rows of a call: ids [R, L], of which new tokens begin at `width`; how many each may have, and has."""

    def __init__(self, ids, width, budgets, fill):
        self.ids, self.width, self.budgets, self.fill = ids, width, budgets, fill
        self.is_going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.new_tokens = torch.zeros(len(ids), dtype=torch.long, device=ids.device)

    def take(self, new, step, eos, check):
        """Takes new [R, n], new tokens `step` and the next ones of their rows; -1 is what could not be chosen."""
        n = new.shape[1]
        ended = self.budgets[:, None] <= step + 1 + torch.arange(n, device=new.device)
        for token in eos:
            ended |= new == token
        over = (ended.cumsum(1) > ended) | ~self.is_going[:, None]  # behind the row's end
        check.note((new < 0) & ~over, step)
        column = self.width + step
        self.ids[:, column : column + n] = new.masked_fill(over, self.fill)
        self.new_tokens += n - over.sum(1)
        self.is_going &= ~ended.any(1)


def serves(run):
    """Whether this call of generate() may leave the choice of ids to the captured step, processors aside."""
    settings, stops = run.settings, run.stops
    return not (
        run.graphed is None
        or settings.do_sample
        or settings.output_scores
        or settings.output_logits
        or stops.needs_rows
        or stops.deadline is not None
    )


def go_on(run, rows, step, steps, every, check):
    """New tokens from `step` on, as far as the captured step goes; the device is asked after each `every` of them.

    rows: `Rows`. check: a ScoreCheck. Returns (how many new tokens there are, whether that is all: no row goes on).
    """
    while step < steps:
        column = rows.width + step
        said = run.graphed.say(rows.ids[:, column - 1 : column], run.cache, min(every - step % every, steps - step))
        if said is None:
            return step, False
        new, logits = said
        n = new.shape[1]
        run.forward_passes += n
        rows.take(new, step, run.stops.eos, check)
        has_failed, is_going = torch.stack(((check.failed_at >= 0).any(), rows.is_going.any())).tolist()
        if has_failed:
            check.ask(logits if n == 1 else None)
        if run.streamer is not None:
            run.stream(rows.ids[:, column])
        step += n
        if not is_going:
            break
    return step, True
