"""Encoding in numpy: cutting, the table, merging many pieces, what is remembered. `test_exact.py` has the ids."""

import codecs
import copy
import os
import pickle
import random
import string
import threading
import tracemalloc
import warnings
from itertools import product

import numpy as np
import pytest
from optional import hypothesis

from tokenizer import GPT2Tokenizer
from tokenizer.bpe import BytePairEncoder
from tokenizer.long_text import spans, token_bytes, words
from tokenizer.long_text.hashing import Table
from tokenizer.long_text.merging import Merger
from tokenizer.long_text.spans import Spans
from tokenizer.long_text.token_bytes import TokenBytes
from tokenizer.pretokenize import pieces

given, settings, example, st = hypothesis.given, hypothesis.settings, hypothesis.example, hypothesis.strategies

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PARTS = [*"\t\n\r \v\x1c\x85\xa0\u2003\u3000\u200b", *"a1.'中é\0", "'s", "'ll", "'ve", "'LL", "word", "😀", "  ", "٣"]
SPECIAL_TEXT = st.lists(st.sampled_from(PARTS)).map("".join)


@pytest.fixture
def long(fresh):
    """A new tokenizer that takes every text for a long one."""
    fresh._memo.long_text = fresh._memo.much_text = 0
    return fresh


def random_words(number, seed=0, longest=14):
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, longest))) for _ in range(number)]


def cut(text):
    """The pieces of text that is not empty, as words and their pieces give them."""
    found, is_run = spans.words(text.encode(), np.array([len(text.encode())]))
    joined = found[~is_run].joined()
    parts, counts = spans.pieces(joined, lambda: np.zeros(0x110000, bool))
    texts = iter(parts.texts())
    result = []
    numbers = iter(counts.tolist())
    for word, run in zip(found.texts(), is_run):
        result += [word] if run else [next(texts) for _ in range(next(numbers))]
    return [piece.decode() for piece in result]


@given(ANY_TEXT | SPECIAL_TEXT)
@settings(max_examples=500, deadline=None)
@example("don't 's 's't x''s \n's I'll'd 'l 've're '")
@example("\u3000\n\n\u3000a\u3000 \u3000b \u3000\u3000")
def test_words_and_their_pieces_are_the_patterns(text):
    for begun in (" " + text, "a" + text, text or "x"):
        assert cut(begun) == pieces(begun)


def test_every_character_has_its_class():
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(f" a{c}1{c}.{c}" for c in map(chr, points[start : start + 4096]))
        assert cut(text) == pieces(text)


@given(SPECIAL_TEXT)
@settings(max_examples=200, deadline=None)
def test_blocks_are_cut_between_words(text):
    text = f" {text}"
    size, spans.BLOCK = spans.BLOCK, 3
    try:
        blocks = list(spans.blocks(text.encode()))
    finally:
        spans.BLOCK = size
    assert b"".join(blocks) == text.encode()
    assert [piece for block in blocks for piece in cut(block.decode())] == pieces(text)


@pytest.fixture(scope="module")
def together():
    """A tokenizer that takes texts together from the first on, of which it remembers those before."""
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    tokenizer._memo.long_text = tokenizer._memo.much_text = 0
    return tokenizer


@given(texts=st.lists(ANY_TEXT | SPECIAL_TEXT, max_size=8), block=st.sampled_from([3, 1 << 20]))
@settings(max_examples=400, deadline=None)
@example(texts=["a ", " b", "", " ", "\u3000", "c\u3000\n", "\n\nd", "e"], block=3)
@example(texts=["\u2003a", "\x85 a\x85", "'s", "s '", " 's"], block=3)
def test_texts_together_are_texts_one_by_one(together, gpt2, texts, block):
    size, spans.BLOCK = spans.BLOCK, block
    try:
        ids = together.encode_ordinary_batch(texts)
        flat, counts = together._encode_to_arrays([text.encode() for text in texts])
    finally:
        spans.BLOCK = size
    assert flat.tolist() == [id for row in ids for id in row]
    assert counts.tolist() == [len(row) for row in ids]
    assert ids == [gpt2._memo._pieces.encode(text) for text in texts]


def test_half_a_surrogate_pair_among_texts_is_said_with_its_place(together):
    with pytest.raises(ValueError, match="surrogate"):
        together.encode_ordinary_batch(["fine", "a\ud800b"])
    assert together.encode_ordinary_batch(["\ud83d\ude00"]) == together.encode_ordinary_batch(["😀"])


def test_a_table_finds_what_was_claimed_and_nothing_else():
    draw = np.random.default_rng(0)
    a, b = (draw.integers(1, 50, 5000).astype(np.uint64) for _ in range(2))
    table = Table(5000)
    new = np.concatenate([table.claim(a[i : i + 100], b[i : i + 100])[1] + i for i in range(0, 5000, 100)])
    distinct = set(zip(a.tolist(), b.tolist()))
    assert sorted(zip(a[new].tolist(), b[new].tolist())) == sorted(distinct)
    assert table.used == len(distinct) < 2500
    slots = table.find(a, b)
    assert (table.a[slots] == a).all()
    assert (table.b[slots] == b).all()
    assert (table.find(a, b + np.uint64(50)) == -1).all()
    assert len(table.claim(a, b)[1]) == 0


