"""generate() says, token for token, what transformers' says, and its samples follow the distribution."""

import pytest
import torch
from optional import transformers
from peers import TALKATIVE, pair, spread, tiny_config

from model import GPT2, GPT2Config
from model.generation.checks import ScoreCheck

PROMPT = torch.tensor([[5, 17, 5, 80, 17, 5, 17], [9, 2, 33, 9, 2, 44, 9]])


@pytest.fixture(scope="module")
def models():
    """(ours, theirs), tiny, with weights that make neither a constant nor a uniform text."""
    return pair(attn="sdpa", theirs="sdpa", std=TALKATIVE)


def theirs_say(theirs, ids, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": mask, **options}
    return theirs.generate(ids, **options)


GREEDY = {
    "plain": {},
    "default length": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 15},
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition bonus": {"repetition_penalty": 0.6},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "no repeated word": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 10},
    "min_length": {"min_length": 16},
    "several eos": {"eos_token_id": [0, 17, 63, 5]},
    "all at once": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "eos_token_id": [3, 8]},
    "no cache": {"use_cache": False},
    "whole floats and none": {"max_new_tokens": 9.0, "repetition_penalty": None},
    "eos in a tensor": {"eos_token_id": torch.tensor([3, 8])},
    "suppressed": {"suppress_tokens": [5, 17, 33]},
    "biased": {"sequence_bias": {(17,): -3.0, (5, 80): 10.0, (9, 2, 44): -float("inf")}},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 7 + i + row) % 101 for i in range(9)]},
}


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_greedy_is_transformers(options, models):
    ours, theirs = models
    options = {"max_new_tokens": 24, "pad_token_id": 0, **options}
    if options["max_new_tokens"] is None:
        del options["max_new_tokens"]
    assert torch.equal(ours.generate(PROMPT, **options), theirs_say(theirs, PROMPT, **options))


def test_their_generation_config_is_taken(models):
    ours, theirs = models
    options = {"generation_config": transformers.GenerationConfig(max_new_tokens=9, repetition_penalty=1.4)}
    said = ours.generate(PROMPT, pad_token_id=0, **options)
    assert said.shape[1] <= PROMPT.shape[1] + 9
    assert torch.equal(said, theirs_say(theirs, PROMPT, **options))


def test_eos_ends_a_row_and_the_rest_is_padding(models):
    ours, theirs = models
    free = ours.generate(PROMPT, max_new_tokens=24, eos_token_id=[])
    assert len(set(free[:, 7:].flatten().tolist())) > 10  # they say something
    eos = [int(free[0, 17])]
    out = ours.generate(PROMPT, max_new_tokens=24, eos_token_id=eos, pad_token_id=7)
    assert torch.equal(out, theirs_say(theirs, PROMPT, max_new_tokens=24, eos_token_id=eos, pad_token_id=7))
    assert (out == 7).any()


def test_bad_words_are_transformers(models):
    ours, theirs = models
    said = ours.generate(PROMPT, max_new_tokens=12)[0].tolist()
    bad = [[said[7]], said[8:10], said[9:12], [0]]
    out = ours.generate(PROMPT, max_new_tokens=24, bad_words_ids=bad)
    assert torch.equal(out, theirs_say(theirs, PROMPT, max_new_tokens=24, bad_words_ids=bad))
    assert said[7] not in out[0, 7:]


def test_left_padding_is_transformers(models):
    ours, theirs = models
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    out = ours.generate(PROMPT * mask, attention_mask=mask, max_new_tokens=24, repetition_penalty=1.2)
    assert torch.equal(
        out, theirs_say(theirs, PROMPT * mask, attention_mask=mask, max_new_tokens=24, repetition_penalty=1.2)
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_new_tokens_start_at_the_width_that_came(side, options, models):
    """Regression: columns that every row padded were dropped, and out[:, ids.shape[1]:] lost tokens."""
    ours, theirs = models
    ids, mask = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    text = slice(3, 10) if side == "left" else slice(0, 7)
    ids[:, text], mask[:, text] = PROMPT, 1
    out = ours.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=[], pad_token_id=0, **options)
    plain = ours.generate(PROMPT, max_new_tokens=5, eos_token_id=[], pad_token_id=0, **options)
    assert torch.equal(out[:, 10:], plain[:, 7:])
    assert torch.equal(out[:, 3:10], PROMPT)
    assert not out[:, :3].any()
    if side == "left" and "prompt_lookup_num_tokens" not in options:
        their = theirs_say(theirs, ids, attention_mask=mask, max_new_tokens=5, eos_token_id=100, **options)
        assert torch.equal(out, their)


