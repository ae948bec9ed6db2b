"""What generate() may begin with beside ids, and what it tells of each step: embeddings, positions, a cache; attentions
and hidden states. transformers decides."""

import pytest
import torch
from peers import TALKATIVE, pair
from test_generation import PROMPT, theirs_say

from model.cache import KVCache

LEFT = torch.tensor([[0, 0, 5, 80, 17, 5, 17], [9, 2, 33, 9, 2, 44, 9]])
MASK = (torch.arange(7) >= torch.tensor([[2], [0]])).long()
NEW = {"max_new_tokens": 11, "pad_token_id": 0}
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "several beams": {"num_beams": 3, "num_return_sequences": 2}}


@pytest.fixture(scope="module")
def models():
    return pair(attn="sdpa", theirs="eager", std=TALKATIVE)


@pytest.mark.parametrize("options", [*WAYS.values(), {"min_new_tokens": 9, "repetition_penalty": 1.4}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "with ids"])
def test_embeddings_are_continued_as_transformers_does(models, options, with_ids):
    ours, theirs = models
    embeds = ours.transformer.wte(PROMPT).detach() * 1.1
    given = {"inputs_embeds": embeds, **({"input_ids": PROMPT} if with_ids else {})}
    expected = theirs.generate(**given, attention_mask=torch.ones_like(PROMPT), do_sample=False, **NEW, **options)
    said = ours.generate(**given, **NEW, **options)
    assert said.shape[1] > 7 * with_ids + 5
    assert torch.equal(said, expected)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_embeddings_of_ids_say_what_the_ids_say(models, options):
    """Padded rows too, where each row is the text that it is alone."""
    ours, _ = models
    embeds = ours.transformer.wte(LEFT).detach()
    ids = ours.generate(LEFT, MASK, **NEW, **options)
    assert torch.equal(ours.generate(inputs_embeds=embeds, attention_mask=MASK, **NEW, **options), ids[:, 7:])


def test_max_length_counts_embeddings(models):
    ours, theirs = models
    embeds = ours.transformer.wte(PROMPT).detach()
    options = {"inputs_embeds": embeds, "max_length": 12, "pad_token_id": 0}
    assert torch.equal(ours.generate(**options), theirs.generate(attention_mask=torch.ones_like(PROMPT), **options))


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("positions", [torch.arange(3, 10)[None], PROMPT % 5 + 2 * torch.arange(7)], ids=["1", "B"])
def test_positions_count_on(models, options, positions):
    ours, theirs = models
    given = {"position_ids": positions.expand(2, -1).contiguous()}
    expected = theirs_say(theirs, PROMPT, **NEW, **options, **given)
    assert torch.equal(ours.generate(PROMPT, position_ids=positions, **NEW, **options), expected)
    assert not torch.equal(ours.generate(PROMPT, **NEW, **options), expected)


def test_positions_of_padded_rows(models):
    """What transformers computes from the mask by itself says the same as nothing given, row by row."""
    ours, _ = models
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    plain = ours.generate(LEFT, MASK, **NEW)
    assert torch.equal(ours.generate(LEFT, MASK, position_ids=positions, **NEW), plain)
    moved = ours.generate(LEFT, MASK, position_ids=positions + 4, **NEW)
    for row, start in enumerate((2, 0)):
        alone = {"position_ids": positions[row : row + 1, start:] + 4}
        assert torch.equal(moved[row : row + 1, start:], ours.generate(LEFT[row : row + 1, start:], **alone, **NEW))


def filled(ours, ids, mask=None):
    with torch.no_grad():
        return ours(ids, attention_mask=mask, use_cache=True).past_key_values


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_cache_is_continued(models, options):
    ours, theirs = models
    expected = theirs_say(theirs, PROMPT, **NEW, **options)
    cache = filled(ours, PROMPT[:, :4])
    run = {"past_key_values": cache, "return_dict_in_generate": True}
    out = ours.generate(PROMPT, **run, **NEW, **options)
    assert torch.equal(out.sequences, expected)
    is_greedy = not options
    assert cache.lengths == ([out.sequences.shape[1] - 1] * 2 if is_greedy else [4, 4])
    assert cache.batch_size == 2


