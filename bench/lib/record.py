"""The record of a bench: its environment, and its rows on disk as they come.

    with Record(args, columns=(...)) as record:
        for case in record.missing(cases, "my sweep"):      # with --resume, those that the file does not have yet
            record.add(case, rows_of(case))

At each moment the file holds valid JSON. At the end, and on Ctrl-C too, the rows are printed as a table and their
charts are drawn beside the file. A number that was not measured is None in the JSON and "not measured" in print.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from bench import plots
from bench.lib.clock import DeviceLost, attempt
from bench.lib.files import write_file
from bench.lib.gate import OK

NOT_MEASURED = "not measured"
ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED, DEVICE_LOST = 130, 3  # exit codes
KEPT = ("rows", "done", "broken", "failed")  # what a file holds for --resume


def environment_of(device, command):
    """Where and how rows are measured: device, driver, versions, commit, command, date. None: unknown.

    A copy without git's data takes its commit from BENCH_COMMIT; `sources` tells code apart in any case.
    """
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
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: how far others shared the CPU
        "commit": _output_of("git", "rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        "dirty": None if changes is None else bool(changes),
        "sources": sources(),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def sources():
    """Twelve digits that change with any Python file of the packages."""
    digest = hashlib.sha256()
    for package in ("bench", "kernels", "model", "tokenizer"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _output_of(*command):
    """What a command prints, run where the code lies; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
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


def save(path, environment, rows, **more):
    """Writes {"environment": ..., "rows": ..., and more} to `path`. Returns the path."""
    data = {"environment": environment, "rows": rows, **more}
    return write_file(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


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


def progress(items, what):
    """Iterates with a progress bar on stderr; silent where stderr is no terminal."""
    return tqdm(items, desc=what, disable=None, leave=False)


class Record:
    """The rows of one run of a bench, in args.path, rewritten after each case.

    columns: of the printed table. by: a field; rows with different values of it get tables of their own, and `columns`
    is {value: columns}. order: the rows' sort key. title: a line above the table. charts: whether any is to be drawn.

    Besides rows, the file holds `done`, the cases that it has, and `broken`: [case, provider, status] of what took the
    GPU with it, so that a second run goes on behind it; `failed`: [case, status] of cases that gave no rows.
    """

    def __init__(self, args, *, columns, by=None, order=None, title=None, charts=True):
        self.path, self.environment = args.path, args.environment
        self.columns, self.by, self.order, self.title = columns, by, order, title
        self.with_charts = charts and not args.no_charts
        self.rows, self.done, self.broken, self.failed, self.case = [], [], [], [], None
        if args.earlier:
            self.rows, self.done, self.broken, self.failed = (args.earlier[key] for key in KEPT)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, DeviceLost) and error.provider is None:
            self.failed.append([str(self.case), str(error)])
            self.add(self.case, [])
        elif isinstance(error, DeviceLost):
            self.broken.append([str(self.case), error.provider, str(error)])
            self.save()
        if error is None or isinstance(error, (KeyboardInterrupt, DeviceLost)):
            self.finish()
        if isinstance(error, KeyboardInterrupt):
            print(f"interrupted: {len(self.rows)} rows; --resume goes on from here", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if isinstance(error, DeviceLost):
            print(f"{self.case}, {error.provider}: {error}\nthe GPU answers no more; --resume goes on", file=sys.stderr)
            sys.exit(DEVICE_LOST)

    def missing(self, cases, what):
        """Iterates over the cases that the file does not have, with a progress bar where stderr is a terminal."""
        for self.case in progress([case for case in cases if str(case) not in self.done], what):
            yield self.case

    def lost(self, provider):
        """What happened to the GPU when this provider ran the present case in an earlier run, or None."""
        return next((s for case, name, s in self.broken if (case, name) == (str(self.case), provider)), None)

    def add(self, case, rows):
        """Adds the rows of a case and writes the file."""
        self.rows += rows
        self.done.append(str(case))
        self.save()

    def add_from(self, case, rows_of, *args):
        """Adds rows_of(*args). Where what is not a provider's own fails, that is noted, and the next case is due."""
        rows, status = attempt(rows_of, *args)
        if status != OK:
            self.failed.append([str(case), status])
        self.add(case, rows or [])

    def save(self):
        if self.order is not None:
            self.rows.sort(key=self.order)
        save(self.path, self.environment, self.rows, done=self.done, broken=self.broken, failed=self.failed)

    def finish(self):
        """Prints the table, what to doubt, and where the files are; draws the charts. Without rows: nothing."""
        if not self.rows:
            print("no rows", file=sys.stderr)
            return
        self.save()
        if self.title:
            print(self.title)
        for value, names in self.columns.items() if self.by else ((None, self.columns),):
            if self.by and len(self.columns) > 1:
                print(f"\n{value}")
            print(table([row for row in self.rows if self.by is None or row[self.by] == value], names))
        print("".join(f"\n{line}" for line in doubts(self.environment, self.rows)))
        print("".join(f"{case} gave no rows: {status}\n" for case, status in self.failed), end="")
        print(f"wrote {self.path}")
        if self.with_charts:
            for chart in plots.draw(self.path):
                print(f"wrote {chart}")


def doubts(environment, rows):
    """Warnings about rows that something else on the machine may have disturbed, a line each."""
    lines = []
    wide = [row for row in rows if (plots.spread(row) or 1.0) > plots.SPREAD]
    timed = [row for row in rows if plots.spread(row)]
    if wide:
        worst = max(map(plots.spread, wide))
        lines.append(
            f"warning: p80/p20 is above {plots.SPREAD} in {len(wide)} of {len(timed)} timed rows (at most {worst:.2f}):"
            " something else used this machine; measure them again"
        )
    load, cores = environment.get("load"), environment.get("cores")
    if load and cores and load > 0.5 * cores:
        lines.append(f"warning: the load before the start was {load} on {cores} cores")
    return lines
