"""Training equals the algorithm as it is written down, and Hugging Face's trainer; it is deterministic."""

from collections import Counter
from itertools import pairwise

import pytest
from optional import hypothesis, tokenizers

from tokenizer import GPT2Tokenizer
from tokenizer.pretokenize import pieces
from tokenizer.train import learn_merges
from tokenizer.vocabulary import BYTE_TO_CHAR

given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

TEXT = "low lower lowest, newer newest wider widest: don't 12 1212 中文中文 aaaaaaa aaaa\n\n    x  y\n" * 3


def naive_merges(texts, number):
    """Sennrich et al. 2016, algorithm 1: counts every pair of every piece again for each merge."""
    ids = {byte: id for id, byte in enumerate(BYTE_TO_CHAR)}
    names = list(BYTE_TO_CHAR.values())
    words = [[ids[byte] for byte in piece.encode()] for text in texts for piece in pieces(text)]
    merges = []
    for _ in range(number):
        counts = Counter(pair for word in words for pair in pairwise(word))
        pair, count = min(counts.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        if count < 2:
            break
        merges.append(f"{names[pair[0]]} {names[pair[1]]}")
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [len(names)]
                i += 1
        names.append(names[pair[0]] + names[pair[1]])
    return merges


@pytest.mark.parametrize("number", [0, 1, 10, 1000])
def test_equals_the_naive_algorithm(number):
    assert learn_merges([TEXT, TEXT[:50]], number, progress=False) == naive_merges([TEXT, TEXT[:50]], number)


@given(st.lists(st.text("ab c\n"), max_size=4))
@settings(deadline=None, max_examples=60)
def test_equals_the_naive_algorithm_on_any_text(texts):
    assert learn_merges(texts, 30, progress=False) == naive_merges(texts, 30)


def test_equals_hugging_faces_trainer():
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [TEXT], tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    ours = GPT2Tokenizer.train([TEXT], 330, special_tokens=(), progress=False)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids


def test_a_trained_tokenizer_encodes_decodes_saves_and_loads(tmp_path):
    trained = GPT2Tokenizer.train([TEXT], 320, special_tokens=("<|endoftext|>", "<pad>"), progress=False)
    assert len(trained) <= 320
    assert trained.special_tokens == {"<|endoftext|>": len(trained) - 2, "<pad>": len(trained) - 1}
    unseen = "lowest wídest 文 <pad"
    assert trained.decode(trained.encode(unseen)) == unseen
    assert len(trained.encode(TEXT)) < len(GPT2Tokenizer.train([TEXT], 258, progress=False).encode(TEXT))
    trained.save_pretrained(tmp_path)
    assert GPT2Tokenizer.from_pretrained(tmp_path).encode(unseen) == trained.encode(unseen)


def test_bad_requests():
    with pytest.raises(TypeError, match="texts is str; it must be an iterable"):
        GPT2Tokenizer.train("text", 300)
    with pytest.raises(ValueError, match="vocab_size=256; it must be at least 257: 256 bytes and 1 special tokens"):
        GPT2Tokenizer.train(["text"], 256)
