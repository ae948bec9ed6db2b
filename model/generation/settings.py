"""The settings of generate(), checked."""

from dataclasses import dataclass, field


@dataclass
class Settings:
    """What generate() takes beside the prompts; see there."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list = field(default_factory=list)
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    prompt_lookup_num_tokens: int = 0
    sliding_window: bool = False
    use_cache: bool = True
    cuda_graph: bool = True

    def __post_init__(self):
        for name, is_right, required in (
            ("max_length", self.max_length is None or self.max_length > 0, "positive"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "positive"),
            ("temperature", self.temperature > 0, "greater than 0; do_sample=False is greedy"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer, 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
        ):
            if not is_right:
                raise ValueError(f"generate: {name} is {getattr(self, name)!r}; it must be {required}")
        draws_rows = self.do_sample and self.num_beams == 1
        if self.num_return_sequences > self.num_beams and not draws_rows:
            raise ValueError(
                f"generate: num_return_sequences is {self.num_return_sequences} and num_beams {self.num_beams}; there "
                "is one sequence for each beam, and more of them only by sampling with num_beams=1"
            )

    def new_tokens(self, prompt_length, n_positions):
        """How many tokens a prompt may be continued by. Raises ValueError where there are not enough positions."""
        if self.max_new_tokens is not None:
            new = self.max_new_tokens
        elif self.max_length is not None:
            new = self.max_length - prompt_length
            if new < 1:
                raise ValueError(f"generate: a prompt has {prompt_length} tokens; max_length is {self.max_length}")
        else:
            new = max(1, min(20, n_positions - prompt_length))  # Hugging Face's default
        needed = prompt_length + new - 1  # the last token is not fed back
        if needed > n_positions and not self.sliding_window:
            raise ValueError(
                f"generate: a prompt of {prompt_length} tokens and {new} new ones need {needed} positions; n_positions "
                f"is {n_positions}. sliding_window=True drops the oldest tokens"
            )
        return new
