"""Everything worth knowing about this code on this GPU, within one visit of nine minutes: `make gpu`.

    python bench/run_all.py --out DIR                     # all stages, the worthiest first
    python bench/run_all.py --quick                       # in four minutes
    python bench/run_all.py --only tests lengths          # some
    python bench/run_all.py --resume DIR                  # what is missing in DIR
    python bench/run_all.py --rehearse                    # the same plan on a machine without a GPU, small

Each stage (bench/lib/stages.py) is a process of its own with its own limit and log; one that fails, hangs or runs out
of time is a line in the report, and the next begins. At each moment DIR holds what is known so far, in at most eight
files of at most 16 MB: README.md with tables, charts and what failed, results.json with all rows, the first charts, and
everything.tar.gz with the rest, which --resume takes up again.

--rehearse runs every stage on a device that stands in for a GPU (bench/lib/standin.py): its figures mean nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import report
from bench.lib.cli import UsageError, output_directory
from bench.lib.record import INTERRUPTED, ROOT, environment_of
from bench.lib.stages import NAMES, OK, STAGES, Visit, load_outcomes, run, save_outcomes

RESERVE_S = 15  # for the report
PACK_EVERY_S = 10
PATIENCE = 3  # a rehearsal measures nothing, and may share its cores with others
FREE_GIB = 12  # what the largest case takes, with room for the workers of the tests
SAME = ("commit", "sources", "device", "torch", "triton")  # in what is gone on with


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def minutes(text):
    number = float(text)
    if not 0.5 <= number <= 600:
        raise ValueError
    return number


minutes.__name__ = "number of minutes from 0.5 to 600"  # argparse's message names the type


def parser():
    result = Parser(prog="bench/run_all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--minutes", type=minutes, metavar="N", help="of the whole run; default: 9, with --quick 4")
    result.add_argument("--only", nargs="+", choices=NAMES, metavar="STAGE", help=f"some of {', '.join(NAMES)}")
    result.add_argument("--quick", action="store_true", help="few shapes, few repeats")
    result.add_argument("--out", type=Path, metavar="DIR", help="where files go; default: out/gpu, out/rehearsal")
    result.add_argument("--resume", type=Path, metavar="DIR", help="go on with an earlier run of the same code")
    result.add_argument("--rehearse", action="store_true", help="without a GPU, on a stand-in: does all of it run?")
    result.add_argument("--commit", help="of the code, where git cannot tell")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    if args.resume is not None and args.out is not None:
        raise UsageError("--resume and --out: results go on in the directory of --resume; give one of them")
    if args.resume is not None and not (args.resume / report.REST).is_file():
        raise UsageError(f"--resume {args.resume}: there is no {report.REST} of an earlier run in it")
    args.minutes = args.minutes or (4.0 if args.quick else 9.0)
    args.quick |= args.rehearse
    if args.commit:
        os.environ["BENCH_COMMIT"] = args.commit
    if not args.rehearse:
        _check_gpu()
    args.out = output_directory(args.resume or args.out or Path("out", "rehearsal" if args.rehearse else "gpu"))


def _check_gpu():
    import torch

    if not torch.cuda.is_available():
        raise UsageError("torch finds no GPU here (torch.cuda.is_available() is False); --rehearse does without one")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("TRITON_INTERPRET is set: kernels would be interpreted, and the interpreter is never timed")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        name = torch.cuda.get_device_name()
        raise UsageError(f"{name} has compute capability {'.'.join(map(str, capability))}; 8.0 or newer is required")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    if free < FREE_GIB:
        raise UsageError(
            f"{free:.1f} of {total:.1f} GiB of the GPU's memory are free; {FREE_GIB} are required (who uses it: "
            "nvidia-smi)"
        )


def take_up(args, work, environment):
    """Unpacks the earlier run into `work`; its outcomes. UsageError if it is of other code or another machine."""
    try:
        report.unpack(args.resume, work)
        earlier, outcomes = load_outcomes(work / report.STAGES)
    except ValueError as error:
        raise UsageError(f"--resume {args.resume}: it cannot be gone on with: {error}") from None
    for key in SAME:
        if earlier.get(key) != environment.get(key):
            raise UsageError(
                f"--resume {args.resume}: it is of another {key}: {earlier.get(key)}, not {environment.get(key)}; "
                "another --out is required"
            )
    return outcomes


def main(argv=None):
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser()
    args = arguments.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as directory:
        work = Path(directory)
        try:
            complete(args)
            command = " ".join(["python", "bench/run_all.py", *argv])
            environment = environment_of("cpu" if args.rehearse else "cuda", command)
            if args.rehearse:
                environment["device"] = f"rehearsal on {environment['cpu']}: no figure means anything"
            outcomes = take_up(args, work, environment) if args.resume else {}
        except UsageError as error:
            arguments.error(str(error))
        return visit(args, work, environment, outcomes, began)


def share_of(minutes):
    """What a visit of so many minutes has for its stages, as a share of what one of nine has."""
    return (60 * minutes - RESERVE_S) / (60 * 9 - RESERVE_S)


def visit(args, work, environment, outcomes, began):
    """Runs the stages and leaves the report; the exit code."""
    todo = [stage for stage in STAGES if stage.name in (args.only or NAMES)]
    if args.resume:
        todo = [stage for stage in todo if stage.name not in outcomes or outcomes[stage.name].status != OK]
    patience = PATIENCE if args.rehearse else 1
    about = Visit(
        work,
        deadline=began + patience * (args.minutes * 60 - RESERVE_S),
        quick=args.quick,
        resume=args.resume is not None,
        stand_in=args.rehearse,
        share=share_of(args.minutes) * patience,
        commit=args.commit,
        workers=1 if args.rehearse else max(1, min(16, len(os.sched_getaffinity(0)))),
        names=tuple(stage.name for stage in todo),
    )
    packed, drawing = [time.monotonic()], []

    def pack():
        save_outcomes(work / report.STAGES, environment, outcomes)
        report.write(work, args.out, environment, outcomes)
        packed[0] = time.monotonic()

    def after(outcome):
        print(
            f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s; {max(0, about.left()):.0f} s are left",
            flush=True,
        )
        for file in sorted((work / outcome.name).glob("*.json")):
            drawing.append(draw(file))  # on a core of its own, while the next stage runs
        pack()

    def meanwhile():
        if time.monotonic() - packed[0] > PACK_EVERY_S:
            pack()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = False
    pack()
    try:
        run(todo, about, outcomes, after, meanwhile)
    except KeyboardInterrupt:
        interrupted = True
    for process in drawing:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    pack()
    print(f"wrote {args.out / 'README.md'}")
    if interrupted:
        return INTERRUPTED
    return 0 if all(outcome.status == OK for outcome in outcomes.values()) else 1


def draw(file):
    """Begins to draw the charts of a bench's file; the process."""
    command = [sys.executable, "bench/plots.py", str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
