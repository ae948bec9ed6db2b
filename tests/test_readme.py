"""What the READMEs say is run: each Python block by itself, each command made small; their trees name every file."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from optional import needs
from readmes import FOLDERS, READMES, ROOT, blocks, commands, listed, name_of

from model import GPT2, GPT2Config
from model.convert import convert
from tokenizer import GPT2Tokenizer
from tokenizer.prepare import main as prepare

PACKAGES = FOLDERS[:4]
LEFT_OUT = {"__pycache__", "__init__.py", "py.typed", "results"}  # results/ is named as a whole
MOST_LINES = 250  # of the first README
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_the_trees_name_each_file_once():
    named = Counter(name for path in READMES for name in listed(path) if name.startswith(PACKAGES))
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    files = {path.as_posix() for path in paths if not LEFT_OUT & set(path.parts)}
    assert named.keys() - files == set(), "the READMEs' trees name files that are not there"
    assert files - named.keys() == set(), "the READMEs' trees lack files"
    assert set(named.values()) == {1}


def test_the_first_is_short_and_links_lead_somewhere():
    assert len(READMES[0].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, section = link.partition("#")
            if not file.startswith("http"):
                target = path.parent / file if file else path
                assert target.exists(), f"{name_of(path)}: {link}"
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if section else []
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert not section or section in slugs, f"{name_of(path)}: {link}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory to be in, where a network would give "gpt2", and what the READMEs name is there: all of it tiny."""
    here = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64))
    snapshot = here / "hub" / "models--gpt2" / "snapshots" / "abc"
    for directory in (snapshot, here / "out" / "tiny", here / "out" / "gpt2"):
        model.save_pretrained(directory)
        GPT2Tokenizer.from_pretrained("gpt2").save_pretrained(directory)
    refs = here / "hub" / "models--gpt2" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    convert(here / "out" / "tiny", here / "124M", "openai")
    convert(here / "out" / "tiny", here / "nanogpt", "nanogpt")
    (here / "nanogpt" / "ckpt.pt").rename(here / "out" / "ckpt.pt")
    (here / "texts").mkdir()
    for file in (here / "texts" / "a.txt", here / "book.txt"):
        file.write_text("It was the best of times, it was the worst of times.\n" * 400, encoding="utf-8")
    assert prepare([str(here / "texts"), "--out", str(here / "data"), "--processes", "1"]) == 0
    (here / "script.py").write_text("import torch\nassert torch.ones(2, device='cuda').sum() == 2\n")
    return here


