"""A forward pass that continues from a cache gives the logits of one over the whole text."""

from contextlib import contextmanager

import pytest
import torch
from lanes import across_lanes
from peers import padded_batch, pair, spread, tiny_config

from model import GPT2
from model.cache import STEP, KVCache, PerRow

BOUND = 2e-5


def whole(model, ids):
    """Logits of the whole text, without a cache, and with a graph's kernels."""
    return model(ids, use_cache=False).logits


def assert_continues(model, ids, cuts):
    """Feeds ids [B, T] in pieces that end at `cuts`; each piece gives the logits of the whole."""
    expected = whole(model, ids)
    cache, start = None, 0
    for end in [*cuts, ids.shape[1]]:
        with torch.no_grad():
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, expected[:, start:end].detach(), rtol=0, atol=BOUND)
        cache, start = out.past_key_values, end
    assert cache.lengths == [ids.shape[1]] * len(ids)


CUTS = {"prefill": [], "token by token": range(1, 12), "several at once": [4, 5, 9], "after one": [1]}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("B", [1, 3])
def test_continuing_is_a_forward_pass_over_the_whole(backend, cuts, B):
    model = spread(GPT2(tiny_config(), attn_implementation=backend)).eval()
    ids, _ = padded_batch(101, [13] * B, 13)
    assert_continues(model, ids, cuts)


@pytest.mark.parametrize("B", [1, 2])
@across_lanes()
def test_continuing_with_our_kernels(lane, B):
    model = spread(GPT2(tiny_config(n_layer=1), attn_implementation="triton")).eval().to(lane.device)
    ids, _ = padded_batch(101, [9] * B, 9)
    assert_continues(model, ids.to(lane.device), [4, 5, 7])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padded_rows_continue_as_they_would_alone(backend, side):
    """On the right, the next token takes the padding's place; on the left, positions count it, as in transformers."""
    ours, theirs = pair(attn=backend)
    ids, mask = padded_batch(101, [9, 3, 6], 9, side=side)
    new = torch.randint(0, 101, (3, 4))
    with torch.no_grad():
        cache = ours(ids, attention_mask=mask).past_key_values
        full_mask = torch.cat((mask, torch.ones_like(new)), 1)
        first = ours(new[:, :1], past_key_values=cache, attention_mask=full_mask[:, :10]).logits
        rest = ours(new[:, 1:], past_key_values=cache).logits
        continued = torch.cat((first, rest), 1)
        if side == "left":
            expected = theirs(torch.cat((ids, new), 1), attention_mask=full_mask).logits[:, 9:]
            torch.testing.assert_close(continued, expected, rtol=0, atol=2e-4)
        else:
            for b, length in enumerate((9, 3, 6)):
                text = torch.cat((ids[b, :length], new[b]))[None]
                torch.testing.assert_close(continued[b], theirs(text).logits[0, length:], rtol=0, atol=2e-4)
    assert cache.lengths == ([13, 7, 10] if side == "right" else [13] * 3)


def test_the_model_returns_a_cache_as_transformers_does():
    ours, theirs = pair()
    ids, _ = padded_batch(101, [5, 5], 5)
    with torch.no_grad():
        assert list(ours(ids)) == list(theirs(ids)) == ["logits", "past_key_values"]
        assert list(ours(ids, use_cache=False)) == ["logits"]
        a, b = ours(ids).past_key_values, theirs(ids).past_key_values
        assert a.get_seq_length() == b.get_seq_length() == 5
        for layer in range(3):
            torch.testing.assert_close(a.data[layer, 0, :, :, :5], b.layers[layer].keys, rtol=0, atol=1e-5)
            torch.testing.assert_close(a.data[layer, 1, :, :, :5], b.layers[layer].values, rtol=0, atol=1e-5)
    assert list(ours(ids)) == ["logits"]  # autograd is on
    assert not ours(ids, use_cache=True).logits.requires_grad
    weights = ours(ids[:, :1], past_key_values=a, output_attentions=True).attentions
    assert [tuple(w.shape) for w in weights] == [(2, 3, 1, 6)] * 3


def test_the_cache_grows_in_steps_up_to_n_positions_and_no_further():
    config = tiny_config(n_positions=2 * STEP + 10)
    model = spread(GPT2(config)).eval()
    ids = torch.randint(0, 101, (1, config.n_positions))
    cache = KVCache(config, 1, capacity=3)
    sizes = []
    with torch.no_grad():
        for piece in ids.split(37, dim=1):
            logits = model(piece, past_key_values=cache).logits
            sizes.append(cache.capacity)
    assert sorted(set(sizes)) == [STEP, 2 * STEP, config.n_positions]
    torch.testing.assert_close(logits[0, -1], whole(model, ids)[0, -1].detach(), rtol=0, atol=BOUND)
    with pytest.raises(ValueError, match="the 522 tokens held and 1 new ones need 523 positions; n_positions is 522"):
        model(ids[:, :1], past_key_values=cache)
    assert cache.lengths == [522]


