"""`python -m kernels.simulator script.py`, and the fixture: other people's programs under the simulator's checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kernels.simulator import SimulatorError, simulate
from kernels.simulator.__main__ import main
from kernels.simulator.gpu_names import gpu_names
from kernels.simulator.ptx import parse

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.simulate

KERNELS = """
import sys, torch, triton, triton.language as tl

@triton.autotune(configs=[triton.Config({"B": b}) for b in (128, 256)], key=["n"])
@triton.jit
def add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)

@triton.jit
def total(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    s = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    tl.store(o, tl.load(o) + s)

@triton.jit
def beyond(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i), mask=i < n)

@triton.jit
def printing(x, B: tl.constexpr):
    tl.device_print("x", tl.load(x + tl.arange(0, B)))
"""


def line_of(words):
    return 1 + next(i for i, line in enumerate(KERNELS.splitlines()) if words in line)


GOOD = f"""{KERNELS}
assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (8, 0)
x, y = torch.randn(100, device="cuda"), torch.randn(100).pin_memory().cuda(non_blocking=True)
assert x.is_cuda
o = torch.empty_like(x, device=torch.device("cuda:0"))
add[lambda meta: (triton.cdiv(100, meta["B"]),)](x, y, o, 100)
torch.cuda.synchronize()
torch.testing.assert_close(o, x + y)
total[1,](x, o.zero_(), 100, B=128)
torch.testing.assert_close(o[0], x.sum())
print(sys.argv[1:], triton.testing.do_bench(lambda: 1 / 0, quantiles=[0.2, 0.8]))
"""


@pytest.fixture
def run(tmp_path):
    def run(program, *options, arguments=()):
        path = tmp_path / "program.py"
        path.write_text(program)
        command = [sys.executable, "-m", "kernels.simulator", *options, str(path), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_program_written_for_a_gpu_runs_and_is_counted(run, tmp_path):
    done = run(GOOD, "--arch", "sm_80", "--seed", "1", "--report", "--json", "report.json", arguments=["a", "--seed"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['a', '--seed'] [nan, nan]\n"
    assert "1 benchmarks were not run: the simulator measures no time" in done.stderr
    assert "2 configurations of autotuned kernels were run once each" in done.stderr
    assert done.stderr.endswith("4 launches of 2 kernels on a simulated sm_80: no fault\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["arch"], report["seed"], report["lane"]) == ("sm_80", 1, "simulated")
    assert report["kernels"]["add"]["launches"] == 3
    assert report["kernels"]["add"]["global_read"] == 3 * 2 * 100 * 4
    assert f"{3 * 2 * 100 * 4:,}" in done.stderr


ASKING = """
import torch, triton
cuda = torch.cuda
torch.manual_seed(0), cuda.manual_seed_all(1), torch.set_default_device("cuda")
x = torch.randn(4, generator=torch.Generator(device="cuda").manual_seed(1)).to(0).cuda(0).to(torch.device("cuda", 0))
assert isinstance(torch.default_generator, torch.Generator) and x.get_device() == 0 and x.is_cuda
start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
with cuda.stream(cuda.Stream()), cuda.device(x.device.index), cuda.device_of(x):
    start.record(), end.record(cuda.current_stream()), cuda.synchronize()
x.record_stream(cuda.default_stream())
cuda.reset_peak_memory_stats(), cuda.set_rng_state(cuda.get_rng_state()), cuda.nvtx.range_push("x")
chip, more = cuda.get_device_properties("cuda"), triton.runtime.driver.active.utils.get_device_properties(0)
assert chip.shared_memory_per_block_optin == more["max_shared_mem"] and chip.multi_processor_count == 84
print(start.elapsed_time(end), cuda.max_memory_allocated(), cuda.is_bf16_supported(), chip.L2_cache_size)
kept: cuda.CUDAGraph | cuda.Stream | None = None
cuda.CUDAGraph()
"""


def test_what_programs_ask_of_torch_cuda_has_an_answer(run):
    done = run(ASKING, "--arch", "sm_86")
    assert done.stdout == "nan 0 True 6291456\n"
    assert "SimulatorError: torch.cuda.CUDAGraph: the simulator captures nothing" in done.stderr
    assert done.returncode == 1


def test_an_autotuner_keeps_no_times_on_disk_and_may_run_one_configuration(run):
    """A cached choice would be read on a GPU of that architecture; and once it was cached, nothing was tried again."""
    program = GOOD.replace('key=["n"]', 'key=["n"], cache_results=True')
    for _ in range(2):
        assert "2 configurations of autotuned kernels were run once each" in run(program, "--arch", "sm_80").stderr
    done = run(program, "--arch", "sm_80", "--first-configuration")
    assert "1 configurations of autotuned kernels were run once each; the first one was kept, 1 were" in done.stderr
    assert done.stderr.endswith("3 launches of 2 kernels on a simulated sm_80: no fault\n")


def test_an_autotuner_keeps_nothing_of_a_simulation():
    """It caches its driver's clock: one that was simulated first would have timed nothing on a GPU afterwards."""

    @triton.autotune(configs=[triton.Config({"B": b}) for b in (64, 128)], key=["n"])
    @triton.jit
    def fill(x, n, B: tl.constexpr):
        i = tl.arange(0, B)
        tl.store(x + i, 1.0, mask=i < n)

    for n in (32, 64):
        with simulate("sm_80"), gpu_names("sm_80") as skipped:
            fill[(1,)](torch.zeros(n), n)
            assert skipped.configurations == len(skipped.trials) == 2
    assert "do_bench" not in vars(fill)
    with simulate("sm_80"), pytest.raises(SimulatorError, match="measures no time"):
        fill[(1,)](torch.zeros(16), 16)


