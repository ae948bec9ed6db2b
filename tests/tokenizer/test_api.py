"""The API of Hugging Face's tokenizer and of tiktoken's: what they share means the same here; errors say what to do."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import hypothesis, transformers

from tokenizer import GPT2Tokenizer, StreamDecoder

given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

ROOT = Path(__file__).parents[2]
TEXT = "Hello wörld 👩‍👩‍👧 and\n\n  don't 中文"


@pytest.fixture(scope="module")
def peer(saved):
    """transformers' tokenizer, from the directory that ours saved, padding like GPT-2's users do."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def padding(fresh):
    fresh.pad_token = fresh.eos_token
    return fresh


def test_importing_and_encoding_needs_neither_torch_nor_numpy_nor_our_other_packages():
    code = (
        "import sys; from tokenizer import GPT2Tokenizer; t = GPT2Tokenizer.from_pretrained('gpt2'); t(['é中']); "
        "t.decode([1]); others = 'torch', 'numpy', 'kernels', 'model', 'huggingface_hub', 'tqdm'; "
        "print([name for name in others if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_hugging_faces_page(fresh):
    tokenizer, prompt = fresh, "In a shocking finding, scientists discovered a herd of unicorns"
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert input_ids.dtype == torch.int64
    assert tokenizer.batch_decode(input_ids)[0] == prompt
    inputs = tokenizer([prompt], return_tensors="pt").to("cpu")
    assert sorted(dict(**inputs)) == ["attention_mask", "input_ids"]
    # GPT2DoubleHeadsModel's: a token of the user's own is read in text without being asked for.
    assert tokenizer.add_special_tokens({"cls_token": "[CLS]"}) == 1
    assert (len(tokenizer), tokenizer.vocab_size) == (50258, 50257)
    choices = [tokenizer.encode(s) for s in ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]]
    assert [tokens.index(tokenizer.cls_token_id) for tokens in choices] == [7, 7]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": "longest", "padding_side": "left"},
        {"padding": "max_length", "max_length": 9, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 4},
        {"padding": True, "return_offsets_mapping": True},
        {"padding": True, "return_offsets_mapping": True, "padding_side": "left", "return_length": True},
        {"padding": True, "return_attention_mask": False},
    ],
    ids=str,
)
def test_batches_are_hugging_faces(options, padding, peer):
    texts = [TEXT, "a", "", "two words"]
    expected = peer(texts, **options)
    got = padding(texts, **options)
    assert got.keys() == expected.keys()
    for name in got:
        assert [list(row) if isinstance(row, list) else row for row in got[name]] == expected[name], name
    if options.get("padding"):
        tensors = padding(texts, return_tensors="pt", **options)
        arrays = padding(texts, return_tensors="np", **options)
        for name, value in peer(texts, return_tensors="pt", **options).items():
            assert torch.equal(tensors[name], value)
            assert np.array_equal(arrays[name], value.numpy())


def test_one_text_gives_a_row_and_with_tensors_a_batch_of_one(gpt2):
    assert gpt2("a b").input_ids == [64, 275]
    assert gpt2("a b", return_tensors="np").input_ids.tolist() == [[64, 275]]
    assert gpt2.encode("a b", return_tensors="pt").tolist() == [[64, 275]]
    assert gpt2.encode("a b", truncation=True, max_length=1) == [64]
    assert gpt2("", return_tensors="pt").input_ids.shape == (1, 0)


def test_truncation_takes_the_side_it_is_told():
    left = GPT2Tokenizer.from_pretrained("gpt2", truncation_side="left")
    assert left("a b c", truncation=True, max_length=2).input_ids == [275, 269]
    assert left("a b c", truncation=True, max_length=0).input_ids == []
    assert len(left("a " * 3000, truncation=True).input_ids) == 1024


def test_special_tokens_as_in_tiktoken(gpt2, openai):
    text = "a <|endoftext|> b"
    for special in ({}, {"allowed_special": "all"}, {"disallowed_special": ()}, {"allowed_special": {"<|endoftext|>"}}):
        try:
            expected = openai.encode(text, **special)
        except ValueError:
            with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>' at character 2"):
                gpt2.encode(text, **special)
            with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>' at character 2"):
                gpt2([text], **special)
        else:
            assert gpt2.encode(text, **special) == expected
            assert gpt2(text, **special).input_ids == expected
    assert 50256 not in gpt2.encode_ordinary(text)
    assert gpt2.encode_batch(["a", "b"]) == [[64], [65]]


def test_the_longer_of_two_special_tokens_wins(fresh):
    fresh.add_special_tokens({"additional_special_tokens": ["<a>", "<a><b>"]})
    assert fresh.encode("<a><b><a>") == [50258, 50257]
    assert fresh.decode([50258, 64, 50257], skip_special_tokens=True) == "a"
    assert fresh.all_special_ids == [50256, 50257, 50258]
    assert fresh.add_special_tokens({"additional_special_tokens": ["<a>"]}) == 0