def test_a_step_writes_into_the_cache_in_place():
    model = spread(GPT2(tiny_config())).eval()
    with torch.no_grad():
        cache = KVCache(model.config, 2)
        model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        before, address = cache.data[..., :5, :].clone(), cache.data.data_ptr()
        cache.data[..., 6:, :] = float("nan")
        logits = model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache).logits
    assert cache.data.data_ptr() == address
    assert torch.equal(cache.data[..., :5, :], before)
    assert logits.isfinite().all()  # what lies beyond a row is not read


@contextmanager
def new_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_that_was_never_written_does_not_matter():
    """Regression: a weight of 0 met it in a row shorter than another, where it may be NaN. CPUs attend by row."""
    model = spread(GPT2(tiny_config(), attn_implementation="eager")).eval()
    ids, mask = padded_batch(101, [9, 3], 9)
    new = torch.randint(0, 101, (3, 2, 1))
    with torch.no_grad(), new_memory_is_nan():
        cache = model(ids, attention_mask=mask).past_key_values
        for token in new:
            logits = model(token, past_key_values=cache, output_attentions=True).logits  # all rows at once
    text = torch.cat((ids[1, :3], new[:, 1, 0]))[None]
    torch.testing.assert_close(logits[1], whole(model, text)[0, -1:].detach(), rtol=0, atol=BOUND)


def test_what_a_device_is_told_of_the_rows():
    """One number for all rows, or one change, needs no copy; others are copied; the tensor stays in place."""
    rows = PerRow(3, "cpu")
    address = rows.tensor.data_ptr()
    for numbers in ([4, 4, 4], [5, 5, 5], [9, 2, 0], [10, 3, 1], [10, 3, 1], [8, 1, -1], [6, 6, 6], None, [7, 7, 7]):
        if numbers is None:
            rows.known = None
        else:
            assert rows.of(numbers).tolist() == numbers
    assert rows.tensor.data_ptr() == address


def test_crop_reorder_and_reset():
    model = spread(GPT2(tiny_config())).eval()
    ids, mask = padded_batch(101, [8, 5, 2], 8)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        cache.crop([8, 3, 2])
        assert cache.lengths == [8, 3, 2]
        cache.crop(-2)
        assert cache.lengths == [6, 1, 0]
        cache.lengths = [8, 3, 2]
        cache.crop(6)
        assert cache.lengths == [6, 3, 2]
        cache.reorder([1, 1, 0, 2])
        assert cache.lengths == [3, 3, 6, 2]
        assert cache.batch_size == 4
        new = torch.randint(0, 101, (4, 1))
        logits = model(new, past_key_values=cache).logits
        for b, (row, length) in enumerate(((1, 3), (1, 3), (0, 6), (2, 2))):
            text = torch.cat((ids[row, :length], new[b]))[None]
            torch.testing.assert_close(logits[b, 0], model(text, use_cache=False).logits[0, -1], rtol=0, atol=BOUND)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(ids[[0, 0, 1, 1]], past_key_values=cache).logits
        torch.testing.assert_close(again[0], model(ids[:1], use_cache=False).logits[0], rtol=0, atol=BOUND)


def test_a_row_of_a_cache_is_a_view():
    model = spread(GPT2(tiny_config())).eval()
    ids, _ = padded_batch(101, [6, 6], 6)
    with torch.no_grad():
        cache = KVCache(model.config, 2)
        model(ids, past_key_values=cache)
        row = cache.row(1)
        row.reset()
        model(ids[:1], past_key_values=row)
    assert torch.equal(cache.data[:, :, 0, :, :6], cache.data[:, :, 1, :, :6])
    assert cache.lengths == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, 1).long()}, "past_key_values holds 2 rows; the input has 3"),
        ({"attention_mask": torch.ones(2)}, r"with past_key_values it must be \[B, T\] = \(2, 1\) or wider"),
        ({"attention_mask": torch.ones(3, 6)}, r"with past_key_values it must be"),
        (
            {"input_ids": torch.zeros(2, 2).long(), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
            "padding before new tokens",
        ),
    ],
    ids=["rows", "mask-dim", "mask-rows", "left-padding-later"],
)
def test_refuses_what_does_not_fit_the_cache(arguments, message):
    model = GPT2(tiny_config())
    with torch.no_grad():
        cache = model(torch.zeros(2, 5).long()).past_key_values
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.zeros(2, 1).long(), "past_key_values": cache, **arguments})


def test_a_cache_of_tuples_is_taken_over_and_others_are_explained():
    model = spread(GPT2(tiny_config(), attn_implementation="sdpa")).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        held = model(ids[:, :4]).past_key_values
        layers = tuple((keys[:, :, :4], values[:, :, :4]) for keys, values in held.data)
        rest = model(ids[:, 4:], past_key_values=layers).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 4:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="2 layers came; 3 pairs of keys and values are required"):
        model(ids, past_key_values=layers[:2])
    with pytest.raises(TypeError, match="past_key_values is a dict; a KVCache"):
        model(ids, past_key_values={})


def test_labels_outside_the_vocabulary_are_explained():
    model = GPT2(tiny_config())
    with pytest.raises(ValueError, match="labels range from 0 to 101; they must be at least 0 and below 101"):
        model(torch.zeros(1, 4, dtype=torch.long), labels=torch.tensor([[0, 3, -100, 101]]))