def test_a_pad_token_within_a_text_is_text(models):
    """Regression: "row 0 has a hole" for a tensor without a mask."""
    ours, _ = models
    options = {"max_new_tokens": 5, "eos_token_id": [], "pad_token_id": 0}
    inside = ours.generate(torch.tensor([[5, 0, 6]]), **options)
    assert torch.equal(inside, ours.generate([[5, 0, 6]], **options))
    both = ours.generate(torch.tensor([[0, 5, 0, 6]]), **options)
    assert torch.equal(both[:, 1:], inside)


METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


class TestNothingToChoose:
    """Regression: an id beyond the vocabulary, or 0, came back from NaN and from nothing but -inf."""

    @pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
    def test_nan_logits_are_refused(self, options):
        model = spread(GPT2(tiny_config(), attn_implementation="sdpa")).eval()
        with torch.no_grad():
            model.transformer.wte.weight[33] = torch.nan  # as text in the second row; as logits in each
        with pytest.raises(ValueError, match=r"generate: .*row 0 for new token 1.* NaN"):
            model.generate(PROMPT, **options)

    @pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
    def test_a_row_without_a_token_is_refused(self, options, models):
        def forbid(ids, scores):
            return torch.where((ids[:, 0] == 9)[:, None] & (ids.shape[1] == 9), -torch.inf, scores)

        with pytest.raises(ValueError, match=r"generate: .*row [01] .*new token 3"):
            models[0].generate(PROMPT[[0, 1]], logits_processor=[forbid], max_new_tokens=6, eos_token_id=[], **options)

    def test_a_row_that_has_ended_does_not_matter(self, models):
        ours, _ = models
        eos = [int(ours.generate(PROMPT, max_new_tokens=1, eos_token_id=[])[1, 7])]

        def forbid(ids, scores):
            return torch.where((ids[:, 0] == 9)[:, None] & (ids.shape[1] == 9), -torch.inf, scores)

        options = {"max_new_tokens": 6, "eos_token_id": eos}
        out = ours.generate(PROMPT, logits_processor=[forbid], **options)
        assert torch.equal(out, ours.generate(PROMPT, **options))

    def test_what_is_seen_between_two_looks_is_told(self):
        """As on a GPU, which is asked every few steps alone."""
        check = ScoreCheck(2, "cpu", is_sampling=False)
        going = torch.tensor([True, True])
        check.see(torch.zeros(2, 5), 0, going)
        check.see(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), 1, going)
        check.see(torch.full((2, 2), -torch.inf), 2, going)
        with pytest.raises(ValueError, match="the scores of row 0 for new token 3 are NaN or all -inf"):
            check.ask()
        check.failed_at[0] = -1
        with pytest.raises(ValueError, match="the scores of row 1 for new token 2 are NaN or all -inf"):
            check.ask()


BEAMS = {
    "plain": {},
    "all of them": {"num_return_sequences": 4},
    "long preferred": {"length_penalty": 2.0, "num_return_sequences": 2},
    "short preferred": {"length_penalty": -1.0, "num_return_sequences": 2},
    "early stopping": {"early_stopping": True, "num_return_sequences": 3},
    "never early": {"early_stopping": "never", "length_penalty": 0.5, "num_return_sequences": 3},
    "never early, no penalty": {"early_stopping": "never", "length_penalty": 0.0},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 7 + i + row) % 101 for i in range(9)]},
    "renormalized": {"renormalize_logits": True, "suppress_tokens": [5, 33]},
    "no eos": {"eos_token_id": 100_000},
}


