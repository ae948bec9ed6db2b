"""What every bench shares: arguments, the clock, the correctness gate, the environment record, the JSON rows.

A bench is shapes, providers, one `flops()` or `bytes()` with its formula, and a `main()`:

    parser = harness.Parser("bench/my_sweep.py", __doc__)      # brings --device, --quick and --out
    args = parser.parse_args(argv)
    environment = harness.environment(args.device, args.command)
    for shape in harness.progress(shapes, "my sweep"):
        error, status = harness.judge({"y": (actual, baseline, oracle)}, factor=harness.FORWARD_FACTOR)
        timings = harness.measure({name: make for those whose status is harness.OK}, args.device)
    harness.finish(args.out / "my_sweep.json", environment, rows, columns=(...))

Rules that it keeps: a provider that fails its gate gets no time; providers are interleaved, so that a drifting clock
meets all of them; out-of-memory is the only error that becomes a value; a number that was not measured is None in the
JSON and "not measured" in print.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from bench import plots

OK = "ok"
OUT_OF_MEMORY = "out of memory"
NOT_MEASURED = "not measured"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The rule of tests/numerics.py: error <= factor * (error of plain PyTorch in the same dtype) + a few ulps.
FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULPS = 2


class UsageError(ValueError):
    """A request that cannot be served, found before work starts: one line on stderr, exit code 2."""


class Parser(argparse.ArgumentParser):
    """The arguments that every bench has: --device, --quick, --out. A wrong one is one line and exit code 2.

    parse_args gives `device` as a torch.device, `out` as a directory proven writable, and `command`, as one would type
    it. check(args), if given, raises UsageError; it runs before the output directory is made.
    """

    def __init__(self, script, description, check=None):
        super().__init__(prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.check = check
        self.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if any")
        self.add_argument("--quick", action="store_true", help="few small shapes, few repeats: does it run?")
        self.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (default: out)")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        args = super().parse_args(argv, namespace)
        args.command = shlex.join(["python", self.prog, *argv])
        try:
            args.device = resolve_device(args.device)
            if self.check is not None:
                self.check(args)
            args.out = output_directory(args.out)
        except UsageError as error:
            self.error(str(error))
        return args


def resolve_device(name):
    """The torch.device for "auto", "cuda" or "cpu". UsageError: no GPU, or one whose kernels would be interpreted."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UsageError("--device cuda: torch finds no GPU here (torch.cuda.is_available() is False)")
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("TRITON_INTERPRET is set: kernels would be interpreted, and the interpreter is never timed")
    return torch.device("cuda")


def positive(text):
    """An argument's type: a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "positive whole number"  # argparse's message names the type


# Where kernels of each dtype run without a GPU. The interpreter gets bf16 products wrong.
LANES = {"float32": "interpret", "float16": "interpret", "bfloat16": "simulate sm_80"}


def rows_by_lane(rows_in_lane, cases, *arguments):
    """The rows of rows_in_lane(lane, cases, *arguments) for the cases of each lane, called in that lane's process."""
    rows = []
    for lane in dict.fromkeys(LANES[case.dtype] for case in cases):
        mine = [case for case in cases if LANES[case.dtype] == lane]
        rows += in_process_of_lane(lane, rows_in_lane, lane, mine, *arguments)
    return rows


