"""python -m kernels.simulator script.py: runs a program's Triton kernels on the CPU, under every check."""

import argparse
import json
import runpy
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

from .driver import CHIPS, simulate
from .errors import KernelError, SimulatorError, Unimplemented
from .gpu_names import gpu_names

FAULT, UNKNOWN = 3, 4  # exit statuses beside Python's own: 1 for an exception of the program, 2 for a wrong command

_COLUMNS = ("global_read", "global_written", "sectors_read", "sectors_written", "bank_conflicts", "tensor_flops")


def _seed(text):
    if (seed := int(text)) < 0:
        raise ValueError
    return seed


_seed.__name__ = "whole number from 0 on"  # argparse's message names the type


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.simulator",
        usage="%(prog)s [options] script [arguments] | -m module [arguments]",
        description="Runs a Python program whose Triton kernels are compiled for a GPU and executed on the CPU: races, "
        'stray accesses, missing waits and deadlocks are errors with their Python line. Its device "cuda" is the CPU; '
        "it measures no time.",
        epilog=f"Exit status: 0 no fault; {FAULT} a kernel's fault, even one that the program caught; {UNKNOWN} an "
        "instruction that the simulator does not know; else the program's own.",
    )
    parser.add_argument("--arch", choices=CHIPS, default="sm_90", help="chip to compile for (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_seed, help="run warps and blocks in the random order that this number determines"
    )
    parser.add_argument(
        "--first-configuration", action="store_true", help="autotuned kernels run the first one that fits, not each"
    )
    parser.add_argument("--report", action="store_true", help="print what each kernel did, counted, at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE as JSON")
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        help="run a module with what follows, as python -m",
    )
    parser.add_argument("script", type=Path, nargs="?", help="the program")
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


def _parse(arguments):
    """The options, with `program`: the words of sys.argv, and `run`: what runs it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.module is not None:
        options.program = options.module
        if not options.program:
            parser.error("-m: a module's name is required")
        folder = Path.cwd()  # as `python -m module` has it
        options.run = lambda: runpy.run_module(options.program[0], run_name="__main__", alter_sys=True)
    else:
        if options.script is None:
            parser.error("a Python program is required, or -m and a module")
        if not options.script.exists():
            parser.error(f"{options.script}: there is no such file; a Python program is required")
        if options.script.is_dir() and not (options.script / "__main__.py").is_file():
            parser.error(f"{options.script}: a directory without __main__.py; a Python program is required")
        options.program = [str(options.script), *options.arguments]
        folder = options.script.resolve().parent  # as `python script.py` has it
        options.run = lambda: runpy.run_path(str(options.script), run_name="__main__")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.parent}")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json {options.json}: it is a directory; a file is required")
    sys.argv, sys.path[0] = list(options.program), str(folder)
    return parser, options


def main(arguments=None):
    parser, options = _parse(arguments)
    status, ended, stop = 0, "", None
    with ExitStack() as stack:
        try:
            gpu = stack.enter_context(simulate(options.arch, seed=options.seed))
        except SimulatorError as error:  # it names what to change
            parser.error(str(error))
        skipped = stack.enter_context(gpu_names(options.arch, options.first_configuration))
        try:
            options.run()
        except KernelError as error:
            ended = error
            _tell(f"{type(error).__name__}: {error}", *_launched_at(error))
        except SystemExit as error:
            stop = error
        except Exception as error:
            status, ended = 1, error
            sys.stdout.flush()
            traceback.print_exception(type(error), error, _of_the_program(error.__traceback__))
        finally:
            _finish(gpu, options, skipped, _outcome(gpu.faults, ended))
    if stop is not None and (stop.code not in (None, 0) or not gpu.faults):
        raise stop
    if gpu.faults and not status:
        status = UNKNOWN if all(isinstance(fault, Unimplemented) for fault in gpu.faults) else FAULT
    return status


def _outcome(faults, ended):
    """How it ended, in words. ended: the exception that ended the program, if one did."""
    if isinstance(ended, KernelError):
        before = len(faults) - 1
        return f"faults before it, which the program caught: {before}" if before else "no fault before it"
    how = f"faults that the program caught: {len(faults)}, first {faults[0]}" if faults else "no fault"
    return f"{how}, but the program ended with an exception" if ended else how


def _of_the_program(trace):
    """A traceback without the frames of what runs the program."""
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _launched_at(error):
    """The line of the program that launched the kernel."""
    triton, last = Path(sys.modules["triton"].__file__).parent, None
    for frame in traceback.extract_tb(_of_the_program(error.__traceback__)):
        if Path(frame.filename).is_relative_to(triton) or _is_ours(frame.filename):
            break
        last = frame
    return [f"launched at {last.filename}:{last.lineno}: {last.line}"] if last else []


def _is_ours(filename):
    return filename.startswith("<frozen runpy>") or Path(filename).is_relative_to(Path(__file__).parent)


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
