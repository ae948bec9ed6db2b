"""The README's tree names each file of the packages once, and no other; its race is found."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "model", "tokenizer", "bench")
LEFT_OUT = {"__pycache__", "__init__.py", "py.typed", "results"}  # results/ is named as a whole


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


LAUNCH = """
x = torch.arange(256, device="cuda", dtype=torch.float32)
scratch, out = torch.empty_like(x), torch.empty_like(x)
reverse[(1,)](x, scratch, out, N=256)
assert torch.equal(out, x.flip(0))
"""


def test_the_race_on_the_first_screen_is_found_and_its_barrier_mends_it(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (kernel,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def reverse" in block)
    mended = re.sub(r"# (tl\.debug_barrier\(\)).*", r"\1", kernel)
    assert mended != kernel
    path = tmp_path / "race.py"
    for source, status in ((kernel, 3), (mended, 0)):
        path.write_text(f"import torch\nimport triton\nimport triton.language as tl\n\n\n{source}{LAUNCH}")
        command = [sys.executable, "-m", "kernels.simulator", "--arch", "sm_90", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        said = re.search(
            r"    (GlobalMemoryRace: reverse: global-memory race).*?\n    (wrote, and nothing orders)", text
        )
        assert all((words in done.stderr) == (status == 3) for words in said.groups())