def in_process_of_lane(lane, function, *arguments):
    """function(*arguments) in a process where kernels run in that lane: "interpret", or another.

    It is a process of its own, since Triton chooses its interpreter when kernels are imported.
    """
    interpreted = {"TRITON_INTERPRET": "1" if lane == "interpret" else "0"}
    with mock.patch.dict(os.environ, interpreted), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def output_directory(path):
    """Makes the directory `path` and proves that it can be written; returns it. UsageError if not."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}; a directory that can be written is required") from None
    return path


def progress(items, what):
    """Iterates with a progress bar on stderr; silent where stderr is no terminal."""
    return tqdm(items, desc=what, disable=None, leave=False)


# The clock


def attempt(function, *args):
    """(function(*args), OK), or (None, OUT_OF_MEMORY). Any other error is a bug and is raised."""
    try:
        return function(*args), OK
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, OUT_OF_MEMORY


def _is_out_of_memory(error):
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


MAX_REPEATS = 200  # of a call in a block


class Clock:
    """Times calls on one device.

    cuda: device events around each call. Before each the L2 cache is overwritten, which also gives the host the time
    to run ahead; where it still cannot keep up, its gaps between launches are part of the time, as they are in a model.
    cpu: the wall clock; caches are as the call before left them.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device=self.device)

    def times(self, call, repeats):
        """`repeats` times of call(), ms."""
        return (self._times_cuda if self.device.type == "cuda" else self._times_cpu)(call, repeats)

    def _times_cuda(self, call, repeats):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            self.flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) for start, stop in events]

    def _times_cpu(self, call, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def block(self, make, budget_ms, is_warm=False):
        """Times of call = make(), as many as fit the budget, after an untimed call and a trial.

        A call longer than the budget is its own trial, timed once; is_warm: and without the untimed one before it.
        """
        call = make()
        for _ in range(1 if is_warm else 2):
            trial = self.times(call, 1)
        repeats = int(budget_ms / max(trial[0], 1e-3))
        return self.times(call, min(repeats, MAX_REPEATS)) or trial


def measure(makes, device, *, quick=False, clock=None, rounds=5, budget_ms=60.0, limit_s=None, is_warm=False):
    """Times providers against each other: {name: {"median_ms", "p20_ms", "p80_ms", "status"}}.

    makes: {name: make}; make() does what is not timed (the forward pass before a backward) and returns the call that is
    timed, without arguments. Providers take turns in blocks, and what make() built is freed after its block, so that no
    provider's memory counts against another's. One that runs out of memory has None for its times and that status.

    limit_s: after so many seconds no third or later round starts. is_warm: the caller has run each call once, so that
    those longer than budget_ms, the time of a block, need no untimed one.
    """
    clock = Clock(device) if clock is None else clock
    rounds, budget_ms = (2, 20.0) if quick else (rounds, budget_ms)
    times = {name: [] for name in makes}
    statuses = dict.fromkeys(makes, OK)
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and limit_s is not None and time.perf_counter() - start > limit_s:
            break
        for name, make in makes.items():
            if statuses[name] == OK:
                block, statuses[name] = attempt(clock.block, make, budget_ms, is_warm)
                times[name] += block or []
    return {name: summary(times[name] if statuses[name] == OK else []) | {"status": statuses[name]} for name in makes}


def summary(times):
    """The median and the 20th and 80th percentiles of times in ms, or None for each where there are none."""
    median, p20, p80 = np.percentile(times, (50, 20, 80)).tolist() if len(times) else (None, None, None)
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}


def peak_memory_mb(call, device):
    """The most memory allocated at once during call() above what was allocated before it, in MB of 2**20 bytes.

    None on a CPU, where it is not measured (and nothing is called).
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# The correctness gate


def judge(results, *, factor):
    """(the largest error, OK) or (it, "failed: ..."), by the tolerance rule; the gate before the clock.

    results: {name: (actual, baseline, oracle)}: a provider's tensors, those of plain PyTorch in the same dtype, and
    those in float64 from the same rounded inputs. Errors are the largest absolute differences; one that is not finite
    comes back as None. The ulps are those of the largest value in any of the results: gradients are sums of terms of
    one scale, and one of them may be small by cancellation.
    """
    worst, status = 0.0, OK
    largest = max(oracle.abs().max().item() for _, _, oracle in results.values())
    largest = max(largest, torch.finfo(torch.float32).tiny)
    for name, (actual, baseline, oracle) in results.items():
        error, baseline_error = ((x.double() - oracle).abs().max().item() for x in (actual, baseline))
        bound = factor * baseline_error + FLOOR_ULPS * torch.finfo(actual.dtype).eps * largest
        if not np.isfinite(error):
            return None, f"failed: {name} holds NaN or infinity"
        if error > bound:
            status = f"failed: error of {name} is {error:.1e}, allowed {bound:.1e}"
        worst = max(worst, error)
    return worst, status


# The record


def environment(device, command):
    """Where and how rows are measured: device, driver, versions, commit, command, date. None: unknown."""
    device = torch.device(device)
    cpu = _cpu_name()
    try:
        import triton
    except ImportError:  # a platform without triton still times eager and SDPA
        triton = None
    changes = _output_of("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: how far others shared the CPU
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _output_of(*command):
    """What a command prints, run where the code lies; None if there is no such command or it fails."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def save(path, environment, rows):
    """Writes {"environment": ..., "rows": ...} to `path`. Returns the path."""
    return write(path, json.dumps({"environment": environment, "rows": rows}, indent=1, allow_nan=False) + "\n")


def write(path, text):
    """Writes `text` to `path` under a temporary name and renames it. Returns the path."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cell(value):
    """A value as text: four significant digits, errors and other tiny numbers in powers of ten."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:#.4g}"


def table(rows, columns):
    """Rows as aligned plain text under their column names; numbers to the right, words to the left."""
    texts = [[cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, (column, *cells))) for column, *cells in zip(columns, *texts)]
    right = [any(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    lines = [columns, ["-" * width for width in widths], *texts]
    aligned = [
        "  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def finish(path, environment, rows, *, columns, by=None):
    """The end of a bench: saves the rows, draws their charts beside them, prints the table and where the files are.

    by: a field; rows with different values of it get tables of their own, and `columns` is {value: columns}.
    """
    save(path, environment, rows)
    charts = plots.draw(path)
    for value, names in columns.items() if by else ((None, columns),):
        if by and len(columns) > 1:
            print(f"\n{value}")
        print(table([row for row in rows if by is None or row[by] == value], names))
    print()
    for written in (path, *charts):
        print(f"wrote {written}")
