"""Measures tile shapes on the GPU at hand and writes the fastest into its family's rows of kernels/configs.py.

    python bench/tune.py --op attention --device cuda              # bfloat16, all classes of head dim
    python bench/tune.py --op attention --dtype float32 --dry-run  # prints the rows and leaves the file alone
    python bench/tune.py --quick                                   # only the neighbours of the present shapes

For each class of head dims, at its largest: forward, then dq, then dkdv, each with what was chosen before it in place.
dq and dkdv are timed by the whole backward pass that they are part of. fp16 and bf16 share rows; measure one of them.

A candidate is left out, with its reason in the table, if it cannot fit or compile, if it spills registers, or if it
fails the tests' tolerance rule at the timed shape or at an odd one. The others are timed briefly, and the fastest few
thoroughly beside the present shape, which is replaced only by one that is clearly faster: `choose` has the rule.

All that was measured goes to DIR/tune_attention.json.
"""

import ast
import os
import re
import sys
from dataclasses import asdict, astuple
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

from triton.runtime import driver

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.attention_sweep import check, gates, make_call, refusal
from bench.lib.attention_cases import Case
from bench.lib.cli import Parser, UsageError, positive
from bench.lib.clock import TIMES, Clock, measure
from bench.lib.files import write_file
from bench.lib.gate import OK
from bench.lib.lanes import DTYPES
from bench.lib.record import progress, save, table
from kernels import configs
from kernels.configs import ATTENTION, SHORT_T, AttentionConfig, attention_config, attention_row, family
from kernels.launch import forget
from kernels.library import active_arch

# By direction: the kernel whose tiles it shapes, and the pass by which it is timed.
DIRECTIONS = {
    "forward": ("_attention_forward_kernel", "forward"),
    "dq": ("_attention_dq_kernel", "backward"),
    "dkdv": ("_attention_dkdv_kernel", "backward"),
}
TILES = {2: (32, 64, 128), 4: (16, 32, 64)}  # by bytes per element
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
REGISTERS = 255  # of one thread

TOKENS, WIDTH = 16384, 768  # of the timed batch; heads are as many as GPT-2's width has
ODD_T = 333  # of the second gate: tiles end inside it
FINALISTS = 4
MARGIN = 0.02  # a gain below it does not replace a row

COLUMNS = (
    "direction",
    "dtype",
    "D",
    "BLOCK_M",
    "BLOCK_N",
    "num_warps",
    "num_stages",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "error",
    "chosen",
    "status",
)


# Candidates and the choice among them


def candidates(present, itemsize, *, quick=False):
    """The configs to try, the present one first. quick: only those that differ from it in one number at most."""
    sizes = TILES[itemsize]
    grid = [AttentionConfig(*numbers) for numbers in product(sizes, sizes, WARPS, STAGES)]
    if quick:
        grid = [c for c in grid if sum(a != b for a, b in zip(astuple(c), astuple(present))) <= 1]
    return list(dict.fromkeys([present, *grid]))


def accumulators(direction, config, head_dim):
    """fp32 registers that a thread needs for its part of the accumulators and of one tile of scores (and dp)."""
    M, N = config.BLOCK_M, config.BLOCK_N
    elements = {"forward": M * head_dim + M * N, "dq": M * head_dim + 2 * M * N, "dkdv": 2 * N * head_dim + 2 * M * N}
    return elements[direction] // (32 * config.num_warps)


def choose(present, timings):
    """The config that takes the row: the fastest, if it is clearly faster than the present one, else the present one.

    timings: {config: {"median_ms", "p20_ms", "p80_ms", ...}}, median_ms None where nothing was measured. Clearly: its
    median is lower by more than MARGIN, and its 80th percentile is below the present median. Where the present config
    has no time the fastest takes the row; where none has, the present one keeps it.
    """
    timed = {config: timing for config, timing in timings.items() if timing["median_ms"] is not None}
    if not timed:
        return present
    fastest = min(timed, key=lambda config: timed[config]["median_ms"])
    if present not in timed:
        return fastest
    now, then = timed[present]["median_ms"], timed[fastest]
    return fastest if then["median_ms"] < (1 - MARGIN) * now and then["p80_ms"] < now else present


# Measuring