@pytest.fixture
def there(world, monkeypatch):
    """In that directory, with that hub."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return world


# The kernel of the first screen has a test of its own, at the end.
BLOCKS = [
    pytest.param(block, id=f"{name_of(path)}-{number}", marks=needs("transformers") if "transformers" in block else ())
    for path in READMES
    for number, block in enumerate(blocks(path))
    if "def reverse" not in block
]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_runs_by_itself(block, there, tmp_path):
    """Where it says "cuda", in the simulator; where it holds tests, by pytest, beside ours."""
    script = tmp_path / "test_block.py"
    script.write_text(block, encoding="utf-8")
    if '"cuda"' in block or "def test_" in block:
        program = ["kernels.simulator"] if '"cuda"' in block else ["pytest", "-q", "-p", "no:cacheprovider"]
        hub = {"HF_HUB_CACHE": str(there / "hub"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", *program, str(script)]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | hub, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        runpy.run_path(str(script))


SMALL = ["--size", "tiny", "--dtype", "float32", "--steps", "1", "--batch", "1", "--seq-len", "8", "--device", "cpu"]
# What makes a command small: its own options come first, and of two the last one counts.
MORE = {
    "model": ["--max-new-tokens", "2", "--device", "cpu"],
    "model.train": ["--data", "data", *SMALL],
    "model.evaluate": ["--stride", "32", "--device", "cpu"],
    "model.convert": [],
    "tokenizer": [],
    "tokenizer.prepare": ["--out", "prepared", "--processes", "1"],
    "kernels.simulator": [],
    "bench.environment": [],
}
COMMANDS = {command: name_of(path) for path in READMES for command in commands(path)}


def run_module(module, arguments):
    """`python -m module arguments`, in this process: the exit status."""
    more = [*MORE[module], *(["--out", f"out/run{len(arguments)}"] if module == "model.train" else [])]
    main = importlib.import_module(f"{module}.__main__" if (ROOT / module / "__main__.py").exists() else module).main
    try:
        return main(*([[*arguments, *more]] if main.__code__.co_argcount else []))
    except SystemExit as stop:
        return stop.code


def parse_only(module, arguments):
    needs_gpu = "cuda" in arguments and not torch.cuda.is_available()
    found = importlib.import_module(module)
    if not found.main.__code__.co_argcount:
        found.main()
    elif hasattr(found, "parser") and not needs_gpu:
        found.parser().parse_args(arguments)
    else:
        with pytest.raises(SystemExit, match=r"^0$"):
            found.main(["--help"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command)
def test_each_command_runs(command, there):
    words = shlex.split(command.replace("[", "").replace("]", ""))
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    program, *arguments = words
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, check=True)
    elif program == "pytest":
        paths = [word for word in arguments if word.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths)
        if "-m" in arguments:
            assert f"{arguments[arguments.index('-m') + 1]}:" in (ROOT / "pyproject.toml").read_text()
    elif program == "pip":
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        assert arguments[:3] == ["install", "-e", "."] or arguments[1] in pins
    elif arguments[0] == "-m" and arguments[1] in MORE and arguments[2:] and "race.py" not in arguments:
        assert arguments[1] != "kernels.simulator" or simulated(arguments[2:], there)
        assert arguments[1] == "kernels.simulator" or run_module(arguments[1], arguments[2:]) in (0, None)
    elif arguments[0] == "-m" and arguments[1] == "model.write":
        from model.write.__main__ import parse

        parse(arguments[2:])  # tests/model/test_write.py has it serve
    elif arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        is_named = any(word.isupper() or word.endswith(".json") for word in arguments[1:])  # FILE, A.json
        parse_only(f"bench.{Path(arguments[0]).stem}", [] if is_named else arguments[1:])


def simulated(arguments, there):
    """`python -m kernels.simulator` takes the process over."""
    arguments = [word for word in arguments if word not in ("FILE", "--json", "arguments")]
    command = [sys.executable, "-m", "kernels.simulator", *arguments]
    return subprocess.run(command, cwd=there, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0


def test_reading_leaves_nothing_behind():
    """What the blocks and commands write lies in out/ and data/, which git ignores, or where the reader says."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    written = {word for path in READMES for block in blocks(path) for word in re.findall(r'save_\w+\("([^"/]+)', block)}
    assert {f"/{directory}/" for directory in written} <= set(ignored)


LAUNCH = """
x = torch.arange(256, device="cuda", dtype=torch.float32)
scratch, out = torch.empty_like(x), torch.empty_like(x)
reverse[(1,)](x, scratch, out, N=256)
assert torch.equal(out, x.flip(0))
"""


def test_the_race_on_the_first_screen_is_found_and_its_barrier_mends_it(tmp_path):
    text = READMES[0].read_text(encoding="utf-8")
    (kernel,) = (block for block in blocks(READMES[0]) if "def reverse" in block)
    mended = re.sub(r"# (tl\.debug_barrier\(\)).*", r"\1", kernel)
    assert mended != kernel
    path = tmp_path / "race.py"
    for source, status in ((kernel, 3), (mended, 0)):
        path.write_text(f"import torch\nimport triton\nimport triton.language as tl\n\n\n{source}{LAUNCH}")
        command = [sys.executable, "-m", "kernels.simulator", "--arch", "sm_90", str(path)]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        said = re.search(
            r"    (GlobalMemoryRace: reverse: global-memory race).*?\n    (wrote, and nothing orders)", text
        )
        assert all((words in done.stderr) == (status == 3) for words in said.groups())