@given(st.lists(st.integers(0, 50255), max_size=30))
@settings(deadline=None)
def test_decoding_any_ids_is_tiktokens(gpt2, openai, ids):
    assert gpt2.decode_bytes(ids) == openai.decode_bytes(ids)
    for errors in ("replace", "ignore", "backslashreplace"):
        assert gpt2.decode(ids, errors=errors) == openai.decode(ids, errors=errors)
        stream = StreamDecoder(gpt2, errors=errors)
        assert "".join(map(stream.push, ids)) + stream.finish() == gpt2.decode(ids, errors=errors)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_offsets_are_tiktokens(gpt2, openai, text):
    ids = gpt2.encode_ordinary(text)
    assert gpt2.decode_with_offsets(ids) == openai.decode_with_offsets(ids)


def test_a_stream_holds_back_an_unfinished_character_and_nothing_else(gpt2):
    stream = StreamDecoder(gpt2)
    assert [stream.push(id) for id in [50169, 102, 64, 447]] == [" ", "👩", "a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.push([64, 65]) == "ab"
    with pytest.raises(UnicodeDecodeError):
        gpt2.decode([447], errors="strict")


def test_ids_may_come_in_tensors_and_arrays(gpt2):
    ids = gpt2.encode(TEXT)
    for several in (torch.tensor(ids), np.array(ids), tuple(ids)):
        assert gpt2.decode(several) == TEXT
    assert gpt2.batch_decode(torch.tensor([ids, ids])) == gpt2.batch_decode([ids, ids]) == [TEXT, TEXT]
    assert gpt2.decode(64) == gpt2.decode(torch.tensor(64)) == "a"


def test_names_of_tokens(gpt2, peer):
    assert gpt2.tokenize(TEXT) == peer.tokenize(TEXT)
    assert gpt2.convert_ids_to_tokens([5, 995]) == ["&", "Ġworld"]
    assert gpt2.convert_ids_to_tokens(995) == "Ġworld"
    assert gpt2.convert_tokens_to_ids("Ġworld") == 995
    assert gpt2.convert_tokens_to_string(gpt2.tokenize(TEXT)) == TEXT
    assert gpt2.get_vocab() == peer.get_vocab()


ERRORS = {
    "a lone surrogate": (lambda t: t.encode("ab\ud800"), ValueError, r"lone surrogate U\+D800 at character 2"),
    "a surrogate in the middle": (lambda t: t("x中\udfff y"), ValueError, r"lone surrogate U\+DFFF at character 2"),
    "no text": (lambda t: t.encode(3), TypeError, "text is int; it must be str"),
    "no text in a batch": (lambda t: t(["a", 3]), TypeError, "text is list of int, str; it must be str or a list"),
    "one text as a batch": (lambda t: t.encode_batch("ab"), TypeError, "text is one str"),
    "an id too large": (
        lambda t: t.decode_bytes([1, 50257]),
        ValueError,
        "id 50257 is not in the vocabulary; ids go f",
    ),
    "a negative id": (lambda t: t.decode(-1), ValueError, "id -1 is not in the vocabulary"),
    "a role for no id": (lambda t: setattr(t, "pad_token_id", 50257), ValueError, "pad_token_id=50257 is not in"),
    "an unknown token": (lambda t: t.convert_tokens_to_ids("nope!"), ValueError, "'nope!' is not in the vocabulary"),
    "ids in rows": (lambda t: t.decode([[1], [2]]), TypeError, "batch_decode takes several"),
    "ids of another type": (lambda t: t.decode(["a"]), TypeError, "an id is str; ids must be int"),
    "padding without a token": (lambda t: t(["a"], padding=True), ValueError, "tokenizer.pad_token = tokenizer.eos"),
    "rows that differ": (
        lambda t: t(["a", "b c"], return_tensors="pt"),
        ValueError,
        "1 to 2 tokens in input_ids",
    ),
    "another framework": (lambda t: t("a", return_tensors="tf"), ValueError, "return_tensors='tf'"),
    "padding misspelled": (lambda t: t("a", padding="max"), ValueError, "padding='max'"),
    "truncation misspelled": (lambda t: t("a", truncation="max"), ValueError, "truncation='max'"),
    "an unknown side": (lambda t: GPT2Tokenizer(padding_side="up"), ValueError, "padding_side='up'"),
    "an unknown role": (lambda t: t.add_special_tokens({"x_token": "x"}), ValueError, "role 'x_token'"),
    "an empty special token": (lambda t: t.add_special_tokens({"cls_token": ""}), TypeError, "non-empty str"),
    "a role for no token": (lambda t: setattr(t, "pad_token", "[PAD]"), ValueError, "add it with add_special_tokens"),
    "cleaning up": (lambda t: t.decode([1], clean_up_tokenization_spaces=True), ValueError, "never cleaned up"),
    "an attribute of a batch": (lambda t: t("a").labels, AttributeError, "no 'labels'; it has input_ids"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, fresh):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(fresh)
