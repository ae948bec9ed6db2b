"""What became faster or slower between two results of one bench, beyond their noise.

    python bench/compare.py before.json after.json [--threshold 0.02] [--all]

Rows of the same case are compared by their medians. A change counts where it is larger than --threshold and the 20th to
80th percentiles of the two do not overlap. Exit status: 0, 1 where something became slower or lost its time, 2 for an
error. Two machines, devices or versions are named before the table: then a difference may be theirs.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TIME = ("median_ms", "p20_ms", "p80_ms")
# What is measured or said of a row; whatever else it holds says which case it is.
RESULTS = {
    *TIME, "host_us", "host_behind", "graph_ms", "graph_note", "tflops", "gb_per_s", "peak_memory_mb", "error",
    "status", "mb_per_s", "tokens_per_s", "x_tiktoken", "speedup", "checked", "valid", "megabytes", "tokens",
    "share_of_copy",
}  # fmt: skip
MACHINE = ("device", "driver", "cuda", "torch", "triton", "python", "cpu", "threads")
FASTER, SLOWER, SAME, LOST, NEW = "faster", "slower", "same", "no time any more", "no time before"


def load(path):
    """(environment, {case: row}) of a result. Raises ValueError where the file is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and TIME[0] in row for row in rows):
        raise ValueError(f"{path} has no rows with a {TIME[0]}: it is not what a bench wrote")
    cases = {}
    for row in rows:
        case = tuple(sorted((name, str(value)) for name, value in row.items() if name not in RESULTS))
        if case in cases:
            raise ValueError(f"{path} has two rows of {words(case)}")
        cases[case] = row
    return data.get("environment", {}), cases


def words(case, apart=()):
    """A case in words, without the fields `apart`."""
    return " ".join(f"{name}={value}" for name, value in case if name not in apart)


def judge(before, after, threshold):
    """(verdict, time after over time before) of two rows; the ratio is None where one has no time."""
    if before is None or before[TIME[0]] is None:
        return (SAME, None) if after is None or after[TIME[0]] is None else (NEW, None)
    if after is None or after[TIME[0]] is None:
        return LOST, None
    ratio = after[TIME[0]] / before[TIME[0]]
    is_apart = after["p80_ms"] < before["p20_ms"] or after["p20_ms"] > before["p80_ms"]
    if not is_apart or abs(ratio - 1.0) <= threshold:
        return SAME, ratio
    return (FASTER if ratio < 1.0 else SLOWER), ratio


def compare(before, after, threshold):
    """[(case, verdict, row before, row after, ratio)], the largest loss first."""
    found = []
    for case in dict.fromkeys([*before, *after]):
        rows = before.get(case), after.get(case)
        verdict, ratio = judge(*rows, threshold)
        found.append((case, verdict, *rows, ratio))
    return sorted(found, key=lambda entry: -(entry[4] or (float("inf") if entry[1] == LOST else 0.0)))


def shown(row):
    return "-" if row is None or row[TIME[0]] is None else f"{row[TIME[0]]:.4g}"


def main(argv=None):
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--threshold", type=float, default=0.02, metavar="X", help="relative change (default: 0.02)")
    parser.add_argument("--all", action="store_true", help="print what stayed the same, too")
    options = parser.parse_args(argv)
    if not 0.0 <= options.threshold < 1.0:
        parser.error(f"--threshold {options.threshold}: it must be at least 0, and below 1")
    try:
        (then, before), (now, after) = load(options.before), load(options.after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not before.keys() & after.keys():
        print("compare: the two have no case in common", file=sys.stderr)
        return 2
    for name in MACHINE:
        if then.get(name) != now.get(name):
            print(f"{name}: {then.get(name)} before, {now.get(name)} after")
    found = compare(before, after, options.threshold)
    fields = [dict(case) for case, *_ in found]
    shared = {name for name in fields[0] if len({each.get(name) for each in fields}) == 1}
    print(f"all: {words(found[0][0], apart=fields[0].keys() - shared)}")
    for case, verdict, row, other, ratio in found:
        if verdict != SAME or options.all:
            change = "" if ratio is None else f"{100 * (ratio - 1):+.1f}%"
            print(f"{verdict:<16} {change:>8}  {shown(row):>8} -> {shown(other):>8} ms  {words(case, apart=shared)}")
    counts = [(verdict, sum(entry[1] == verdict for entry in found)) for verdict in (FASTER, SLOWER, SAME, LOST, NEW)]
    print(", ".join(f"{count} {verdict}" for verdict, count in counts if count))
    return 1 if any(verdict in (SLOWER, LOST) for _, verdict, *_ in found) else 0


if __name__ == "__main__":
    sys.exit(main())
