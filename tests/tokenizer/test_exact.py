"""Same ids as tiktoken and as Hugging Face, and back to the same text."""

import random

import pytest
from optional import hypothesis, tiktoken, tokenizers

from tokenizer import GPT2Tokenizer
from tokenizer.pretokenize import pieces

given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SURROGATES = range(0xD800, 0xE000)
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000"
NEARLY_WHITESPACE = "\x1c\x1d\x1e\x1f\u180e\u200b\u200d\u2060\ufeff\x00\x7f"
TEXTS = {
    "empty": "",
    "contractions": "I'll you've he's don't I'd I'm we're; I'LL YOU'VE HE'S DON'T I'D I'M WE'RE 's't're 'S 'x ''s",
    "numbers": "1 12 123 1234567890 1,234.5e-6 ½ ² ٣ ४ Ⅷ 一二三 1a a1 1'1 0x1F",
    "scripts": "Ελλάδα Россия 中文字符 日本語テキスト 한국어 עברית العربية हिन्दी ไทย አማርኛ ᏣᎳᎩ 𒀀𒀁 mixedЖизньword中a文",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☺️ 1️⃣ 🤦🏿‍♂️🤦🏿‍♂️ a😀b 😀 😀",
    "combining": "e\u0301 n\u0303 a\u0300\u0301\u0302 \u0301start Z\u0351\u036b\u0343a\u030al\u0489go क्षि",
    "nul": "\0a\0\0 b\0 \0c\n\0",
    "code": "def f(x):\n    if x:\n\t\treturn  {'a': [1,2]}\n\n\n\nclass  A :\r\n\r\n    pass   \n",
    "long letters": "a" * 3000 + " " + "ab" * 2000,
    "long spaces": " " * 3000 + "x" + "\n" * 3000 + "y" + " \n" * 700,
    "long punctuation": "=" * 2000 + "-=" * 1000 + " " + "." * 999,
    "long digits": "1234567890" * 300,
    "end of text": "<|endoftext|> a<|endoftext|>b <|endoftext|",
    "nearly whitespace": "a" + "a ".join(NEARLY_WHITESPACE) + " " + "  ".join(NEARLY_WHITESPACE),
}


@pytest.fixture(scope="module", params=["short", "long"])
def ours(request, gpt2):
    """The tokenizer as it is, and one that takes every text for a long one."""
    if request.param == "short":
        return gpt2
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    tokenizer._memo.long_text = tokenizer._memo.much_text = 0
    return tokenizer


def assert_exact(texts, ours, openai, hugging_face):
    found = [ours.encode_ordinary(text) for text in texts]
    # Each peer's batch in one call; Hugging Face's reads special tokens in text, so those texts have none.
    theirs = openai.encode_ordinary_batch(texts, num_threads=1)
    plain = ["<|endoftext|>" not in text for text in texts]
    encodings = iter(hugging_face.encode_batch_fast([text for text, ok in zip(texts, plain) if ok]))
    for text, ids, tiktoken_ids, ok in zip(texts, found, theirs, plain):
        assert ids == tiktoken_ids, text
        assert not ok or ids == next(encodings).ids, text
        assert ours.decode(ids) == text


def in_groups(texts, ours):
    """For the tokenizer that takes them for long, which one by one would take it minutes, twenty texts in one."""
    if ours._memo.long_text:
        return texts
    return ["x".join(texts[i : i + 20]) for i in range(0, len(texts), 20)]


@pytest.mark.parametrize("name", TEXTS)
def test_hard_texts(name, ours, openai, hugging_face):
    assert_exact([TEXTS[name]], ours, openai, hugging_face)


# All of the planes that hold characters; of the others, where all code points are alike, every 61st.
FULL_PLANES = (0, 1, 2, 3, 14)
CHARACTERS = [
    chr(point)
    for point in range(0x110000)
    if point not in SURROGATES and (point >> 16 in FULL_PLANES or point % 61 == 0)
]


@pytest.fixture(scope="module")
def classes():
    """{class: the set of characters to which our pattern gives it}, seen from which neighbours share their piece."""
    letters = {c for c in CHARACTERS if pieces(f"a{c}") == [f"a{c}"]}
    numbers = {c for c in CHARACTERS if pieces(f"1{c}") == [f"1{c}"]}
    others = {c for c in CHARACTERS if pieces(f"!{c}") == [f"!{c}"]}
    spaces = set(CHARACTERS) - letters - numbers - others
    assert len(letters) + len(numbers) + len(others) + len(spaces) == len(CHARACTERS)
    return {r"\p{L}": letters, r"\p{N}": numbers, r"\s": spaces}


