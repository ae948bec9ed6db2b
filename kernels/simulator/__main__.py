"""python -m kernels.simulator script.py: runs a program's Triton kernels on the CPU, under every check."""

import argparse
import json
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path

from .driver import CHIPS, simulate
from .errors import KernelError, SimulatorError, Unimplemented
from .gpu_names import gpu_names

FAULT, UNKNOWN = 3, 4  # exit statuses beside Python's own: 1 for an exception of the program, 2 for a wrong command

_COLUMNS = ("global_read", "global_written", "sectors_read", "sectors_written", "bank_conflicts", "tensor_flops")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.simulator",
        description="Runs a Python program whose Triton kernels are compiled for a GPU and executed on the CPU: races, "
        'stray accesses, missing waits and deadlocks are errors with their Python line. Its device "cuda" is the CPU; '
        "it measures no time.",
        epilog=f"Exit status: 0 no fault; {FAULT} a kernel's fault; {UNKNOWN} an instruction that the simulator does "
        "not know; else the program's own.",
    )
    parser.add_argument("--arch", choices=CHIPS, default="sm_90", help="chip to compile for (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="run warps and blocks in the random order that this number determines")
    parser.add_argument(
        "--first-configuration", action="store_true", help="autotuned kernels run the first one that fits, not each"
    )
    parser.add_argument("--report", action="store_true", help="print what each kernel did, counted, at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE as JSON")
    parser.add_argument("script", type=Path, help="the program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def counts_by_kernel(launches):
    """{kernel: its number of launches, and the sums of their counters}."""
    kernels = {}
    for launch in launches:
        counts = kernels.setdefault(
            launch.program.kernel.name, dict.fromkeys(("launches", "instructions", *_COLUMNS), 0)
        )
        counts["launches"] += 1
        counts["instructions"] += sum(launch.counters.instructions.values())
        for name in _COLUMNS:
            counts[name] += int(getattr(launch.counters, name))
    return kernels


def _table(kernels):
    """The counts as aligned text, a kernel a line."""
    heads = ["kernel", "launches", "instructions", *_COLUMNS]
    rows = [[name, *(f"{value:,}" for value in counts.values())] for name, counts in kernels.items()]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cell.replace("_", " ") if row is heads else cell for cell in cells))
    return "\n".join(lines)


def _tell(*lines):
    sys.stdout.flush()
    for line in lines:
        print(line, file=sys.stderr)


def main(arguments=None):
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"{options.script}: there is no such file; a Python program is required")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.parent}")
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)  # as `python script.py` has it
    status, how = 0, "no fault"
    with ExitStack() as stack:
        try:
            gpu = stack.enter_context(simulate(options.arch, seed=options.seed))
        except SimulatorError as error:  # it names what to change
            parser.error(str(error))
        skipped = stack.enter_context(gpu_names(options.arch, options.first_configuration))
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        except KernelError as error:
            status = UNKNOWN if isinstance(error, Unimplemented) else FAULT
            how = "no fault before it"
            _tell(f"{type(error).__name__}: {error}")
        except Exception:
            how = "no fault, but the program ended with an exception"
            raise
        finally:
            _finish(gpu, options, skipped, how)
    return status


def _finish(gpu, options, skipped, how):
    """The report, also where the program raised or called sys.exit."""
    kernels = counts_by_kernel(gpu.launches)
    if options.json is not None:
        what = {"arch": options.arch, "seed": options.seed, "lane": "simulated", "kernels": kernels}
        options.json.write_text(json.dumps(what, indent=1) + "\n")
    if options.report and kernels:
        _tell(_table(kernels))
    if skipped.benchmarks:
        _tell(f"{skipped.benchmarks} benchmarks were not run: the simulator measures no time")
    if skipped.configurations:
        _tell(
            f"{skipped.configurations} configurations of autotuned kernels were run once each; the first one was kept"
            + (f", {skipped.left_out} were left out" if skipped.left_out else "")
        )
    _tell(f"{len(gpu.launches)} launches of {len(kernels)} kernels on a simulated {options.arch}: {how}")


if __name__ == "__main__":
    sys.exit(main())