@pytest.mark.parametrize("eos", [[17], [17, 3, 50, 61, 90, 5, 33, 44]], ids=["one-eos", "many-eos"])
@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_beam_search_is_transformers(options, eos, models):
    ours, theirs = models
    options = {"num_beams": 4, "max_new_tokens": 14, "eos_token_id": eos, "output_scores": True, **options}
    a = ours.generate(PROMPT, return_dict_in_generate=True, pad_token_id=0, **options)
    b = theirs_say(theirs, PROMPT, return_dict_in_generate=True, **options)
    # transformers reads its fill value as `pad or eos`, so that pad 0 counts as none.
    sequences = a.sequences.clone()
    assert a.sequences.shape == b.sequences.shape
    same = (sequences == b.sequences) | ((sequences == 0) & (b.sequences == options_first_eos(options)))
    assert same.all()
    torch.testing.assert_close(a.sequences_scores, b.sequences_scores)


def options_first_eos(options):
    eos = options["eos_token_id"]
    return eos[0] if isinstance(eos, list) else eos


DRAWN_BEAMS = {"do_sample": True, "num_beams": 3, "max_new_tokens": 12, "temperature": 1.3, "eos_token_id": [17]}


class TestBeamSampling:
    """num_beams > 1 with do_sample: each step's candidates are drawn without replacement."""

    def test_the_first_tokens_follow_the_exact_distribution(self, models):
        """Pairs of beams against their probabilities p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b): chi-square."""
        ours, _ = models
        n, k = 5000, 5
        with torch.no_grad():
            kept = (ours(PROMPT[:1]).logits[0, -1] / 0.4).topk(k)
        p = kept.values.softmax(-1)
        options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1, "top_k": k, "temperature": 0.4}
        out = ours.generate(PROMPT[:1].expand(n, -1), do_sample=True, seed=0, eos_token_id=[], **options)
        ranks = (out[:, -1, None] == kept.indices).nonzero()[:, 1].view(n, 2).sort(1).values
        counts = torch.bincount(ranks[:, 0] * k + ranks[:, 1], minlength=k * k).view(k, k)
        a, b = torch.triu_indices(k, k, 1)
        expected = n * p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))
        assert expected.sum().item() == pytest.approx(n)
        assert expected.min() > 5
        assert ((counts[a, b] - expected) ** 2 / expected).sum() < 45.1  # the 1 - 1e-6 quantile, 9 degrees of freedom

    @pytest.mark.parametrize("eos", [[17], [17, 3, 50]], ids=["one-eos", "many-eos"])
    def test_texts_are_distributed_as_transformers(self, eos, models):
        """4,000 texts of three tokens from each: the two-sample chi-square, at one in a million."""
        ours, theirs = models
        n = 4000
        options = {"num_beams": 2, "max_new_tokens": 3, "top_k": 5, "temperature": 0.8, "repetition_penalty": 1.3}
        options |= {"do_sample": True, "eos_token_id": eos, "length_penalty": 0.5, "pad_token_id": 100}
        ids = PROMPT[:1].expand(n, -1)
        torch.manual_seed(0)
        texts = torch.cat([ours.generate(ids, seed=0, **options), theirs_say(theirs, ids, **options)])
        distinct, which = texts.unique(dim=0, return_inverse=True)
        a, b = (torch.bincount(half, minlength=len(distinct)).double() for half in which.split(n))
        common = a + b >= 20
        assert common.sum() > 5  # several texts to compare by
        a, b = (torch.cat((x[common], x[~common].sum()[None])) for x in (a, b))  # the rare ones as one
        freedom = torch.tensor(len(a) - 1.0)
        quantile = freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)).sqrt()) ** 3  # Wilson and Hilferty
        assert ((a - b) ** 2 / (a + b).clamp(min=1)).sum() < quantile

    def test_a_rows_beams_depend_on_its_seed_alone(self, models):
        ours, _ = models
        together = ours.generate(PROMPT, seed=[3, 8], **DRAWN_BEAMS)
        assert torch.equal(ours.generate(PROMPT, seed=[3, 8], **DRAWN_BEAMS), together)
        assert torch.equal(ours.generate(PROMPT.flip(0), seed=[8, 3], **DRAWN_BEAMS), together.flip(0))
        for row, seed in ((0, 3), (1, 8)):
            alone = ours.generate(PROMPT[row : row + 1], seed=seed, **DRAWN_BEAMS)
            assert torch.equal(alone[0], together[row, : alone.shape[1]])
        assert not torch.equal(ours.generate(PROMPT, seed=[4, 9], **DRAWN_BEAMS), together)
        ragged = ours.generate([PROMPT[0], PROMPT[1, :3]], seed=[3, 8], **DRAWN_BEAMS)
        assert torch.equal(ragged[0, : together.shape[1]], together[0, : ragged.shape[1]])

    def test_cold_it_is_beam_search(self, models):
        ours, _ = models
        options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 14, "eos_token_id": [17, 3, 50]}
        cold = ours.generate(PROMPT, do_sample=True, temperature=1e-6, top_k=0, **options)
        assert torch.equal(cold, ours.generate(PROMPT, **options))

    @pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"min_p": 1.0, "top_k": 0}])
    def test_two_tokens_stay_so_that_one_need_not_end(self, options, models):
        ours, theirs = models
        options = {"do_sample": True, "num_beams": 2, "max_new_tokens": 1, "output_scores": True, **options}
        scores = theirs_say(theirs, PROMPT, return_dict_in_generate=True, **options).scores[0]
        said = ours.generate(PROMPT, num_return_sequences=2, **options)[:, -1].view(2, 2)
        for tokens, row in zip(said, scores[::2]):
            assert set(tokens.tolist()) == set(row.isfinite().nonzero()[:, 0].tolist())


