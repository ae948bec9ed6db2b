"""What the compiler made of each kernel and what it does when it runs, without a GPU.

    python bench/kernel_report.py --arch sm_90 [--kernel NAME] [--json FILE] [--against FILE]

Registers, spills, shared memory and the main loop come from the machine code. Counts come from kernels/simulator, which
executes the compiled PTX: they are exact, and the same on every machine. The bounds are a model, not a measurement.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.chips import CHIPS, SOURCES, bounds, resident_blocks
from bench.lib.cli import UsageError, output_directory
from bench.lib.files import write_file
from bench.lib.kernel_cases import ARCH_OF, CASES
from bench.lib.record import environment_of
from bench.lib.sass import inspect
from kernels.simulator import simulate

MODEL = "model, not a measurement"


def report(arch, name_part=""):
    """One row for each kernel of each case whose name holds `name_part`: plain numbers, for JSON and for printing."""
    rows = []
    for case_name, make in CASES.items():
        if ARCH_OF.get(case_name, arch) != arch:
            continue
        call, work = make()
        if not any(name_part in label for label in (case_name, *work)):
            continue
        with simulate(arch) as gpu:
            call()
        for kernel, needed in work.items():
            if name_part in case_name or name_part in kernel:
                launch = next((launch for launch in gpu.launches if launch.kernel == kernel), None)
                if launch is None:
                    raise ValueError(f"{case_name}: launches {sorted({x.kernel for x in gpu.launches})}, not {kernel}")
                rows.append(describe(arch, case_name, launch, needed))
    return rows


def describe(arch, case_name, launch, needed):
    """The row of one launch."""
    chip, counters = CHIPS[arch], launch.counters
    code = inspect(launch.cubin, launch.kernel)
    blocks, limit = resident_blocks(chip, code.registers, launch.shared, launch.num_warps)
    moved = counters.global_read + counters.global_written + counters.global_atomic
    return {
        "case": case_name,
        "kernel": launch.kernel,
        "arch": arch,
        "grid": list(launch.grid),
        "num_warps": launch.num_warps,
        "registers": code.registers,
        "spilled_bytes": code.spilled,
        "shared_bytes": launch.shared,
        "resident_blocks": blocks,
        "limited_by": limit,
        "machine_instructions": code.instructions,
        "main_loop": code.loop,
        "per_output": {name: 32 * n / needed.outputs for name, n in sorted(counters.instructions.items())},
        "global_bytes": moved,
        "least_bytes": needed.least_bytes,
        "sectors_per_request": ratio(
            counters.sectors_read + counters.sectors_written, counters.requests_read + counters.requests_written
        ),
        "bank_conflicts": counters.bank_conflicts,
        "wavefronts": counters.shared_wavefronts,
        "tensor_flops": counters.tensor_flops,
        "bound_us": {name: 1e6 * seconds for name, seconds in bounds(chip, counters, needed.least_bytes).items()},
    }


def ratio(a, b):
    return a / b if b else None


def flatten(row):
    """{"main_loop.mma": 8, ...}: the row's numbers under flat names."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": number for name, number in value.items()}
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def differences(rows, earlier):
    """Lines that say which numbers changed since an earlier report, kernel by kernel."""
    before = {(row["case"], row["kernel"], row["arch"]): flatten(row) for row in earlier}
    lines = []
    for row in rows:
        key = (row["case"], row["kernel"], row["arch"])
        if key not in before:
            lines.append(f"{row['kernel']}, {row['case']}: not in the earlier report")
            continue
        old, new = before.pop(key), flatten(row)
        for name in sorted(old.keys() | new.keys()):
            a, b = old.get(name, 0), new.get(name, 0)
            if a != b:
                change = f" ({100 * (b - a) / a:+.1f}%)" if a else ""
                lines.append(f"{row['kernel']}, {row['case']}: {name} {number(a)} -> {number(b)}{change}")
    lines += [
        f"{kernel}, {case}: no longer reported" for case, kernel, arch in before if any(r["arch"] == arch for r in rows)
    ]
    return lines or ["no difference"]


def number(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def counts(classes):
    return ", ".join(f"{name} {number(n)}" for name, n in sorted(classes.items(), key=lambda item: -item[1])) or "none"


def render(rows, arch):
    """The report as text."""
    chip = CHIPS[arch]
    lines = []
    for row in rows:
        shape = f"{row['case']}, {arch}, grid {tuple(row['grid'])}, {row['num_warps']} warps"
        resident = f"{row['resident_blocks']} blocks per SM, limited by {row['limited_by']}"
        moved, least, requests = (row[name] for name in ("global_bytes", "least_bytes", "sectors_per_request"))
        conflicts = f"{number(row['bank_conflicts'])} for bank conflicts"
        lines += [
            f"{row['kernel']}  ({shape})",
            f"  {row['registers']} registers, {row['spilled_bytes']} B spilled, "
            f"{number(row['shared_bytes'])} B shared; {resident}",
            f"  machine code: {number(row['machine_instructions'])} instructions",
            f"  main loop: {counts(row['main_loop'])}",
            f"  executed per output element (PTX, by threads): {counts(row['per_output'])}",
            f"  global memory: {number(moved)} B, least possible {number(least)} B, {number(ratio(moved, least))}x; "
            f"{number(requests)} sectors per request",
            f"  shared memory: {number(row['wavefronts'])} wavefronts, {conflicts}",
            f"  {MODEL}: " + ", ".join(f"{name} {us:.3g} us" for name, us in row["bound_us"].items()),
            "",
        ]
    lines += [f"{MODEL}: time that each resource of a whole {chip.name} would need alone, from these figures"]
    position = list(CHIPS).index(arch)
    for name, value in asdict(chip).items():
        if name in SOURCES:
            lines.append(f"  {name:16} {number(value):>14}  {SOURCES[name][position]}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="bench/kernel_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=tuple(CHIPS), default="sm_90")
    parser.add_argument("--kernel", default="", metavar="NAME", help="part of a kernel's or a case's name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="print what changed since that report")
    args = parser.parse_args(argv)
    try:
        earlier = json.loads(args.against.read_text())["rows"] if args.against else None
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--against {args.against}: {error}; a file that --json wrote is required")
    try:
        if args.json is not None:
            output_directory(args.json.parent, option="--json: the directory")
            if args.json.is_dir():
                raise UsageError(f"--json {args.json}: it is a directory; a file is required")
    except UsageError as error:
        parser.error(str(error))
    rows = report(args.arch, args.kernel)
    if not rows:
        parser.error(f"--kernel {args.kernel}: no such kernel; cases are {', '.join(CASES)}")
    print(render(rows, args.arch))
    if args.json:
        command = " ".join(["python", "bench/kernel_report.py", *(sys.argv[1:] if argv is None else argv)])
        write_file(
            args.json, json.dumps({"environment": environment_of("cpu", command), "rows": rows}, indent=1) + "\n"
        )
        print(f"\nwrote {args.json}")
    if earlier is not None:
        print(f"\nagainst {args.against}:")
        print("\n".join(differences(rows, earlier)))


if __name__ == "__main__":
    main()
