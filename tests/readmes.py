"""The READMEs as tests see them: their Python blocks, their commands, the files that their trees name."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "model", "tokenizer", "bench", "tests")
READMES = [ROOT / "README.md"]
READMES += sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md") if "results" not in path.parts)
PROGRAMS = ("make", "pip", "pytest", "python", "torchrun")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """The Python blocks of a README."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path):
    """The commands of a README, in its indented lines and between backquotes, without what a # explains."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    quoted = [quote for line in prose for quote in re.findall(r"`([^`]+)`", line)]
    found = [re.sub(r"\s+#.*", "", line.removeprefix("$ ")).strip() for line in indented + quoted]
    found = [line.removeprefix(".venv/bin/") for line in found]
    return [line for line in found if line.split()[:1] and line.split()[0] in PROGRAMS and len(line.split()) > 1]


def listed(path):
    """The files that a README's tree names: each line is an indentation, names, and what they hold."""
    for tree in re.findall(r"```\n(\w+/[^\n]*\n.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
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