WARPERS = {
    "default": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "typical_p": {"typical_p": 0.6, "top_k": 0},
    "none is off": {"top_k": None, "top_p": None, "temperature": None},
    "top_p of 0": {"top_p": 0.0},
    "renormalized": {"top_k": 9, "renormalize_logits": True},
    "all": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
def test_the_distribution_sampled_from_is_transformers(options, models):
    ours, theirs = models
    options = {
        "do_sample": True,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
        **options,
    }
    a, b = ours.generate(PROMPT, **options), theirs_say(theirs, PROMPT, **options)
    torch.testing.assert_close(a.scores[0], b.scores[0])
    assert a.scores[0].isinf().any() == b.scores[0].isinf().any()


def test_samples_follow_the_distribution(models):
    """20,000 draws of the next token against its probabilities: Pearson's chi-square, at one in a million."""
    ours, _ = models
    n, k = 20_000, 20
    options = {"do_sample": True, "max_new_tokens": 1, "top_k": k, "temperature": 2.0, "eos_token_id": []}
    with torch.no_grad():
        logits = ours(PROMPT[:1]).logits[0, -1] / 2.0
    kept = logits.topk(k)
    expected = kept.values.softmax(-1) * n
    out = ours.generate(PROMPT[:1], num_return_sequences=n, seed=0, **options)
    counts = torch.bincount(out[:, -1], minlength=101)[kept.indices]
    assert counts.sum() == n
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 72.4  # the 1 - 1e-6 quantile of chi-square with 19 degrees of freedom is 68.9


def test_never_draws_what_has_no_probability():
    from model.generation.sampling import draw

    scores = torch.full((1, 50257), -torch.inf)
    scores[0, 40_000] = 0.0
    largest = torch.tensor([1 - 2**-24], dtype=torch.float64)  # torch.rand's largest float32
    for u in (torch.zeros(1, dtype=torch.float64), largest):
        assert draw(scores, u).item() == 40_000
    assert draw(torch.zeros(1, 50257), largest).item() == 50256


SAMPLING = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20}


