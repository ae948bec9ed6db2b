"""Calls as in transformers: pairs, truncation with overflow, padding, masks, offsets; every option, the same result."""

import copy
import importlib.metadata
import itertools
import pickle

import numpy as np
import pytest
import torch
from optional import transformers
from packaging.version import Version

from tokenizer import GPT2Tokenizer

TEXTS = ["a b c d e f g", "wörld 👩‍👩‍👧", "", "x"]
PAIRS = ["e f g", "naïve q", "r s t u v", ""]


@pytest.fixture(scope="module")
def peer(saved):
    return transformers.AutoTokenizer.from_pretrained(saved, pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def ours():
    return GPT2Tokenizer.from_pretrained("gpt2", pad_token="<|endoftext|>")


def as_lists(encoding):
    return {
        name: [list(row) if isinstance(row, list) else row for row in value] if isinstance(value, list) else value
        for name, value in encoding.items()
    }


@pytest.fixture
def chunks():
    """Skips where the peer's own chunks are missing."""
    if Version(importlib.metadata.version("tokenizers")) < Version("0.23.3"):
        pytest.skip("tokenizers before 0.23.3 loses what overflows")


EXTRAS = {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_length": True}


@pytest.mark.usefixtures("peer", "chunks")
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("truncation_side", ["right", "left"])
def test_pairs_truncation_and_padding(truncation_side, padding_side, ours, peer, monkeypatch):
    for tokenizer in (ours, peer):
        monkeypatch.setattr(tokenizer, "truncation_side", truncation_side)
        monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    options = itertools.product(
        (None, PAIRS), (False, True, "only_first"), (4, 6, 20), (0, 1), (False, True, "max_length"), (None, 4)
    )
    compared = 0
    for pair, truncation, max_length, stride, padding, multiple in options:
        if padding is True and not truncation:
            max_length = None
        call = {"truncation": truncation, "max_length": max_length, "stride": stride, "padding": padding, **EXTRAS}
        call |= {"pad_to_multiple_of": multiple, "return_offsets_mapping": True}
        try:
            expected = as_lists(peer(TEXTS, pair, **call))
        except BaseException:  # a panic of Rust's, or "sequence to truncate too short"
            with pytest.raises(ValueError, match=r"the other text alone has|must be less than|is no multiple of"):
                ours(TEXTS, pair, **call)
        else:
            assert as_lists(ours(TEXTS, pair, **call)) == expected, call
            compared += 1
    assert compared > 100


@pytest.mark.usefixtures("peer", "chunks")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pair", [None, "x y z", "h i j k l m"], ids=["alone", "pair", "long pair"])
def test_overflow_comes_in_chunks_that_overlap_by_the_stride(side, pair, ours, peer, monkeypatch):
    for tokenizer in (ours, peer):
        monkeypatch.setattr(tokenizer, "truncation_side", side)
    for truncation, length, stride in itertools.product((True, "only_first", "only_second"), (8, 10), (0, 1)):
        if truncation == "only_second" and pair is None:
            continue
        call = {"truncation": truncation, "max_length": length, "stride": stride, "return_overflowing_tokens": True}
        call |= {"return_offsets_mapping": True, "return_length": True, "padding": True}
        try:
            expected = as_lists(peer("a b c d e f g", pair, **call))
        except BaseException:  # a panic of Rust's, or "sequence to truncate too short"
            with pytest.raises(ValueError, match=r"the other text alone has|must be less than"):
                ours("a b c d e f g", pair, **call)
        else:
            assert as_lists(ours("a b c d e f g", pair, **call)) == expected, call
    call = {"truncation": True, "max_length": 4, "stride": 1, "return_overflowing_tokens": True}
    assert as_lists(ours(TEXTS, **call)) == as_lists(peer(TEXTS, **call))
    assert as_lists(ours("a b", **call | {"max_length": 0, "stride": 0})) == as_lists(
        peer("a b", **call | {"max_length": 0, "stride": 0})
    )


def test_of_one_text_and_its_pair(ours, peer):
    assert dict(ours("a b", "c d e", **EXTRAS)) == dict(peer("a b", "c d e", **EXTRAS))
    assert ours.encode("a b", "c d") == peer.encode("a b", "c d")
    assert ours.encode("a", padding="max_length", max_length=3) == peer.encode("a", padding="max_length", max_length=3)
    assert ours.encode("a b c", max_length=2) == peer.encode("a b c", max_length=2) == [64, 275]
    assert ours([("a", "b"), ("c", "d")]) == ours(["a", "c"], ["b", "d"])
    assert ours.tokenize("a b", "c") == peer.tokenize("a b", "c")
    assert len(ours("a", padding="max_length")["input_ids"]) == 1024


def test_a_row_tells_its_tokens_and_whose_they_are(ours, peer):
    got, expected = (tokenizer(["a b", "q"], ["c d", "r"], padding=True) for tokenizer in (ours, peer))
    for row in (0, 1, -1):
        assert got.tokens(row) == expected.tokens(row)
        assert got.sequence_ids(row) == expected.sequence_ids(row)
    assert ours("a b").tokens() == peer("a b").tokens() == ["a", "Ġb"]
    assert ours(["a b"], return_tensors="pt").tokens(0) == ["a", "Ġb"]
    with pytest.raises(ValueError, match=r"BatchEncoding.tokens: batch_index=2; there are 2 rows"):
        got.tokens(2)
    for there in (pickle.loads(pickle.dumps(got)), copy.deepcopy(got)):  # as to a data loader's process
        assert there == got
        with pytest.raises(ValueError, match="made without a tokenizer"):
            there.tokens()


@pytest.mark.parametrize(
    ("encoded", "options"),
    [
        ({"input_ids": [[1, 2], [3]]}, {}),
        ({"input_ids": [[1, 2], []]}, {"padding_side": "left", "return_attention_mask": False}),
        ([{"input_ids": [1, 2], "label": 1}, {"input_ids": [3], "label": 0}], {}),
        ({"input_ids": [1, 2]}, {"padding": "max_length", "max_length": 4}),
        ({"input_ids": [[1, 2, 3], [3]], "token_type_ids": [[0, 1, 1], [0]]}, {"pad_to_multiple_of": 4}),
        ({"input_ids": [[1, 2], [3]], "special_tokens_mask": [[0, 1], [0]]}, {"padding": False}),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[0, 1], [1]]}, {"padding": True}),
    ],
    ids=str,
)
def test_pad_as_a_collator_calls_it(encoded, options, ours, peer):
    assert dict(ours.pad(copy.deepcopy(encoded), **options)) == dict(peer.pad(copy.deepcopy(encoded), **options))


