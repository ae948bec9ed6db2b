"""Nothing has to be installed of ours: commands run by path and as modules, tests without the optional packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))

# Each command as Python runs a file, in a process where nothing else finds the packages; torch is imported once.
EACH_BY_PATH = """
import importlib.util, runpy, sys
root, *names = sys.argv[1:]
before = list(sys.path)
for name in names:
    sys.path[:], sys.argv = before, [name, "--help"]
    try:
        runpy.run_path(f"{root}/bench/{name}.py", run_name="__main__")
    except SystemExit as exit:
        print(name, exit.code, sys.modules.get("bench.lib") is None or sys.modules["bench.lib"].__file__)
    for module in [m for m in sys.modules if m.partition(".")[0] == "bench"]:
        del sys.modules[module]
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the packages: that they may be installed from ROOT does not help there."""
    copy = tmp_path_factory.mktemp("checkout")
    for package in ("bench", "kernels", "model", "tokenizer"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("results", "__pycache__"))
    return copy


def run(*command, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_command_runs_by_its_path_from_anywhere(checkout, tmp_path):
    printed = run("-c", EACH_BY_PATH, checkout, *COMMANDS, cwd=tmp_path, PYTHONPATH="")
    found = [line.split() for line in printed.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
    assert len(COMMANDS) >= 8
    expected = {str(checkout / "bench" / "lib" / "__init__.py"), "True"}  # plots.py needs nothing of it
    assert [(name, code) for name, code, where in found if where in expected] == [(name, "0") for name in COMMANDS]


def test_all_tests_are_collected_without_the_optional_packages():
    plugins = ("-p", "hiding", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    printed = run("-m", "pytest", *plugins, "--collect-only", "-q", cwd=ROOT, PYTHONPATH=str(ROOT / "tests"))
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skipped if not line.endswith("hypothesis is not installed")] == []
    assert "error" not in printed.splitlines()[-1]


def test_what_needs_a_hidden_package_is_skipped_with_its_name():
    """One file of each kind: a module, a test, a fixture, a mark."""
    files = ["tests/test_notebooks.py", "tests/model/test_config.py", "tests/bench/test_transformers_sweep.py"]
    plugins = ("-p", "hiding", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    printed = run("-m", "pytest", *plugins, "-q", "-rs", *files, cwd=ROOT, PYTHONPATH=str(ROOT / "tests"))
    assert "transformers is not installed" in printed
    assert "nbformat is not installed" in printed
    assert " passed" in printed