def merged_together(encoder, texts):
    lengths = np.array(list(map(len, texts)))
    ids, counts = Merger(encoder).encode(Spans(b"".join(texts), np.cumsum(lengths) - lengths, lengths))
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def test_merging_together_is_merging_one_by_one(gpt2):
    encoder = gpt2._memo._pieces.encoder
    texts = [word.encode() for word in [*random_words(2000, longest=40), "a" * 99, "中文字符", "x", "\0"]]
    assert merged_together(encoder, texts) == [encoder.encode(text) for text in texts]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_merging_together_with_any_merges(data):
    """Ranks in no sensible order, products that stand for anything: the rule alone decides."""
    pair = st.tuples(st.integers(0, 9), st.integers(0, 9))
    pairs = data.draw(st.lists(pair, unique=True, max_size=40))
    products = data.draw(st.lists(st.integers(0, 9), min_size=len(pairs), max_size=len(pairs)))
    encoder = BytePairEncoder([byte % 10 for byte in range(256)], {pair: i for i, pair in enumerate(pairs)}, products)
    texts = data.draw(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8))
    assert merged_together(encoder, texts) == [encoder.encode(text) for text in texts]


def test_numpy_waits_until_there_is_much_text(fresh):
    tokenizer = fresh
    text = " ".join(random_words(5000))
    calls = tokenizer._memo.much_text // len(text) + 1
    expected = tokenizer.encode_ordinary(text)
    for _ in range(calls - 2):
        tokenizer.encode_ordinary(text)
    assert tokenizer._memo._words is None
    assert tokenizer.encode_ordinary(text) == expected
    assert tokenizer._memo._words is not None
    assert tokenizer.encode_ordinary(text) == expected


@pytest.mark.parametrize("limit", ["MOST_WORDS", "MOST_IDS", "MOST_LONG"])
def test_a_full_memory_starts_afresh_and_changes_nothing(limit, long, gpt2, monkeypatch):
    monkeypatch.setattr(spans, "BLOCK", 1000)
    monkeypatch.setattr(words, limit, {"MOST_WORDS": 51_000, "MOST_IDS": 60_000, "MOST_LONG": 20}[limit])
    cleared = []
    forget = words.Words._clear_long  # a part of _clear
    monkeypatch.setattr(words.Words, "_clear_long", lambda self: (cleared.append(1), forget(self)))
    for seed in range(10):
        text = " ".join(random_words(1000, seed, longest=24))
        assert long.encode_ordinary(text) == gpt2._memo._pieces.encode(text)
    assert len(cleared) > 3


def test_memory_is_bounded(long):
    """A million words that hardly come twice; numpy tells tracemalloc of its arrays."""
    texts = [" ".join(random_words(200_000, seed, longest=20)) for seed in range(5)]
    tracemalloc.start()
    try:
        for text in texts:
            long.encode_ordinary(text)
            assert tracemalloc.get_traced_memory()[0] < 48 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["中" * 1_000_000, "ab1." * 1_000_000], ids=["one letter", "one word"])
def test_memory_is_bounded_after_text_that_is_one_block(long, text):
    long.encode_ordinary(" a")
    tracemalloc.start()
    try:
        long.encode_ordinary(f" {text}")
        assert tracemalloc.get_traced_memory()[0] < 10 << 20
    finally:
        tracemalloc.stop()


def test_an_interrupt_leaves_no_word_without_its_tokens(long, gpt2, monkeypatch):
    text = " ".join(random_words(3000))
    long.encode_ordinary(text[:100])

    def interrupted(self, pieces):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            long.encode_ordinary(text)
    assert long.encode_ordinary(text) == gpt2._memo._pieces.encode(text)


def test_an_interrupt_while_forgetting_leaves_no_word_without_its_tokens(long, gpt2, monkeypatch):
    long.encode_ordinary("word")
    text = " ".join(random_words(100))

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(words.Words, "_set", interrupted)
        with pytest.raises(KeyboardInterrupt):
            long.clear_cache()
    assert long.encode_ordinary(text) == gpt2._memo._pieces.encode(text)


def test_forgetting_waits_for_a_thread_that_encodes(long, gpt2, monkeypatch):
    text = " ".join(random_words(3000))
    long.encode_ordinary(text[:100])
    forgets = threading.Thread(target=long.clear_cache)

    def encode(self, pieces, encode=Merger.encode):
        forgets.start()
        forgets.join(0.2)
        return encode(self, pieces)

    monkeypatch.setattr(Merger, "encode", encode)
    ids = long.encode_ordinary(text)
    forgets.join()
    assert ids == gpt2._memo._pieces.encode(text)


