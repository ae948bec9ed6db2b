"""The packages import one way, and live beside Hugging Face's, one of which has the name of ours."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# bench -> model -> kernels; tokenizer stands alone.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "tokenizer": {"tokenizer"},
    "model": {"model", "kernels"},
    "bench": {"bench", "model", "kernels", "tokenizer"},
}
# The command line, python -m model, turns text into tokens and back; nothing else in model does.
EXCEPTIONS = {("model/__main__.py", "tokenizer")}


def imported_packages(path):
    """The top-level packages that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield path.relative_to(ROOT).parts[0] if node.level else node.module.partition(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    files = sorted((ROOT / package).rglob("*.py"))
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imported_packages(path)
        if name in MAY_IMPORT.keys() | {"tests"} and name not in MAY_IMPORT[package]
    }
    assert wrong <= EXCEPTIONS


def test_the_import_reader_sees_each_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "module.py"
    path.write_text(
        "import bench.plots as h\nfrom model.gpt2 import GPT2\nfrom . import x\ndef f():\n    import tokenizer"
    )
    assert sorted(imported_packages(path)) == ["bench", "kernels", "model", "tokenizer"]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_transformers_does_not_take_our_kernels_for_hugging_faces():
    """transformers asks for a range of versions of `kernels`; ours lies outside it, and generation works."""
    code = """
import torch, kernels, model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_kernels_available
theirs = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=16, eos_token_id=0))
out = theirs.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(is_kernels_available(), tuple(out.shape) == (1, 7), kernels.__file__)
"""
    available, generated, where = run(code)[-3:]
    assert (available, generated) == ("False", "True")
    assert Path(where) == ROOT / "kernels" / "__init__.py"


@pytest.mark.parametrize("package", ["model", "kernels"])
def test_importing_loads_nothing_that_is_not_needed(package):
    """No test-time dependency, and nothing slow that only some calls need."""
    loaded = set(run(f"import sys, {package}; print(*sys.modules)"))
    assert not loaded & {
        "transformers",
        "tiktoken",
        "matplotlib",
        "huggingface_hub",
        "safetensors",
        "tokenizer",
        "bench",
    }
