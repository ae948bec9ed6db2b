"""Other people's Triton kernels in the simulator: against plain PyTorch, under every check, counted.

    pip install -e '.[public]'
    python bench/public_kernels.py [--package NAME] [--kernel PART] [--arch sm_90] [--seed N] [--json F] [--markdown F]

    TRITON_TUTORIALS=triton/python/tutorials python bench/public_kernels.py --package tutorials      # of a checkout

Each case calls a public function of a package as it is installed, forward and mostly backward too. A package that is
not installed is named and left out. Autotuned kernels run their first configuration. No GPU is used, no time measured.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import UsageError, output_directory
from bench.lib.files import write_file
from bench.lib.gate import OK
from bench.lib.lanes import in_process_of_lane
from bench.lib.public import cases_of
from bench.lib.public.cases import run_case, version_of
from bench.lib.public.tutorials import TUTORIALS, VARIABLE
from bench.lib.record import environment_of

ARCHS = ("sm_80", "sm_90")


def rows_on(arch, names, seed):
    """The rows of the cases with these names. In a process of their own: packages look at the GPU when imported."""
    rows = []
    for case in cases_of():
        if str(case) in names:
            rows.append(run_case(case, arch, seed))
            print(f"{arch}  {case}: {rows[-1]['status'].partition(': `')[0]}", flush=True)
    return rows


def what_it_says(row):
    """The status in a table's cell: the fault without its addresses, and the place without its directory."""
    if row["status"] == OK:
        return "nothing"
    kind, _, rest = row["status"].partition(": ")
    what = rest.partition(", and nothing orders")[0].partition(" (at ")[0]
    return f"**{kind}**: {re.sub('0x[0-9a-f]+, ', '', what)}"


def number(value):
    return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else f"{value:,}"


COLUMNS = {  # of the table: what they say of a row; where a row's neighbour says another thing, both stand there
    "kernels": lambda row: number(len(row["kernels"])),
    "launches": lambda row: number(row["launches"]),
    "error": lambda row: number(row["error"]),
    "plain PyTorch's": lambda row: number(row["plain_error"]),
    "warp instructions": lambda row: number(row["instructions"]),
    "bytes": lambda row: number(row["global_bytes"]),
    "found": what_it_says,
}


def markdown(environment, rows):
    """One line a case, its architectures side by side."""
    by_case = {}
    for row in rows:
        by_case.setdefault((row["package"], row["kernel"], row["shape"], row["dtype"]), []).append(row)
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [f"| what | shape | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    package = None
    for (package_of, kernel, shape, dtype), found in by_case.items():
        if package_of != package:
            package = package_of
            lines.append(f"| **{package} {found[0]['version']}** |" + " |" * (1 + len(COLUMNS)))
        cells = [" / ".join(dict.fromkeys(map(show, found))) for show in COLUMNS.values()]
        what = f"{kernel}{'; backward' if found[0]['gradients'] else ''}"
        lines.append(f"| {what} | {shape}, {dtype} | {' | '.join(cells)} |")
    # without the files that it wrote
    shown = re.sub(r" --(json|markdown)[ =]\S+", "", environment["command"])
    head = (
        "Each calls a public function of the package and compares what comes back, and where it says backward the "
        "gradients of all inputs, with plain PyTorch in float64 on the same inputs. `error` is the largest error over "
        "the largest value of that result; `plain PyTorch's` is that of the same formula in the same dtype. Two "
        f"figures are those of {' / '.join(archs)}; `found` is what the simulator reported.\n\n"
        f"Simulated for {' / '.join(archs)}, Triton {environment['triton']}, torch {environment['torch']}, "
        f"{environment['date'][:10]}, by `{shown}`. {len(rows)} runs of {len(by_case)} calls: "
        f"{sum(row['status'] == OK for row in rows)} right and without a fault."
    )
    return "\n".join([head, "", *lines, ""])


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="bench/public_kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", default="", metavar="NAME", help="part of a package's name")
    parser.add_argument("--kernel", default="", metavar="PART", help="part of what a case is called")
    parser.add_argument("--arch", choices=ARCHS, help="one chip (default: each)")
    parser.add_argument("--seed", type=int, help="run warps and blocks in the random order that this number determines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table there")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "bench/public_kernels.py", *(sys.argv[1:] if argv is None else argv)])
    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        try:
            if path is not None:
                output_directory(path.parent, option=f"{option}: the directory")
            if path is not None and path.is_dir():
                raise UsageError(f"{option} {path}: it is a directory; a file is required")
        except UsageError as error:
            parser.error(str(error))
    chosen = [case for case in cases_of() if args.package in case.package and args.kernel in case.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(case.package for case in cases_of()))
        parser.error(f"--package {args.package!r} --kernel {args.kernel!r}: no such case; the packages are {names}")
    missing = [p for p in dict.fromkeys(case.package for case in chosen) if version_of(p) is None]
    for package in missing:
        how = f"set {VARIABLE} to their folder" if package == TUTORIALS else "pip install -e '.[public]'"
        print(f"{package} is not installed: its cases are left out; {how}", file=sys.stderr)
    names = {str(case) for case in chosen if case.package not in missing}
    if not names:
        parser.error("nothing is left to run")
    environment = environment_of("cpu", command)
    rows = []
    for arch in (args.arch,) if args.arch else ARCHS:
        rows += in_process_of_lane("simulate", rows_on, arch, names, args.seed)
    if args.json:
        write_file(args.json, json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    if args.markdown:
        write_file(args.markdown, markdown(environment, rows))
    else:
        print("\n" + markdown(environment, rows))
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
