"""The packages import one way, and live beside Hugging Face's, one of which has the name of ours."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from optional import needs

ROOT = Path(__file__).parent.parent

# bench -> model -> kernels; tokenizer stands alone.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "tokenizer": {"tokenizer"},
    "model": {"model", "kernels"},
    "bench": {"bench", "model", "kernels", "tokenizer"},
}
# The commands python -m model and model.train turn text into tokens and back; training reads the tokenizer's shards.
EXCEPTIONS = {(f"model/{name}.py", "tokenizer") for name in ("__main__", "train", "training/data")}


def modules():
    """The file of each module of the project, by its name."""
    paths = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in zip(names, paths)}


def imported(path):
    """The names that a file imports, also inside functions: "a.b" of `import a.b`, "a.b.c" of `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    wrong = {
        (str(path.relative_to(ROOT)), name.partition(".")[0])
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported(path)
        if name.partition(".")[0] in (MAY_IMPORT.keys() | {"tests"}) - MAY_IMPORT[package]
    }
    assert wrong <= EXCEPTIONS


def first_cycle(files):
    """Modules that import each other in a circle, or None; files: as from modules()."""
    graph = {}
    for module, path in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in imported(path)}
        graph[module] = names & files.keys() - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_by_way_of_others():
    """An import inside a function counts, too: it hides a circle and does not open it."""
    assert first_cycle(modules()) is None


def test_the_import_reader_sees_each_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for package in (*MAY_IMPORT, "kernels/inner"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    path = tmp_path / "kernels" / "inner" / "module.py"
    path.write_text(
        "import bench.harness as h\nfrom model.gpt2 import GPT2\nfrom . import x\nfrom ..gelu import gelu\n"
        "def f():\n    import tokenizer"
    )
    assert set(imported(path)) == {
        "bench.harness",
        "model.gpt2.GPT2",
        "kernels.inner.x",
        "kernels.gelu.gelu",
        "tokenizer",
    }
    assert first_cycle(modules()) is None
    (tmp_path / "kernels" / "gelu.py").write_text("def gelu():\n    from kernels.inner import module")
    assert set(first_cycle(modules())) == {"kernels.gelu", "kernels.inner.module"}


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@needs("transformers")
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


@pytest.fixture
def foreign(tmp_path):
    """A directory with the packages of other people that have the names of ours, installed."""
    for package in MAY_IMPORT:
        (tmp_path / "foreign" / package).mkdir(parents=True)
        (tmp_path / "foreign" / package / "__init__.py").write_text("raise SystemExit('somebody else was imported')")
    return tmp_path / "foreign"


COMMANDS = [["-m", "model"], ["-m", "tokenizer"], ["bench/attention_sweep.py"], ["bench/plots.py"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_checkouts_commands_run_where_others_have_its_names(command, foreign):
    """Regression: without an installation a script found no package of ours, or somebody else's."""
    result = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(foreign)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:")


def test_each_script_finds_its_own_checkout_first(foreign):
    """In one process, which imports torch once: what a script puts before all else on the path."""
    paths = sorted((ROOT / "bench").glob("[!_]*.py"))
    scripts = [str(path) for path in paths]
    code = f"""
import runpy, sys
rest = list(sys.path)
for script in {scripts!r}:
    sys.path[:] = [{str(ROOT / "bench")!r}, {str(foreign)!r}, *rest]
    runpy.run_path(script, run_name="script")
    print(sys.path[0])
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert dict(zip(scripts, result.stdout.split(), strict=True)) == dict.fromkeys(scripts, str(ROOT))


@pytest.mark.parametrize(("module", "package"), [("model", "kernels"), ("model.__main__", "tokenizer")])
def test_somebody_elses_package_found_first_is_named_with_the_remedy(module, package, foreign):
    for other in MAY_IMPORT.keys() - {package}:
        shutil.rmtree(foreign / other)
    code = f"import sys; sys.path[:0] = [{str(foreign)!r}, {str(ROOT)!r}]; import {module}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: model needs the package {package} in {ROOT}, but Python finds {foreign / package} (Hugging Face "
        f"has a package kernels, too): run from {ROOT}, put that directory first in "
        "PYTHONPATH, or use an environment without the other package"
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds from a copy of the checkout: hook of setuptools -> (the finished process, the directory of its result)."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *MAY_IMPORT):
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy)

    def build(hook):
        out = copy / hook
        code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
        out.mkdir()
        return subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120), out

    return build


def test_no_wheel_is_built(built):
    """Regression: a wheel of ours would overwrite Hugging Face's kernels, and uninstalling it would delete them."""
    result, out = built("build_wheel")
    assert result.returncode != 0
    assert "not installed by copying" in result.stderr
    assert "pip install -e ." in result.stderr
    assert not list(out.iterdir())


def test_an_editable_install_links_the_packages_and_copies_none(built, tmp_path, foreign):
    result, out = built("build_editable")
    assert result.returncode == 0, result.stderr
    [wheel] = out.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert all(name.startswith(("__editable__", "gpt2_triton-")) for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    # Everything installed here but our own packages: where the environment has links to ROOT, they would come first.
    installed = tmp_path / "installed"
    installed.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if path.name not in MAY_IMPORT and not path.name.startswith("__editable__"):
            (installed / path.name).symlink_to(path)
    code = f"""
import site, sys
sys.path[:0] = sys.argv[1:]
sys.path.append({str(installed)!r})
site.addsitedir({str(tmp_path / "site")!r})
import model
print(model.__file__)
"""
    shutil.rmtree(foreign / "model")
    mere_directory = tmp_path / "elsewhere"
    (mere_directory / "kernels").mkdir(parents=True)  # comes before links, too, as a namespace package
    ours, refused = str(out.parent / "model" / "__init__.py"), "without the other package"
    for others, ending in (([], ours), ([foreign], refused), ([mere_directory], refused)):
        command = [sys.executable, "-I", "-S", "-c", code, *map(str, others)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.stdout + done.stderr).strip().endswith(ending)
        assert all(f"Python finds {other / 'kernels'} (" in done.stderr for other in others)
