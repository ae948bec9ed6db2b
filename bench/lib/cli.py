"""What every command shares: its arguments, the errors of its user, the device, progress.

parser = Parser("bench/my_sweep.py", __doc__)      # brings --device, --quick and --out
args = parser.parse_args(argv)
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from bench.lib.record import KEPT, environment_of


class UsageError(ValueError):
    """A request that cannot be served, found before work starts: one line on stderr, exit code 2."""


class Parser(argparse.ArgumentParser):
    """The arguments that every bench has. A wrong one is one line and exit code 2.

    parse_args gives `device` as a torch.device, `out` as a directory proven writable, `command` as one would type it,
    `environment` (see record.environment_of), `path`, where the rows go (one of its own for --quick, which must never
    take the place of a full sweep), and `earlier`, the file that --resume goes on with, or None. check(args), if given,
    raises UsageError; it runs before the output directory is made. name: of the file, if not the script's.
    devices: to choose from, the default first.
    """

    def __init__(self, script, description, check=None, name=None, devices=("auto", "cuda", "cpu")):
        super().__init__(prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.check, self.name = check, name or Path(script).stem
        self.add_argument(
            "--device", choices=devices, default=devices[0], help="auto: a GPU if any; default: %(default)s"
        )
        self.add_argument("--quick", action="store_true", help="few small shapes, few repeats: does it run?")
        self.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (default: out)")
        self.add_argument("--resume", action="store_true", help="go on with the file of an earlier run in --out")
        self.add_argument("--no-charts", action="store_true", help="leave the charts to bench/plots.py")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def understand(self, argv):
        """The arguments, checked, without a look at the directory and at the machine."""
        args = super().parse_args(argv)
        args.command = shlex.join(["python", self.prog, *argv])
        try:
            args.device = resolve_device(args.device)
            if self.check is not None:
                self.check(args)
        except UsageError as error:
            self.error(str(error))
        return args

    def parse_args(self, argv=None):
        args = self.understand(sys.argv[1:] if argv is None else list(argv))
        try:
            args.out = output_directory(args.out)
            args.path = args.out / f"{self.name}{'_quick' if args.quick else ''}.json"
            args.environment = environment_of(args.device, args.command)
            args.earlier = earlier(args) if args.resume else None
        except UsageError as error:
            self.error(str(error))
        return args


def earlier(args):
    """What --resume goes on with: the data of args.path, or None where there is no such file.

    UsageError: it is no result, or one of other code, another machine or other arguments.
    """
    if not args.path.exists():
        return None
    try:
        data = json.loads(args.path.read_text(encoding="utf-8"))
        theirs, ours = ({**d, "command": _essence(d["command"])} for d in (data["environment"], args.environment))
        data = {key: data[key] for key in KEPT}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {args.path} is no result that can be gone on with: {error!r}") from None
    for key in ("commit", "sources", "device", "torch", "triton", "command"):
        if theirs.get(key) != ours.get(key):
            raise UsageError(
                f"--resume: {args.path} is of another {key}: {theirs.get(key)}, not {ours.get(key)}; "
                "another --out is required"
            )
    return data


def _essence(command):
    """A command without what does not change its rows."""
    parts = [part for part in shlex.split(command) if part not in ("--resume", "--no-charts")]
    while "--out" in parts:
        at = parts.index("--out")
        del parts[at : at + 2]
    return [part for part in parts if not part.startswith("--out=")]


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


def output_directory(path, option="--out"):
    """Makes the directory `path` and proves that it can be written; returns it. UsageError if not."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}; a directory that can be written is required") from None
    return path
