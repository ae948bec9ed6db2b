"""From text to pieces: words, numbers, signs, whitespace. A token never reaches over the end of a piece."""

from functools import cache

from .unicode_classes import ASCII_PATTERN, gpt2_pattern

_pattern = cache(gpt2_pattern)


def pieces(text):
    """The pieces of text by GPT-2's pattern: the definition that `spans.py` is faster than."""
    return (ASCII_PATTERN if text.isascii() else _pattern()).findall(text)