@pytest.mark.parametrize("name", [r"\p{L}", r"\p{N}", r"\s"])
def test_classes_of_characters_are_tiktokens(name, classes):
    # A token of two bytes, of which the second is "y", shows that the class took the character in front of it.
    ranks = {bytes([byte]): byte for byte in range(256)} | {bytes([byte]) + b"y": 256 + byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=rf"{name}y|[\s\S]", mergeable_ranks=ranks, special_tokens={})
    for start in range(0, len(CHARACTERS), 1024):
        block = CHARACTERS[start : start + 1024]
        expected = []
        for c in block:
            *first, last = c.encode()
            expected += [*first, 256 + last] if c in classes[name] else [*first, last, ord("y")]
        assert encoding.encode_ordinary("y".join(block) + "y") == expected


def test_classes_of_characters_are_hugging_faces(classes):
    cutter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for start in range(0, len(CHARACTERS), 1024):
        block = CHARACTERS[start : start + 1024]
        borders = {begin for _, (begin, _) in cutter.pre_tokenize_str("".join(f"a{c}1{c}\n" for c in block))}
        for i, c in enumerate(block):
            assert (5 * i + 1 not in borders) == (c in classes[r"\p{L}"]), hex(ord(c))
            assert (5 * i + 3 not in borders) == (c in classes[r"\p{N}"]), hex(ord(c))


def test_characters_of_every_plane_in_context(ours, openai, hugging_face):
    characters = [c for c in CHARACTERS if c < "\uffff" or ord(c) % 13 == 0]
    texts = ["".join(f" {c}'t" for c in characters[start : start + 64]) for start in range(0, len(characters), 64)]
    assert_exact(texts, ours, openai, hugging_face)


def test_every_short_run_of_whitespace(ours, openai, hugging_face):
    kinds = " \n\t\r\v\xa0\u3000\x1c"
    runs = [""]
    for _ in range(4):
        runs += [run + kind for run in runs for kind in kinds if len(run) < 4]
    runs = sorted(set(runs))
    texts = [f"{before}{run}{after}" for run in runs for before in ("", "a", ".") for after in ("", "b", "中")]
    assert len(runs) == sum(8**n for n in range(5))
    assert_exact(in_groups(texts, ours), ours, openai, hugging_face)


ALPHABETS = [0x3042, 0x30A2, 0xAC00, 0x430, 0x3B1, 0x5D0, 0x627, 0x905]


def _fuzz(seed, number):
    """Random texts of many kinds; the seed fixes them."""
    draw = random.Random(seed)
    fragments = [
        lambda: draw.choice(
            [" the", "token", "izer", " don", "'t", "'re", "'LL", " Straße", "naïve", " I", "Σ", "ing"]
        ),
        lambda: "".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 12))),
        lambda: "".join(draw.choices(WHITESPACE, k=draw.randint(1, 4))),
        lambda: draw.choice([" ", " ", "\n", "  ", "\n\n", "\n    ", "\t"]),
        lambda: draw.choice(NEARLY_WHITESPACE),
        lambda: "".join(draw.choices(".,;:!?'\"()[]{}<>|=-_+*/\\#@$%^&~`", k=draw.randint(1, 3))),
        lambda: str(draw.randrange(10 ** draw.randint(1, 9))),
        lambda: "".join(chr(draw.randint(0x4E00, 0x9FFF)) for _ in range(draw.randint(1, 6))),
        lambda: "".join(chr(draw.choice(ALPHABETS) + draw.randint(0, 30)) for _ in range(4)),
        lambda: draw.choice(["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "e\u0301", "\u0301", "\ufe0f", "\u200d"]),
        lambda: chr(draw.choice([draw.randrange(0x80), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])),
        lambda: draw.choice("ab-=. \n'") * draw.randint(1, 40),
    ]
    for _ in range(number):
        yield "".join(draw.choice(fragments)() for _ in range(draw.randint(1, 12)))


@pytest.mark.parametrize("seed", range(5))
def test_fuzz(seed, ours, openai, hugging_face):
    texts = list(_fuzz(seed, 20_000))
    assert len(set(texts)) > 19_000
    assert_exact(in_groups(texts, ours), ours, openai, hugging_face)


# Whitespace, contractions and joined characters come up far more often than in st.text() alone.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL_TEXT = st.lists(st.sampled_from([*WHITESPACE, *NEARLY_WHITESPACE, *"a1.'中é", "'s", "word", "😀"])).map("".join)


@given(st.lists(ANY_TEXT | SPECIAL_TEXT, min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_any_text(ours, openai, hugging_face, texts):
    assert_exact(texts, ours, openai, hugging_face)
