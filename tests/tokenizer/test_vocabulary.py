"""The vocabulary that ships is OpenAI's, byte for byte, and each of its tokens is its own encoding."""

import hashlib
from pathlib import Path

import pytest

import tokenizer as package
from tokenizer import GPT2Tokenizer
from tokenizer.bpe import BytePairEncoder
from tokenizer.vocabulary import GPT2_FILE, Vocabulary, encoder_json, gpt2_vocabulary, merges_txt

VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_the_shipped_files_are_openais():
    assert _sha256(GPT2_FILE.read_bytes()) == VOCAB_BPE
    assert "Modified MIT License" in Path(package.__file__).with_name("LICENSE-vocab.txt").read_text(encoding="utf-8")


def test_both_files_follow_from_the_vocabulary_byte_for_byte():
    vocabulary = gpt2_vocabulary()
    assert _sha256(encoder_json(vocabulary).encode()) == ENCODER_JSON
    assert _sha256(merges_txt(vocabulary).encode()) == VOCAB_BPE


def test_every_token_is_its_own_encoding():
    # What lets a piece that is a token be looked up instead of merged. It also makes tiktoken's rule (join any two
    # tokens whose bytes together are a token) and Hugging Face's (join what the table of merges lists) the same rule.
    vocabulary = gpt2_vocabulary()
    encoder = BytePairEncoder(vocabulary.byte_ids, vocabulary.ranks, vocabulary.products)
    tokens = vocabulary.token_bytes()
    assert [id for id, token in tokens.items() if encoder.encode(token) != [id]] == []
    assert len(tokens) == 50256


def test_sizes_and_roles():
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (50257, 50257, 1024)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert tokenizer.pad_token is None
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize(
    ("names", "merges", "message"),
    [
        ({"a": 0}, [], "is missing; a byte-level BPE has all 256 bytes"),
        (None, ["a  b"], "merge 'a  b'; a merge is two tokens"),
        (None, ["a"], "merge 'a'; a merge is two tokens"),
        (None, ["a nope"], "merges use the token 'nope'"),
        (None, ["a b"], "merges use the token 'ab'"),
    ],
)
def test_a_broken_vocabulary_is_refused(names, merges, message):
    bytes_only = dict(list(gpt2_vocabulary().names.items())[:256])
    with pytest.raises(ValueError, match=message):
        Vocabulary(names or bytes_only, merges)