def test_a_conversation_goes_on_with_one_cache(models):
    """The usual loop: each turn gives the whole text, and the model reads what is new. Rows of unlike lengths."""
    ours, _ = models
    cache, rows = KVCache(ours.config, 2, dtype=ours.dtype), [[5, 17, 5], [9]]
    for turn in range(3):
        plain = ours.generate(rows, max_new_tokens=3, eos_token_id=[])
        said = ours.generate(rows, past_key_values=cache, max_new_tokens=3, eos_token_id=[])
        assert torch.equal(said, plain)
        rows = [said[0].tolist() + [turn], said[1, -len(rows[1]) - 3 :].tolist() + [40, turn]]
        assert cache.lengths == [len(rows[0]) - 2, len(rows[1]) - 3]


def test_a_cache_with_padding_on_the_left_is_continued(models):
    """As the ordinary loop does: the padding keeps its slots, and positions count them."""
    ours, _ = models
    cache, ids = filled(ours, LEFT, MASK), LEFT
    token = ours(LEFT, attention_mask=MASK).logits[:, -1:].argmax(-1)
    ids = torch.cat((LEFT, token), 1)
    mask = torch.cat((MASK, torch.ones(2, 1).long()), 1)
    said = ours.generate(ids, mask, past_key_values=cache, max_new_tokens=5, eos_token_id=[])
    by_hand = filled(ours, LEFT, MASK)
    with torch.no_grad():
        for _ in range(5):
            token = ours(ids[:, -1:], past_key_values=by_hand).logits.argmax(-1)
            ids = torch.cat((ids, token), 1)
    assert torch.equal(said, ids)


def test_the_layers_of_their_cache_are_continued(models):
    ours, theirs = models
    with torch.no_grad():
        held = theirs(PROMPT[:, :4], use_cache=True).past_key_values
    layers = tuple((layer.keys, layer.values) for layer in held.layers)
    assert torch.equal(ours.generate(PROMPT, past_key_values=layers, **NEW), theirs_say(theirs, PROMPT, **NEW))


KINDS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 3, "num_return_sequences": 3, "min_new_tokens": 4},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_what_each_step_tells_is_transformers(options):
    ours, theirs = pair(attn="eager", theirs="eager", std=TALKATIVE)
    wanted = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
    options = {**NEW, **options, **wanted, "return_dict_in_generate": True}
    a, b = ours.generate(PROMPT, **options), theirs_say(theirs, PROMPT, **options)
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "logits"):
        assert len(a[name]) == len(b[name]) > 3
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a[name], b[name]))
    for name in ("attentions", "hidden_states"):
        assert [[x.shape for x in step] for step in a[name]] == [[x.shape for x in step] for step in b[name]]
        assert all(torch.allclose(x, y, atol=1e-4) for p, q in zip(a[name], b[name]) for x, y in zip(p, q))


def test_several_samples_of_a_row_have_a_row_each(models):
    ours, _ = models
    options = {"do_sample": True, "num_return_sequences": 3, "seed": 3, "output_hidden_states": True}
    out = ours.generate(PROMPT, return_dict_in_generate=True, **NEW, **options)
    assert {len(x) for step in out.hidden_states for x in step} == {6}
    first = ours(PROMPT, output_hidden_states=True).hidden_states
    for x, y in zip(out.hidden_states[0], first):
        assert torch.allclose(x, y.repeat_interleave(3, 0), atol=1e-5)


def wrong(name, error, words, **arguments):
    return pytest.param(arguments, error, words, id=name)