class Trial:
    """One dtype and head dim on the device: tries configs by putting them into the table that the launchers read."""

    def __init__(self, device, dtype, head_dim, seq_len):
        self.device, self.dtype, self.head_dim = device, dtype, head_dim
        self.itemsize, self.seq_len = DTYPES[dtype].itemsize, seq_len
        self.rows = ATTENTION[family(active_arch())]
        heads = max(1, WIDTH // head_dim)
        self.case = Case(dtype, max(1, TOKENS // seq_len), heads, seq_len, head_dim, causal=True)
        self.inputs = self.case.inputs(device)
        self.gates = [(inputs, gates(case, inputs, ["triton"])["triton"]) for case, inputs in self._shapes()]
        self.spilled = {}  # {(direction, config): registers}

    def _shapes(self):
        odd_T = ODD_T + (SHORT_T if self.seq_len > SHORT_T else 0)  # of the same row
        odd = Case(self.dtype, 1, 2, odd_T, self.head_dim, causal=True)
        return (self.case, self.inputs), (odd, odd.inputs(self.device))

    def present(self, direction):
        return attention_config(direction, DTYPES[self.dtype], self.head_dim, self.seq_len)

    def key(self, direction):
        """The table's row that is tuned: a short one's where there is one for this length."""
        return attention_row(family(active_arch()), direction, self.itemsize, self.head_dim, self.seq_len)

    def use(self, direction, config):
        """Puts a config into the table of this process."""
        key = self.key(direction)
        self.rows[key] = self.rows[key] | {self.head_dim: config}
        forget()

    def check(self, direction, config):
        """(error, OK), or (None or error, why the config is left out). The table keeps what it had."""
        needed = accumulators(direction, config, self.head_dim)
        if needed > REGISTERS:
            return None, f"left out: {needed} registers a thread for its accumulators alone, of {REGISTERS}"
        present, worst = self.present(direction), 0.0
        self.use(direction, config)
        try:
            with mock.patch.object(driver.active.utils, "load_binary", self._counting(driver.active.utils.load_binary)):
                for inputs, gate in self.gates:
                    error, status = check(DIRECTIONS[direction][1], "triton", inputs, gate)
                    if status != OK:
                        # An error: it needs more shared memory than there is, or the compiler gives up.
                        return error, f"left out: {status}" if status.startswith("error") else status
                    worst = max(worst, error)
        finally:
            self.use(direction, present)
        if self.spilled.get((direction, config)):
            return worst, f"left out: spills {self.spilled[direction, config]} registers"
        return worst, OK

    def _counting(self, load_binary):
        """load_binary that notes what each kernel spills: a kernel is loaded once in a process, at its first launch."""

        def load(name, *arguments):
            loaded = load_binary(name, *arguments)
            for direction, (kernel, _) in DIRECTIONS.items():
                if kernel == name:
                    key = direction, self.present(direction)
                    self.spilled[key] = max(self.spilled.get(key, 0), loaded[3])
            return loaded

        return load

    def make(self, direction, config):
        """The call that is timed, for measure; it puts the config into the table each time."""
        call = make_call(DIRECTIONS[direction][1], "triton", self.inputs, self.gates[0][1].options)

        def timed():
            self.use(direction, config)
            call()

        return timed


def tune(trial, direction, *, quick=False, clock=None):
    """Measures one row: (the config that takes it, the rows of the record). The table is left as it was."""
    present = trial.present(direction)
    rows = {}
    for config in progress(candidates(present, trial.itemsize, quick=quick), f"{direction} D={trial.head_dim}"):
        error, status = trial.check(direction, config)
        rows[config] = {"error": error, "status": status}
    makes = {c: partial(trial.make, direction, c) for c, row in rows.items() if row["status"] == OK}
    timings = measure(makes, trial.device, quick=True, clock=clock)
    order = sorted((c for c in timings if timings[c]["median_ms"]), key=lambda c: timings[c]["median_ms"])
    finalists = {c: makes[c] for c in order if c in order[:FINALISTS] or c == present}
    final = measure(finalists, trial.device, quick=quick, clock=clock)
    trial.use(direction, present)
    chosen = choose(present, final)
    shape = {"family": family(active_arch()), "direction": direction, "dtype": trial.dtype, "D": trial.head_dim}
    record = [
        {**shape, **asdict(c), **dict.fromkeys(TIMES), **row, **(timings | final).get(c, {}), "chosen": c == chosen}
        for c, row in rows.items()
    ]
    return chosen, record


# The table's file


def rewritten(source, name, key, row, note):
    """`source` of kernels/configs.py with a new row `key` of the family `name`, all else as it was.

    row: {largest head dim: config}, merged into what ATTENTION has now. `note` stands above it for each of these head
    dims, in the place of an earlier one. A row that the family shares with others gets a line of its own.
    """
    lines = source.splitlines()
    above, first, last = _lines_of(source, name, key)
    notes = {int(_NOTE.match(line)[1]): line for line in lines[above:first]}
    notes |= {head_dim: f"        # D = {head_dim}: {note}" for head_dim in row}
    merged = ATTENTION[name][key] | row
    entries = ", ".join(f"{limit}: C({', '.join(map(str, astuple(config)))})" for limit, config in merged.items())
    text = f'        ("{key[0]}", {key[1]}): {{{entries}}},'
    lines[above:last] = [*(notes[head_dim] for head_dim in sorted(notes)), text]
    return "\n".join(lines) + "\n"


def with_notes(source, name, key):
    """The lines of a row, its notes above it."""
    above, _, last = _lines_of(source, name, key)
    return source.splitlines()[above:last]


_NOTE = re.compile(r"\s*# D = (\d+): ")


def _lines_of(source, name, key):
    """Where a family's row stands: the indices of its first note, of its first line, and of the line after it.

    All three are the family's end where it has no row of its own.
    """
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "ATTENTION"
    )
    (rows,) = (value for k, value in zip(table.keys, table.values) if k.value == name)
    first = last = rows.end_lineno - 1
    for k, value in zip(rows.keys, rows.values):
        if k is not None and ast.literal_eval(k) == key:
            first, last = k.lineno - 1, value.end_lineno
    lines, above = source.splitlines(), first
    while _NOTE.match(lines[above - 1]):
        above -= 1
    return above, first, last


# The command


def parser():
    result = Parser("bench/tune.py", __doc__, check=complete)
    result.add_argument("--op", choices=("attention",), default="attention", help="default: attention")
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    result.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128, 256), default=[64, 128, 256], metavar="D")
    result.add_argument("--seq-len", type=positive, default=2048, metavar="T", help="default: 2048")
    result.add_argument("--dry-run", action="store_true", help="print the rows, leave kernels/configs.py alone")
    return result