def test_pad_keeps_arrays_and_tensors(ours):
    padded = ours.pad([{"input_ids": torch.tensor([1, 2]), "score": 0.5}, {"input_ids": torch.tensor([3]), "score": 2}])
    assert padded.input_ids.tolist() == [[1, 2], [3, 50256]]
    assert padded.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert padded.score.tolist() == [0.5, 2.0]
    assert isinstance(ours.pad({"input_ids": [np.array([1]), np.array([2, 3])]}).input_ids, np.ndarray)
    with pytest.raises(ValueError, match=r"GPT2Tokenizer.pad: a row of 2 input_ids has 1 of attention_mask"):
        ours.pad({"input_ids": [[1, 2]], "attention_mask": [[1]]})


def test_special_tokens_masks(ours, peer):
    ids = ours.encode("a <|endoftext|> b", allowed_special="all")
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == [0, 0, 1, 0]
    assert peer.get_special_tokens_mask(ids, already_has_special_tokens=True) == [0, 0, 1, 0]
    assert ours.num_special_tokens_to_add(pair=True) == peer.num_special_tokens_to_add(pair=True) == 0


def test_a_max_length_without_effect_is_refused(ours):
    with pytest.raises(ValueError, match="max_length=3 with padding to the longest row has no effect"):
        ours(["a b c d"], padding=True, max_length=3)
    assert ours(["a b c d"], padding=True, max_length=3, truncation=False).input_ids == [[64, 275, 269, 288]]
    with pytest.raises(ValueError, match="stride=4; it must be less than max_length=4"):
        ours("a b", truncation=True, max_length=4, stride=4)


@pytest.fixture(scope="module")
def prefixing(saved):
    """Ours and transformers', both with add_prefix_space."""
    return [cls.from_pretrained(saved, add_prefix_space=True) for cls in (GPT2Tokenizer, transformers.AutoTokenizer)]


@pytest.mark.parametrize("text", ["Hello", " Hello", "", "\nHi", "a<|endoftext|>b <|endoftext|>", " ", "wörld é"])
def test_a_prefix_space(text, prefixing):
    ours, peer = prefixing
    got = ours(text, return_offsets_mapping=True, allowed_special="all")
    assert dict(got) == dict(peer(text, return_offsets_mapping=True))
    assert ours.decode(got.input_ids) == peer.decode(got.input_ids)
    if "<" not in text:
        assert ours.encode_ordinary(text) == got.input_ids