def test_a_rows_sample_depends_on_its_seed_alone(models):
    ours, _ = models
    together = ours.generate(PROMPT, seed=[3, 8], **SAMPLING)
    assert torch.equal(together[1:], ours.generate(PROMPT[1:], seed=8, **SAMPLING))
    assert torch.equal(together.flip(0), ours.generate(PROMPT.flip(0), seed=[8, 3], **SAMPLING))
    assert torch.equal(ours.generate(PROMPT, seed=3, **SAMPLING)[0], together[0])
    assert not torch.equal(together, ours.generate(PROMPT, seed=[4, 9], **SAMPLING))
    three = ours.generate(PROMPT, seed=[3, 8], num_return_sequences=3, **SAMPLING)
    assert torch.equal(three[::3], together)
    assert len({tuple(row.tolist()) for row in three}) == 6


def test_without_a_seed_torchs_own_decides(models):
    ours, _ = models
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(ours.generate(PROMPT, **SAMPLING))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_output_holds_the_scores_of_each_step(models):
    ours, theirs = models
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": 100}
    a, b = ours.generate(PROMPT, **options), theirs_say(theirs, PROMPT, **options)
    assert len(a.scores) == len(b.scores) == 6
    torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), rtol=0, atol=2e-4)
    assert a.forward_passes == 6
    assert a.past_key_values.lengths == [12, 12]
    with pytest.raises(KeyError):
        a["sequences_scores"]


