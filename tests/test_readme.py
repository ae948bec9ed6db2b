"""The README's tree names each file of the packages once, and no other."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "model", "tokenizer", "bench")
LEFT_OUT = {"__pycache__", "__init__.py", "results"}  # results/ is named as a whole


def listed(tree):
    """The files that the tree names: each line is an indentation, names, and what they hold."""
    folders = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = []
        for word in line.split():
            if not re.fullmatch(r"[\w.-]+/|[\w-]+\.[a-z]+", word):
                break
            names.append(word)
        folders[depth:] = [name.rstrip("/") for name in names if name.endswith("/")]
        yield from ("/".join([*folders[:depth], name]) for name in names if not name.endswith("/"))


def test_the_tree_names_each_file_once():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The tree, in reading order")[1].split("```")[1].strip("\n")
    named = Counter(name for name in listed(tree) if name.startswith(PACKAGES))
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    files = {path.as_posix() for path in paths if not LEFT_OUT & set(path.parts)}
    assert named.keys() - files == set(), "the README's tree names files that are not there"
    assert files - named.keys() == set(), "the README's tree lacks files"
    assert set(named.values()) == {1}
    assert all(len(line) <= 132 for line in tree.splitlines())
