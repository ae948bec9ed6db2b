"""Other people's kernels: a few cases as they are in the table, what a fault looks like there, wrong calls."""

import json
import sys

import pytest
import torch
import triton
import triton.language as tl
from optional import needs

from bench import public_kernels
from bench.lib.gate import OK
from bench.lib.public import cases, cases_of, tutorials
from bench.lib.public.cases import Case, judged, run_case

pytestmark = pytest.mark.simulate


def case(words):
    (found,) = (case for case in cases_of() if words in str(case))
    return found


@needs("liger_kernel")
@pytest.mark.parametrize("name", ["GeGLU", "SwiGLU", "sparsemax", "total variation"])
def test_kernels_of_liger(name):
    row = run_case(case(f"liger-kernel: {name}"), "sm_90", seed=1)
    assert row["status"] == OK
    assert row["launches"] >= len(row["kernels"]) >= 1
    assert row["global_bytes"] > 0


@needs("fla")
def test_kernels_of_flash_linear_attention(capfd, tmp_path):
    """By the command, for the package looks at the GPU when it is imported."""
    path = tmp_path / "rows.json"
    command = ["--package", "fla-core", "--kernel", "L2 norm", "--arch", "sm_80", "--json", str(path)]
    assert public_kernels.main(command) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["status"] == OK
    assert row["kernels"] == ["l2norm_bwd_kernel", "l2norm_fwd_kernel"]
    assert row["launches"] == 2  # what the autotuner tried is not counted
    assert "| L2 norm; backward |" in capfd.readouterr().out


@triton.jit
def _racing_kernel(x_ptr, o_ptr, N: tl.constexpr):
    tl.store(o_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


def double(x):
    o = torch.empty_like(x)
    _racing_kernel[(2,)](x, o, N=32)
    return o


def test_a_fault_is_a_row():
    inputs = {"x": torch.randn(32)}
    mine = Case("mine", "a copy", "32", torch.float32, lambda randn: (inputs, double, lambda x: x * 1), gradients=False)
    row = run_case(mine, "sm_80")
    assert row["status"].startswith("GlobalMemoryRace: _racing_kernel: ")
    text = public_kernels.markdown({"triton": "3", "torch": "2", "date": "2026-01-01", "command": "python"}, [row])
    assert "1 runs of 1 calls: 0 right and without a fault" in text
    assert "| **GlobalMemoryRace**: _racing_kernel" in text


def test_what_counts_as_right():
    exact = {"output": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    eps = torch.finfo(torch.float32).eps
    near = {"output": torch.tensor([1.0, 2.0 + 4 * eps])}
    assert judged(near, near, exact, eps) == (2 * eps, 2 * eps, OK)
    assert judged(near, exact, exact, eps)[2] == OK
    assert judged({"output": torch.tensor([1.0, 2.1])}, near, exact, eps)[2].startswith("failed: error of output")
    assert judged({"output": torch.tensor([1.0, float("nan")])}, near, exact, eps)[2].startswith("failed")
    assert judged({"output": torch.tensor([1.0])}, near, exact, eps)[2] == "failed: output has another shape"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--package", "nobody"], "no such case; the packages are"),
        (["--arch", "sm_70"], "invalid choice"),
        (["--json", "bench"], "it is a directory"),
    ],
)
def test_wrong_calls(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(public_kernels.Path(public_kernels.__file__).parents[1])
    with pytest.raises(SystemExit) as stopped:
        public_kernels.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(public_kernels, "version_of", lambda package: None)
    with pytest.raises(SystemExit):
        public_kernels.main(["--package", "liger"])
    assert "liger-kernel is not installed: its cases are left out" in capsys.readouterr().err


TUTORIAL = """
import torch, triton
import triton.language as tl
DEVICE = triton.runtime.driver.active.get_active_torch_device()
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + tl.load(y_ptr + i, mask=i < n), mask=i < n)
def add(x, y):
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), BLOCK=1024)
    return out
kept = 3
z = add(torch.zeros(3), torch.zeros(3))
also = z + kept
raise SystemExit("a script that is run, not read")
@triton.testing.perf_report(triton.testing.Benchmark(nothing))
def benchmark(): ...
benchmark.run()
"""


def test_a_tutorial_is_read_for_its_definitions_alone(tmp_path, monkeypatch):
    (tmp_path / "01-vector-add.py").write_text(TUTORIAL)
    monkeypatch.setenv(tutorials.VARIABLE, str(tmp_path))
    row = run_case(case("01, vector addition"), "sm_90", seed=1)
    assert (row["status"], row["kernels"]) == ("ok", ["add_kernel"])
    assert len(row["version"]) == 12
    module = sys.modules["tutorial_01"]
    assert module.kept == 3
    assert not {"z", "also", "benchmark"} & vars(module).keys()


def test_without_a_checkout_the_tutorials_have_no_version(tmp_path, monkeypatch):
    monkeypatch.delenv(tutorials.VARIABLE, raising=False)
    assert cases.version_of(tutorials.TUTORIALS) is None
    monkeypatch.setenv(tutorials.VARIABLE, str(tmp_path))
    assert cases.version_of(tutorials.TUTORIALS) is None