EMBEDS = torch.zeros(2, 7, 48)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        wrong("rank", ValueError, r"inputs_embeds must be \[B, T, n_embd = 48\]", inputs_embeds=torch.zeros(7, 48)),
        wrong("width", ValueError, r"n_embd = 48", inputs_embeds=torch.zeros(1, 7, 47)),
        wrong("ids as embeddings", TypeError, "inputs_embeds is torch.int64", inputs_embeds=PROMPT),
        wrong("empty", ValueError, "a row of inputs_embeds is empty", inputs_embeds=torch.zeros(1, 0, 48)),
        wrong("rows", ValueError, "3 rows and inputs_embeds 2", input_ids=[[1]] * 3, inputs_embeds=EMBEDS),
        wrong("mask", ValueError, "its shape", inputs_embeds=EMBEDS, attention_mask=torch.ones(2, 6)),
        wrong(
            "embeddings and lookup",
            ValueError,
            "inputs_embeds does not go with prompt_lookup_num_tokens",
            inputs_embeds=EMBEDS,
            prompt_lookup_num_tokens=3,
        ),
        wrong(
            "positions and no cache",
            ValueError,
            "position_ids does not go with use_cache=False",
            input_ids=PROMPT,
            position_ids=PROMPT,
            use_cache=False,
        ),
        wrong("positions' shape", ValueError, "position_ids has shape", input_ids=PROMPT, position_ids=PROMPT[:, 1:]),
        wrong("positions of a list", ValueError, "goes with a tensor", input_ids=[[1], [2, 3]], position_ids=PROMPT),
        wrong(
            "positions that run out",
            ValueError,
            "to 66 with the new tokens; they must be at least 0 and below 64",
            input_ids=PROMPT,
            position_ids=torch.arange(50, 57)[None],
        ),
        wrong("a negative position", ValueError, "from -1", input_ids=PROMPT, position_ids=torch.arange(-1, 6)[None]),
        wrong("past as a dict", TypeError, "past_key_values is a dict", input_ids=PROMPT, past_key_values={}),
        wrong("past as a tensor", TypeError, "past_key_values is a tensor", input_ids=PROMPT, past_key_values=PROMPT),
    ],
)
def test_what_cannot_be_continued_is_refused(models, arguments, error, words):
    with pytest.raises(error, match=words):
        models[0].generate(**{**NEW, **arguments})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "row 0 has 7 tokens and past_key_values holds 7 of them; give the whole text"),
        ({"input_ids": PROMPT[:1]}, "holds 2 rows; the input has 1"),
        ({"input_ids": PROMPT.repeat(1, 2), "sliding_window": True}, "does not go with sliding_window"),
    ],
    ids=str,
)
def test_a_cache_that_does_not_fit_is_refused(models, change, words):
    cache = filled(models[0], PROMPT)
    with pytest.raises(ValueError, match=words):
        models[0].generate(**{"input_ids": PROMPT, "past_key_values": cache, **NEW, **change})
    assert cache.lengths == [7, 7]


def test_a_cache_of_another_dtype_is_refused(models):
    with pytest.raises(ValueError, match=r"past_key_values is torch\.float16 on cpu; the model is torch\.float32"):
        models[0].generate(PROMPT, past_key_values=KVCache(models[0].config, 2, dtype=torch.float16))


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_beams_of_unlike_prompts_have_no_common_steps(models, name):
    with pytest.raises(ValueError, match=f"{name} with num_beams takes prompts of one length"):
        models[0].generate([[1], [2, 3]], num_beams=2, **{name: True})


def test_the_order_of_forward_is_transformers(models):
    """model(ids, past), as the seed page's readers call it; a mask in that place is told its name."""
    ours, theirs = models
    cache = filled(ours, PROMPT[:, :4])
    with torch.no_grad():
        assert torch.allclose(ours(PROMPT[:, 4:], cache).logits, theirs(PROMPT).logits[:, 4:], atol=1e-4)
    for model in (ours, ours.transformer):
        with pytest.raises(TypeError, match="attention_mask= or labels="):
            model(PROMPT, torch.ones_like(PROMPT))