def complete(args):
    if args.device.type != "cuda":
        raise UsageError(
            f"--device {args.device.type}: tile shapes are chosen by times on a GPU; --device cuda is required"
        )
    reason = refusal("triton", args.device, args.dtype[0], max(args.head_dims))
    if reason is not None:
        raise UsageError(f"the kernels do not support {reason}")
    if {"float16", "bfloat16"} <= set(args.dtype):
        raise UsageError("--dtype float16 bfloat16: they share their rows of the table; give one of them")
    if not args.dry_run and not os.access(configs.__file__, os.W_OK):
        raise UsageError(f"{configs.__file__} cannot be written; --dry-run prints the rows instead")


def tune_all(args, clock):
    """Tunes what was asked for: (chosen as `rewritten` takes it, the rows of the record)."""
    chosen, record = {}, []
    for dtype in dict.fromkeys(args.dtype):
        for head_dim in sorted(set(args.head_dims)):
            trial = Trial(args.device, dtype, head_dim, args.seq_len)
            for direction in DIRECTIONS:
                config, rows = tune(trial, direction, quick=args.quick, clock=clock)
                trial.use(direction, config)
                chosen.setdefault(trial.key(direction), {})[head_dim] = config
                record += rows
    return chosen, record


def conclude(args, environment, name, chosen, record):
    """Saves and prints what was measured, and rewrites the table, or prints its rows if --dry-run."""
    saved = save(args.out / "tune_attention.json", environment, record)
    print(table(record, COLUMNS))
    print(f"\nwrote {saved}")
    dtypes = {DTYPES[dtype].itemsize: dtype for dtype in args.dtype}
    where = (
        f"{environment['device']}, {{}}, T = {args.seq_len}, triton {environment['triton']}, {environment['date'][:10]}"
    )
    file = Path(configs.__file__)
    source = file.read_text(encoding="utf-8")
    for key, row in chosen.items():
        source = rewritten(source, name, key, row, where.format(dtypes[key[1]]))
    if args.dry_run:
        print("\n".join(line for key in chosen for line in with_notes(source, name, key)))
    else:
        print(f"wrote {write_file(file, source)}")


def main(argv=None):
    args = parser().parse_args(argv)
    chosen, record = tune_all(args, Clock(args.device))
    conclude(args, args.environment, family(active_arch()), chosen, record)


if __name__ == "__main__":
    sys.exit(main())
