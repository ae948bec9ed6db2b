"""Text to measure tokenizers with, without downloads: what every installation ships, or a generator with a seed.

Each function gives about `size` characters, less where there is not more. Nothing is repeated to fill up, for that
would flatter whoever remembers words: English paragraphs and source files come once each.
"""

import random
import re
import sysconfig
from pathlib import Path

SEED = 0


def english(size):
    """Prose paragraphs of Python's own manual (pydoc_data.topics), then of docstrings of the installed packages."""
    return _until(size, _once(filter(_is_prose, map(_unindented, _paragraphs()))), "\n\n")


def code(size):
    """Python source files, of the standard library first."""
    return _until(size, _sources(), "\n")


def chinese(size):
    """Sentences of the 3,755 most common characters (GB 2312, level 1), by Zipf's law, with Chinese punctuation."""
    draw = random.Random(SEED)
    cells = [bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    characters = list("".join(cell.decode("gb2312", "ignore") for cell in cells))
    draw.shuffle(characters)
    weights = [1 / (rank + 10) for rank in range(len(characters))]

    def sentences():
        while True:
            parts = [
                "".join(draw.choices(characters, weights, k=draw.randint(4, 12))) for _ in range(draw.randint(1, 4))
            ]
            yield "\uff0c".join(parts) + draw.choice("。。。\uff01\uff1f") + draw.choice(["", "", "", "\n"])

    return _until(size, sentences(), "")


def mixed(size):
    """English, code and Chinese in turn, with emoji, accents and Cyrillic between them."""
    draw = random.Random(SEED)
    third = size // 3
    sources = [text.split("\n") for text in (english(third), code(third), chinese(third))]
    extras = [
        "👩‍👩‍👧 👍🏽 🇩🇪",
        "Ça déjà vu, naïve Größe",
        "Съешь же ещё этих мягких французских булок",
        "日本語テキスト",
        "\t\r\n",
    ]

    def lines():
        for i in range(max(map(len, sources))):
            yield from (lines[i] for lines in sources if i < len(lines))
            yield draw.choice(extras)

    return _until(size, lines(), "\n")


def adversarial(size):
    """Random words that hardly come twice, so that no cache helps, with random runs of whitespace and punctuation."""
    draw = random.Random(SEED)

    def words():
        while True:
            yield "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 14)))
            yield draw.choice([" ", " ", " ", "  ", "\n", "\n\t\t", ", ", "...", " (", "\u3000"])

    return _until(size, words(), "")


def letters(size):
    """Random letters without a space: one piece. At most 200,000 of them, the length that the target names."""
    return "".join(random.Random(SEED).choices("abcdefghijklmnopqrstuvwxyz", k=min(size, 200_000)))


TEXTS = {text.__name__: text for text in (english, code, chinese, mixed, adversarial, letters)}


def _once(parts):
    seen = set()
    for part in parts:
        if part not in seen:
            seen.add(part)
            yield part


def _until(size, parts, separator):
    taken, length = [], 0
    for part in parts:
        taken.append(part)
        length += len(part) + len(separator)
        if length >= size:
            break
    return separator.join(taken)[:size]


def _sources():
    for name in ("stdlib", "purelib"):
        # Folder by folder, so that a short text reads no more of the tree than it needs.
        for entry in sorted(Path(sysconfig.get_path(name)).iterdir()):
            if entry.name == "site-packages":
                continue
            for path in [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")):
                try:
                    yield path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):  # test data that is broken on purpose
                    continue


def _paragraphs():
    from pydoc_data.topics import topics

    for topic in topics.values():
        yield from topic.split("\n\n")
    for source in _sources():
        for docstring in re.findall(r'"""(.*?)"""', source, re.DOTALL):
            yield from docstring.split("\n\n")


def _unindented(paragraph):
    return "\n".join(line.strip() for line in paragraph.strip().split("\n"))


def _is_prose(paragraph):
    """Whether a paragraph is long, and mostly lower-case letters and spaces: no tables, no code, no signatures.

    One that spells a special token is left out: Hugging Face's tokenizers read the token there, tiktoken its letters.
    """
    if "<|endoftext|>" in paragraph:
        return False
    return len(paragraph) >= 120 and sum(map(paragraph.count, " etaoinsrhldcumfpgwybvk")) >= 0.86 * len(paragraph)