def test_a_process_forked_while_a_thread_encodes_can_encode(long):
    text = " ".join(random_words(100))
    expected = long.encode_ordinary(text)
    words = long._memo._words
    with words._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside torch's threads
        child = os.fork()
        if child == 0:
            is_right = False
            try:
                is_right = not words._lock.locked() and long.encode_ordinary(text) == expected
            finally:
                os._exit(not is_right)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_a_tokenizer(long, gpt2):
    texts = [" ".join(random_words(4000, seed)) for seed in range(8)]
    results = [None] * len(texts)

    def encode(i):
        results[i] = long.encode_ordinary(texts[i])

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [gpt2._memo._pieces.encode(text) for text in texts]


def test_a_trained_vocabulary():
    tokenizer = GPT2Tokenizer.train(random_words(500), 400, progress=False)
    text = " ".join(random_words(2000, seed=1))
    expected = tokenizer.encode_ordinary(text)
    tokenizer._memo.long_text = tokenizer._memo.much_text = 0
    assert tokenizer.encode_ordinary(text) == expected


def test_the_first_run_of_whitespace_is_cut_nowhere():
    """GPT-2 has no token that begins with wide whitespace and goes on with ASCII's; this vocabulary has."""
    tokenizer = GPT2Tokenizer.train(["a\u3000 \u3000 b\xa0 \n c"] * 9, 290, progress=False)
    tokenizer._memo.long_text = tokenizer._memo.much_text = 0
    for length in range(1, 6):
        for text in map("".join, product("\u3000\xa0 \nb", repeat=length)):
            assert tokenizer.encode_ordinary(text) == tokenizer._memo._pieces.encode(text), repr(text)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_encodes_and_remembers_nothing(copied, long):
    """As for the workers of a DataLoader that are spawned, not forked."""
    text = " ".join([*random_words(100), "中文"])
    ids = long.encode_ordinary(text)
    twin = copied(long)
    assert twin._memo._words is None
    assert twin.encode_ordinary(text) == ids
    twin._memo.long_text = twin._memo.much_text = 0
    assert twin.encode_ordinary(text) == ids
    assert twin.decode(ids) == text


class TestDecodingLongLists:
    @pytest.fixture
    def long(self, fresh, monkeypatch):
        monkeypatch.setattr(TokenBytes, "long_list", 1)
        monkeypatch.setattr(TokenBytes, "much", 0)
        return fresh

    def test_every_id_in_any_order(self, long, gpt2):
        ids = list(range(len(gpt2))) * 2
        random.Random(0).shuffle(ids)
        assert long.decode_bytes(ids) == b"".join(gpt2.decode_bytes(id) for id in ids)

    def test_new_tokens_are_decoded_too(self, long):
        long.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
        assert long.decode([50257, 0, 50256]) == "[NEW]!<|endoftext|>"

    @pytest.mark.parametrize("wrong", [-1, -50257, 50257, 1 << 40, None, 1.5, "a"])
    def test_what_is_no_id_is_an_error(self, wrong, long):
        with pytest.raises((ValueError, TypeError), match=r"GPT2Tokenizer\.decode_bytes"):
            long.decode_bytes([1, wrong, 2])
        if wrong not in (50257, 1 << 40):  # ids beyond the vocabulary decode to nothing
            with pytest.raises((ValueError, TypeError), match=r"GPT2Tokenizer\.decode"):
                long.decode([1, wrong, 2])

    def test_characters_may_reach_over_blocks(self, long, monkeypatch):
        text = "déjà 中文 😀😀 " * 9
        ids = long.encode(text)
        for size in range(1, 9):
            monkeypatch.setattr(token_bytes, "BLOCK", size)
            assert long.decode(ids) == text
            for broken in (ids[:-1] + [ids[2]], ids[3:] + ids[:2]):
                whole = b"".join(map(long.decode_bytes, broken))
                assert long.decode(broken, errors="replace") == whole.decode("utf-8", "replace")

    def test_an_error_says_where_in_the_whole(self, long, monkeypatch):
        monkeypatch.setattr(token_bytes, "BLOCK", 2)
        ids = [*long.encode("abc def ghi"), long.vocabulary.byte_ids[0xC0]]
        with pytest.raises(UnicodeDecodeError) as raised:
            long.decode(ids, errors="strict")
        assert raised.value.object[: raised.value.start] == b"abc def ghi"

    def test_a_handler_of_errors_is_told_the_place_in_the_whole(self, long, monkeypatch):
        codecs.register_error("say where", lambda error: (f"<{error.start}>", error.end))
        monkeypatch.setattr(token_bytes, "BLOCK", 2)
        ids = [long.vocabulary.byte_ids[byte] for byte in b"abc\xc0d\xe4\xb8"]
        assert long.decode(ids, errors="say where") == "abc<3>d<5>"

    def test_bytes_are_ids_too(self, long):
        assert long.decode(b"abcd") == long.decode(list(b"abcd"))

    def test_a_gap_in_the_vocabulary_is_an_error(self, long):
        table = TokenBytes({0: b"a", 2: b"bc"})
        assert table.join([2, 0, 2]) == b"bcabc"
        with pytest.raises(IndexError):
            table.join([0, 1])
