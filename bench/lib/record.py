"""The record of a bench: its environment, its JSON rows, their table and where the files are.

    environment = environment_of(args.device, args.command)
    finish(args.out / "my_sweep.json", environment, rows, columns=(...))

A number that was not measured is None in the JSON and "not measured" in print.
"""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench import plots

NOT_MEASURED = "not measured"


def environment_of(device, command):
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