@pytest.mark.parametrize(
    ("launch", "status", "words"),
    [
        (
            "total[2,](x, o, 100, B=64)",
            3,
            [
                "GlobalMemoryRace: total:",
                f"program.py:{line_of('tl.load(o)')}",
                f"program.py:{len(KERNELS.splitlines()) + 4}: total[2,](x, o, 100, B=64)",  # where it was launched
            ],
        ),
        (
            "try: total[2,](x, o, 100, B=64)\nexcept RuntimeError: pass",
            3,
            ["faults that the program caught: 1, first total: global-memory race"],
        ),
        (
            "beyond[1,](x, o, 100, B=128)",
            3,
            ["OutOfBounds: beyond:", "28 threads in all", f"program.py:{line_of('load(x + i), ')}"],
        ),
        ("printing[1,](x, B=64)", 4, ["Unimplemented: printing:"]),
        ("sys.exit(7)", 7, ["0 launches of 0 kernels", "no fault"]),
        (
            "x[100]",
            1,
            ["IndexError", "the program ended with an exception", "Traceback (most recent call last):\n  File"],
        ),
    ],
)
def test_the_exit_status_says_how_it_ended(run, launch, status, words):
    done = run(f'{KERNELS}\nx = torch.randn(100, device="cuda")\no = torch.zeros_like(x)\n{launch}\n')
    assert done.returncode == status, done.stderr
    for word in words:
        assert word in done.stderr
    assert status in (1, 7) or "Traceback" not in done.stderr
    assert "runpy" not in done.stderr


def test_a_module_runs_as_python_runs_it(run, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys\nfrom . import __name__ as name\nprint(name, sys.argv[1:])")
    command = [sys.executable, "-m", "kernels.simulator", "-m", "package", "--arch", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "package ['--arch', 'x']\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a Python program is required, or -m and a module"),
        (["-m"], "a module's name is required"),
        (["nowhere.py"], "nowhere.py: there is no such file"),
        (["bench"], "bench: a directory without __main__.py"),
        (["--json", "bench", "setup.py"], "--json bench: it is a directory; a file is required"),
        (["--seed", "-3", "setup.py"], "invalid whole number from 0 on value: '-3'"),
    ],
)
def test_wrong_commands(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@triton.jit
def _sum_kernel(x_ptr, B: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, B)), 0))


def test_a_place_inside_tritons_library_names_the_line_that_called_it():
    kernel = parse(PTX)
    where = [kernel.where(inst) for inst in kernel.instructions]
    assert where[0] == "/lib/standard.py:263, called at standard.py:293, called at mine.py:93"
    assert where[1] == "/home/mine.py:94"
    with simulate("sm_90") as gpu:
        _sum_kernel[(1,)](torch.ones(64), 64, num_warps=2)
    kernel = gpu.launches[0].program.kernel
    line = _sum_kernel.fn.__code__.co_firstlineno + 2
    ours = [where for inst in kernel.instructions if "standard.py" in (where := kernel.where(inst))]
    assert ours
    assert all(where.endswith(f", called at test_program.py:{line}") for where in ours)


PTX = """.version 8.7
.target sm_90a
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0
)
.reqntid 32
{
	.reg .b32 %r<3>;
	.loc	2 263 15                        // standard.py:263:15 @[ standard.py:293:36 @[ mine.py:93:57 ] ]
	mov.b32 %r1, 1;
	.loc	1 94 3                          // mine.py:94:3
	mov.b32 %r2, 2;
	ret;
}
	.file	1 "/home/mine.py"
	.file	2 "/lib/standard.py"
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arch", "sm_70"], "invalid choice: 'sm_70'"),
        (["--json", "no/such/report.json"], "there is no directory no/such"),
        (["--seed", "x"], "invalid whole number from 0 on value: 'x'"),
    ],
)
def test_a_wrong_command_is_refused_before_the_program_runs(run, options, words):
    done = run("print('ran')", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


def test_the_fixture_simulates(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest('pytest_plugins = ["kernels.simulator.fixtures"]')
    pytester.makepyfile(
        test_mine=f"""{KERNELS}
import pytest

def run(simulated, blocks):
    total[blocks,](torch.ones(100), torch.zeros(1), 100, B=64)
    assert len(simulated.launches) == 1
    return simulated.arch

def test_right(simulated):
    assert run(simulated, 1) == "sm_90"

@pytest.mark.parametrize("simulated", ["sm_80", ("sm_86", 1)], indirect=True)
def test_racing(simulated):
    run(simulated, 2)
"""
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*GlobalMemoryRace: total: *test_mine.py:*"])
