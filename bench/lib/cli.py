"""What every command shares: its arguments, the errors of its user, the device, progress.

parser = Parser("bench/my_sweep.py", __doc__)      # brings --device, --quick and --out
args = parser.parse_args(argv)
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm


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
