"""Three continuations of a text, told as they are generated; who asks meanwhile waits for their turn.

One thread generates, so that a model and its CUDA graphs are used by one request at a time, in the order of asking.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterable
from typing import Any

import torch

from model.gpt2 import GPT2

ROWS = 3
TOP_K = 50
LONGEST = 200  # tokens of one continuation
MOST_WAITING = 16


class Busy(Exception):
    """As many wait as may wait."""


@dataclasses.dataclass(frozen=True)
class Request:
    """text: what stands before the cursor. length: tokens of each continuation. seed: the same one, the same texts."""

    text: str
    model: str
    temperature: float
    length: int
    seed: int


class Speaker:
    """A model with its tokenizer (tokenizer.GPT2Tokenizer)."""

    def __init__(self, model: GPT2, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.longest = min(LONGEST, model.config.n_positions // 2)

    def prompt(self, text: str, length: int) -> tuple[list[int], int]:
        """(the ids that the model reads, how many before them it does not): with `length` more they fit its context.

        Half a surrogate pair, which a browser can send and UTF-8 cannot hold, is read as U+FFFD, as browsers do.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.tokenizer.encode(text, disallowed_special=())
        if not ids:
            bos = self.model.config.bos_token_id
            if bos is None:
                raise ValueError("there is no text, and the model has no token that begins one; write some")
            return [bos], 0
        left_out = max(0, len(ids) - (self.model.config.n_positions - length))
        return ids[left_out:], left_out

    def continue_text(self, request: Request, job: "Job") -> None:
        """Tells the job {"read", "left_out"}, then {"row", "text"} as they come; returns early where it is cancelled.

        GPT-2's words begin with their space. Where the text ends in one the model reads it without, and the space is
        taken off a continuation that begins with another.
        """
        ends_in_space = request.text.endswith(" ") and not request.text.isspace()
        ids, left_out = self.prompt(request.text[:-1] if ends_in_space else request.text, request.length)
        job.tell({"read": len(ids), "left_out": left_out})
        eos = self.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list | tuple) else [eos])
        streams = [self.tokenizer.stream_decoder() for _ in range(ROWS)]
        is_going, is_first = [True] * ROWS, [ends_in_space] * ROWS

        def say(row: int, text: str) -> None:
            if text and is_first[row]:
                text, is_first[row] = text.removeprefix(" "), False
            if text:
                job.tell({"row": row, "text": text})

        def tell(rows: torch.Tensor, scores: object) -> torch.Tensor:
            """A stopping criterion: rows [3, L] after each step; it ends all once the job is cancelled."""
            for row, token in enumerate(rows[:, -1].tolist()):
                is_going[row] = is_going[row] and token not in ends
                if is_going[row]:
                    say(row, streams[row].push(token))
            return torch.full((ROWS,), job.is_cancelled)

        self.model.generate(
            [ids],
            max_new_tokens=request.length,
            do_sample=True,
            temperature=request.temperature,
            top_k=TOP_K,
            seed=request.seed,
            num_beams=1,  # whatever the checkpoint's generation_config says
            num_return_sequences=ROWS,
            prompt_lookup_num_tokens=0,
            stopping_criteria=[tell],
        )
        for row in range(ROWS):
            say(row, streams[row].finish())


class Job:
    """One request on its way: what it is told comes out of `next`, the last of it with "end" or "error"."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._told: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def tell(self, event: dict) -> None:
        self._told.put(event)

    def next(self, timeout: float) -> dict | None:
        """The next event, or None where none came within `timeout` seconds."""
        try:
            return self._told.get(timeout=timeout)
        except queue.Empty:
            return None

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class Writer:
    """The queue and the thread that works it off. speakers: {name: Speaker}, the first of which is the default."""

    def __init__(self, speakers: dict[str, Speaker]) -> None:
        self.speakers = speakers
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Job:
        """The job of a request, which is told how many are before it, {"before"}. Raises Busy."""
        job = Job(request)
        with self._changed:
            self._drop_cancelled()
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} others wait; try again in a moment")
            self._waiting.append(job)
            self._tell_places([job])
            self._changed.notify_all()
        return job

    def close(self) -> None:
        """Ends the thread, and what it generates."""
        with self._changed:
            self._is_closed = True
            for job in [*self._waiting, *([self._current] if self._current else [])]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.is_cancelled]

    def _tell_places(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.tell({"before": self._waiting.index(job) + (self._current is not None)})

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._drop_cancelled()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._current = self._waiting.pop(0)
                self._tell_places(self._waiting)
            if job.is_cancelled:
                continue
            try:
                self.speakers[job.request.model].continue_text(job.request, job)
                job.tell({"end": "cancelled" if job.is_cancelled else "done"})
            except Exception as error:  # whatever it is, who asked hears of it and the next one has their turn
                job.tell({"error": str(error).partition("\n")[0] or type(error).__name__})