def test_the_callers_processors_and_criteria_are_called_with_text_and_scores(models):
    ours, theirs = models

    class OnlyEven(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)

    class AtTwelve(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.full((len(ids),), ids.shape[1] >= 12)

    options = {"max_new_tokens": 24, "logits_processor": [OnlyEven()], "stopping_criteria": [AtTwelve()]}
    out = ours.generate(PROMPT, **options)
    assert torch.equal(out, theirs_say(theirs, PROMPT, **options))
    assert out.shape[1] == 12
    assert (out[:, 7:] % 2 == 0).all()


class Letters:
    """A tokenizer of 101 characters, one a token."""

    def decode(self, ids, **_):
        return "".join(chr(0x100 + i) for i in ids)


def test_stop_strings_end_a_text(models):
    ours, _ = models
    free = ours.generate(PROMPT[:1], max_new_tokens=20, eos_token_id=[])
    text = Letters().decode(free[0].tolist())
    stop = text[10:13]
    out = ours.generate(PROMPT[:1], max_new_tokens=20, eos_token_id=[], stop_strings=stop, tokenizer=Letters())
    said = Letters().decode(out[0].tolist())
    assert text.startswith(said)
    assert said.endswith(stop)
    assert stop not in said[7:-1]
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        ours.generate(PROMPT, stop_strings="x")


def test_starts_from_bos_without_a_prompt(models):
    ours, _ = models
    assert torch.equal(ours.generate(max_new_tokens=5), ours.generate([[0]], max_new_tokens=5))


class TestLength:
    def test_the_last_position_is_used_and_none_beyond(self, models):
        ours, _ = models
        out = ours.generate(PROMPT, max_new_tokens=58, eos_token_id=[])  # the 65th token is said, not fed
        assert out.shape == (2, 65)
        message = r"a prompt of 7 tokens and 59 new ones need 65 positions; n_positions is 64\. sliding_window=True"
        with pytest.raises(ValueError, match=message):
            ours.generate(PROMPT, max_new_tokens=59)

    def test_rows_whose_budget_ends_do_not_outgrow_the_positions(self, models):
        ours, _ = models
        long = torch.arange(60).tolist()
        out = ours.generate([long, [5]], max_length=64, eos_token_id=[], pad_token_id=100)
        alone = [ours.generate([row], max_length=64, eos_token_id=[]) for row in (long, [5])]
        assert torch.equal(out[0, :64], alone[0][0])
        assert (out[0, 64:] == 100).all()
        assert torch.equal(out[1, 59:], alone[1][0])

    def test_a_sliding_window_continues_with_the_newer_half(self, models):
        ours, _ = models
        out = ours.generate(PROMPT, max_new_tokens=120, sliding_window=True, eos_token_id=[])
        assert torch.equal(out[:, :65], ours.generate(PROMPT, max_new_tokens=58, eos_token_id=[]))
        for row in out:
            context, start = row[:7].tolist(), 0
            for t in range(7, 127):
                if t - 1 - start == 64:  # full: 64 held and one more to feed
                    start = t - 1 - 32
                with torch.no_grad():
                    expected = ours(row[None, start:t]).logits[0, -1].argmax()
                assert row[t] == expected
                context.append(int(row[t]))
        long = torch.arange(90)[None]
        assert ours.generate(long, max_new_tokens=5, sliding_window=True, eos_token_id=[]).shape == (1, 95)


class TestGenerationConfig:
    """generation_config.json is read, obeyed and saved; arguments go before it."""

    VALUES = (("eos_token_id", [3, 8]), ("num_beams", 3), ("max_new_tokens", 9), ("repetition_penalty", 1.3))

    def test_is_transformers_both_ways(self, models, tmp_path):
        _, theirs = models
        theirs.save_pretrained(tmp_path)
        transformers.GenerationConfig(**dict(self.VALUES), pad_token_id=0).save_pretrained(tmp_path)
        loaded = GPT2.from_pretrained(tmp_path, attn_implementation="sdpa")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        expected = theirs_say(again, PROMPT)
        out = loaded.generate(PROMPT, pad_token_id=3)  # transformers fills beams with eos where pad is 0
        assert torch.equal(out, expected)
        loaded.generation_config.num_beams = 2
        loaded.save_pretrained(tmp_path / "ours")
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "ours").num_beams == 2
        assert GPT2.from_pretrained(tmp_path / "ours").generation_config == loaded.generation_config

    def test_arguments_go_first_and_the_config_is_live(self, models):
        model = GPT2(tiny_config(), attn_implementation="sdpa").eval()
        model.load_state_dict(models[0].state_dict())
        model.generation_config.max_new_tokens = 4
        model.config.eos_token_id = None
        assert model.generate(PROMPT).shape == (2, 11)
        assert model.generate(PROMPT, max_new_tokens=6).shape == (2, 13)
        assert model.generate(inputs=PROMPT, max_length=9).shape == (2, 9)
        assert model.generate(PROMPT, generation_config={"max_new_tokens": 2}).shape == (2, 9)
        assert model.generate(PROMPT, max_time=1e-9).shape == (2, 8)

    def test_what_it_cannot_do_is_named(self, models):
        with pytest.raises(ValueError, match=r"generation_config\.penalty_alpha is 0\.6; generate\(\) has no"):
            models[0].generate(PROMPT, generation_config={"penalty_alpha": 0.6})
        with pytest.raises(TypeError, match="generation_config is int; a GenerationConfig or a dict"):
            models[0].generate(PROMPT, generation_config=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_words_ids": [[]]}, "bad_words_ids has an empty word"),
        ({"bad_words_ids": [5, 6]}, "bad_words_ids is .* a list of words"),
        ({"bad_words_ids": [[101]]}, "bad_words_ids names token 101; the vocabulary has 0 to 100"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias has an empty sequence"),
        ({"temperature": 0}, r"temperature is 0\.0; it must be greater than 0; do_sample=False is greedy"),
        ({"top_k": -1}, "top_k is -1; it must be an integer, 0 for all tokens"),
        ({"top_p": 1.5}, r"top_p is 1.5; it must be in \[0, 1\]"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be positive"),
        ({"max_length": 7}, "a prompt has 7 tokens; max_length is 7"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2 and num_beams 1; there is one sequence for each beam"),
        ({"num_return_sequences": 3, "num_beams": 2, "do_sample": True}, "is 3 and num_beams 2; .* only by sampling"),
        ({"pad_token_id": 101}, "pad_token_id is 101; the vocabulary has 0 to 100"),
        ({"pad_token_id": -1}, "pad_token_id is -1; the vocabulary has 0 to 100"),
        ({"seed": [1, 2, 3], "do_sample": True}, "seed holds 3 numbers for 2 rows"),
        ({"attention_mask": torch.tensor([[1] * 7, [1, 0, 1, 1, 1, 1, 1]])}, "row 1 has a hole"),
        ({"attention_mask": torch.tensor([[1] * 7, [0] * 7])}, "a prompt is empty"),
        ({"streamer": object()}, "a streamer takes one row"),
        ({"prompt_lookup_num_tokens": 4, "do_sample": True}, "prompt_lookup_num_tokens is for greedy decoding"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refuses_wrong_arguments(options, message, models):
    with pytest.raises(ValueError, match=message):
        models[0].generate(PROMPT, **options)


def test_refuses_wrong_prompts_and_names(models):
    ours, _ = models
    with pytest.raises(TypeError, match="generate: got an unexpected keyword argument 'max_tokens'"):
        ours.generate(PROMPT, max_tokens=3)
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\]"):
        ours.generate(PROMPT[0])
    with pytest.raises(ValueError, match="a prompt is empty"):
        ours.generate([[1], []])
    with pytest.raises(ValueError, match="a list of prompts has no padding"):
        ours.generate([[1]], attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="no bos_token_id to start from"):
        spread(GPT2(tiny_config(bos_token_id=None))).generate()
    with pytest.raises(ValueError, match="input_ids range"):
        ours.generate([[101]])


@pytest.fixture(scope="module")
def repetitive():
    """A model that falls into a loop of several words: position embeddings would keep it out of one."""
    model = spread(GPT2(tiny_config(n_positions=256)), TALKATIVE)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    return model.eval()


class TestLookup:
    """Drafts from the text's own repetitions: the same tokens from fewer forward passes."""

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_gives_the_tokens_of_greedy_decoding_from_fewer_passes(self, backend, repetitive):
        repetitive.set_attn_implementation(backend)
        options = {"max_new_tokens": 150, "eos_token_id": [], "return_dict_in_generate": True}
        plain = repetitive.generate(PROMPT[:1], **options)
        fast = repetitive.generate(PROMPT[:1], prompt_lookup_num_tokens=10, **options)
        assert torch.equal(plain.sequences, fast.sequences)
        assert plain.forward_passes == 150
        assert fast.forward_passes < 60

    @pytest.mark.parametrize(
        "options", [{"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 4}, {"eos_token_id": [17, 5]}]
    )
    def test_obeys_processors_and_eos(self, options, models):
        ours, _ = models
        plain = ours.generate(PROMPT[:1], max_new_tokens=40, **options)
        assert torch.equal(plain, ours.generate(PROMPT[:1], max_new_tokens=40, prompt_lookup_num_tokens=5, **options))

    def test_several_rows_go_as_each_does_alone(self, models):
        ours, _ = models
        prompts = [PROMPT[0], PROMPT[1, :4], PROMPT[1]]
        options = {"max_new_tokens": 30, "eos_token_id": [17, 5], "pad_token_id": 100}
        plain = ours.generate(prompts, **options)
        assert torch.equal(plain, ours.generate(prompts, prompt_lookup_num_tokens=5, **options))
        counted = {"prompt_lookup_num_tokens": 5, "return_dict_in_generate": True, **options}
        together = ours.generate(prompts, **counted)
        alone = [ours.generate(prompt[None], **counted) for prompt in prompts]
        assert together.forward_passes == sum(out.forward_passes for out in alone)
        assert together.past_key_values is None

    def test_fills_the_last_position(self, models):
        ours, _ = models
        plain = ours.generate(PROMPT[:1], max_new_tokens=58, eos_token_id=[])
        fast = ours.generate(PROMPT[:1], max_new_tokens=58, eos_token_id=[], prompt_lookup_num_tokens=20)
        assert torch.equal(plain, fast)


def test_a_config_that_asks_for_tuples_does_not_concern_generate(models):
    """Regression: AttributeError: 'tuple' object has no attribute 'last_hidden_state'."""
    ours = GPT2(tiny_config(return_dict=False), attn_implementation="sdpa").eval()
    ours.load_state_dict(models[0].state_dict())
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=5), models[0].generate(PROMPT, max_new_tokens=5))


def test_config_governs_eos(models):
    ours = spread(GPT2(tiny_config(eos_token_id=[3, 4]))).eval()
    out = ours.generate(PROMPT, max_new_tokens=30)
    assert torch.equal(out, ours.generate(PROMPT, max_new_tokens=30, eos_token_id=[3, 4]))
    assert GPT2Config().eos_token_id == 50256
