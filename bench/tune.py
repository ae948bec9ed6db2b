"""Measures tile shapes on the GPU at hand and writes the fastest into its family's rows of kernels/configs.py.

    python bench/tune.py --op attention --device cuda              # bfloat16, all classes of head dim
    python bench/tune.py --op attention --dtype float32 --dry-run  # prints the rows and leaves the file alone
    python bench/tune.py --quick                                   # only the neighbours of the present shapes
    python bench/tune.py --resume                                  # what is missing in --out

For each class of head dims, at its largest: forward, then dq, then dkdv, each with what was chosen before it in place.
dq and dkdv are timed by the whole backward pass that they are part of. fp16 and bf16 share rows; measure one of them.

A row of the table takes at most --minutes. Its candidates go through four sieves, and each keeps a row of its own in
the file with what is known of it, and why it was left out:

1. A model, before the compiler: what needs more registers for its accumulators than a thread has is left out, and, in
   two bytes, what has more tiles in flight than fit shared memory.
2. The compiler, in as many processes as there are cores, each candidate once; the nearest to the present shape first.
   Left out: what it refuses, what spills more than 128 bytes a thread, and what takes more than twice the fewest
   instructions per score. Both bounds come from the shapes timed on an H100 (results/nvidia-h100-80gb-hbm3): the three
   fastest of a row spill at most 104 bytes and take at most 1.7 times the fewest, and those beyond the bounds took 1.4
   to 2.5 times as long as the fastest.
3. The tests' tolerance rule, at the timed length and at one that ends inside a tile.
4. The clock: a few calls of each, then twice as many of the faster half, until four are left. These and the present
   shape are timed thoroughly, and it gives way only to one that is clearly faster: `choose` has the rule.

What a killed run was at is left out when --resume goes on: it may be what killed it.
"""

import os
import sys
import time
from dataclasses import asdict, astuple
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.attention_sweep import check, gates, make_call, refusal
from bench.lib.attention_cases import Case
from bench.lib.cli import Parser, UsageError, positive
from bench.lib.clock import TIMES, Clock, attempt, measure, summary
from bench.lib.compile_only import CompileOnly
from bench.lib.files import write_file
from bench.lib.gate import OK
from bench.lib.lanes import DTYPES
from bench.lib.processes import NO_TIME, Processes
from bench.lib.record import Record, sources
from bench.lib.rewriting import rewritten, with_notes
from bench.lib.sass import inspect
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
OURS = "triton-portable"  # the backend whose tiles these are, on every chip
TILES = {2: (32, 64, 128), 4: (16, 32, 64)}  # by bytes per element
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
REGISTERS = 255  # of one thread
SPILLED = 128  # bytes that a thread may spill
INSTRUCTIONS = 2.0  # per score, over the fewest of any candidate

TOKENS, WIDTH = 16384, 768  # of the timed batch; heads are as many as GPT-2's width has
ODD_T = 336  # of the second gate: tiles end inside it. A multiple of 16, or Triton would compile once more
FINALISTS = 4
FIRST_MS = 4.0  # of calls in the first round
MINUTE_S = 60.0
MARGIN = 0.02  # a gain below it does not replace a row
COMPILE_SHARE, CHECK_SHARE = 0.6, 0.8  # of a row's time, after which no more is compiled, or checked

NOT_REACHED = "not reached: the time was up"
RUNNING = "left out: the run ended while it was at it"  # what stands in the file meanwhile

MADE = ("registers", "spilled_bytes", "shared_bytes", "instructions_per_score")  # by the compiler
COLUMNS = (
    "direction",
    "dtype",
    "D",
    "BLOCK_M",
    "BLOCK_N",
    "num_warps",
    "num_stages",
    *MADE,
    "median_ms",
    "p20_ms",
    "p80_ms",
    "rounds",
    "error",
    "chosen",
    "status",
)


# Candidates and the choice among them


def candidates(present, itemsize, *, quick=False):
    """The configs to try, the present one first and then by how many numbers of theirs differ from its.

    quick: only those that differ from it in one number at most.
    """
    sizes = TILES[itemsize]
    grid = [AttentionConfig(*numbers) for numbers in product(sizes, sizes, WARPS, STAGES)]
    distance = {c: sum(a != b for a, b in zip(astuple(c), astuple(present))) for c in [present, *grid]}
    return [c for c in sorted(distance, key=distance.get) if not quick or distance[c] <= 1]


def accumulators(direction, config, head_dim):
    """fp32 registers that a thread needs for its part of the accumulators and of one tile of scores (and dp)."""
    M, N = config.BLOCK_M, config.BLOCK_N
    elements = {"forward": M * head_dim + M * N, "dq": M * head_dim + 2 * M * N, "dkdv": 2 * N * head_dim + 2 * M * N}
    return elements[direction] // (32 * config.num_warps)


def tiles_in_flight(direction, config, head_dim, itemsize):
    """Bytes of shared memory that a loop's two tensors take at least: a tile of each for every stage but one."""
    rows = config.BLOCK_M if direction == "dkdv" else config.BLOCK_N
    return 2 * rows * head_dim * itemsize * (config.num_stages - 1)


def modelled(direction, config, head_dim, itemsize, shared_memory):
    """Why a candidate is not even compiled, or None. shared_memory: bytes that a block may use."""
    needed, allowed = accumulators(direction, config, head_dim), REGISTERS + SPILLED // 4
    if needed > allowed:
        return f"left out: {needed} registers a thread for its accumulators alone, of {REGISTERS}"
    held = tiles_in_flight(direction, config, head_dim, itemsize)
    if itemsize == 2 and held > shared_memory:  # fp32's operands need not go through shared memory
        return f"left out: {held} bytes of tiles in flight, of {shared_memory} of shared memory"
    return None


def leave_out_compiled(rows):
    """Gives those of the compiled rows that spill too much, or take too many instructions, the reason as a status."""
    compiled = [row for row in rows if row["status"] == OK and row["instructions_per_score"] is not None]
    fewest = min((row["instructions_per_score"] for row in compiled), default=None)
    for row in compiled:
        per_score = row["instructions_per_score"]
        if row["spilled_bytes"] > SPILLED:
            row["status"] = f"left out: spills {row['spilled_bytes']} bytes a thread, more than {SPILLED}"
        elif per_score > INSTRUCTIONS * fewest:
            row["status"] = f"left out: {per_score:.1f} instructions per score; the fewest are {fewest:.1f}"


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


# Compiling, in processes of their own (bench/lib/processes.py)


def put(direction, head_dim, itemsize, seq_len, config):
    """Puts a config into the table of this process, in the row that serves this length."""
    chip = family(active_arch())
    key = attention_row(chip, direction, itemsize, head_dim, seq_len)
    ATTENTION[chip][key] = ATTENTION[chip][key] | {head_dim: config}
    forget()


_compilers: dict = {}  # by target: the driver whose kernels this process keeps
_made: dict = {}  # what is known of those kernels


def compiled(direction, dtype, head_dim, heads, seq_len, in_use, target, shared_memory):
    """What the compiler makes of one kernel: MADE by name, all but shared_bytes None for a chip that is not NVIDIA's.

    in_use: {direction: the four numbers of its config}. target: a GPUTarget's three fields. The pass is called as it
    will be on the GPU, which then finds on disk what is compiled here. Raises what the compiler raises.
    """
    case = Case(dtype, 1, heads, seq_len, head_dim, causal=True)
    at = (*target, direction, dtype, head_dim, heads, seq_len)
    active = _compilers.setdefault(tuple(target), CompileOnly(GPUTarget(*target), shared_memory))
    driver.set_active(active)  # nothing else is launched in this process
    numbers = {name: AttentionConfig(*numbers) for name, numbers in in_use.items()}
    for name, config in numbers.items():
        put(name, head_dim, DTYPES[dtype].itemsize, seq_len, config)
    active.binaries.clear()
    make_call(DIRECTIONS[direction][1], OURS, case.inputs("cpu"), case.options("cpu"))()
    for name, (kernel, _) in DIRECTIONS.items():
        for binary in active.binaries:  # a kernel is loaded once, at its first launch
            if binary.name == kernel:
                _made[at[:3] + (name,) + at[4:] + (numbers[name],)] = _described(binary, numbers[name], target[0])
    return _made[at + (numbers[direction],)]


def _described(binary, config, backend):
    made = dict.fromkeys(MADE) | {"shared_bytes": binary.shared}
    if backend == "cuda":
        code = inspect(binary.binary, binary.name)
        scores = config.BLOCK_M * config.BLOCK_N / (32 * config.num_warps)  # of a thread, each time around the loop
        per_score = sum(code.loop_names.values()) / scores
        made |= {"registers": code.registers, "spilled_bytes": code.spilled, "instructions_per_score": per_score}
    return made


# Measuring


class Trial:
    """One dtype and head dim on the device: tries configs by putting them into the table that the launchers read."""

    def __init__(self, device, dtype, head_dim, seq_len):
        self.device, self.dtype, self.head_dim = device, dtype, head_dim
        self.itemsize, self.seq_len = DTYPES[dtype].itemsize, seq_len
        self.heads = max(1, WIDTH // head_dim)
        self.case = Case(dtype, max(1, TOKENS // seq_len), self.heads, seq_len, head_dim, causal=True)
        self.inputs = self.case.inputs(device)
        self.gates = [(inputs, gates(case, inputs, [OURS])[OURS]) for case, inputs in self._shapes()]

    def _shapes(self):
        # Of the same row, and with as many heads, since the kernels are compiled for a projection's width.
        odd_T = ODD_T + (SHORT_T if self.seq_len > SHORT_T else 0)
        odd = Case(self.dtype, 1, self.heads, odd_T, self.head_dim, causal=True)
        return (self.case, self.inputs), (odd, odd.inputs(self.device))

    def present(self, direction):
        return attention_config(direction, DTYPES[self.dtype], self.head_dim, self.seq_len)

    def key(self, direction):
        """The table's row that is tuned: a short one's where there is one for this length."""
        return attention_row(family(active_arch()), direction, self.itemsize, self.head_dim, self.seq_len)

    def use(self, direction, config):
        """Puts a config into the table of this process."""
        put(direction, self.head_dim, self.itemsize, self.seq_len, config)

    def request(self, direction, config, target, shared_memory):
        """What compiled() is asked for a candidate."""
        in_use = {name: astuple(self.present(name)) for name in DIRECTIONS} | {direction: astuple(config)}
        shape = {"dtype": self.dtype, "head_dim": self.head_dim, "heads": self.heads, "seq_len": self.seq_len}
        return {"direction": direction, **shape, "in_use": in_use, "target": target, "shared_memory": shared_memory}

    def check(self, direction, config, provider=None):
        """(error, OK), or (None or error, why the config is left out). The table keeps what it had."""
        present, worst = self.present(direction), 0.0
        self.use(direction, config)
        try:
            for inputs, gate in self.gates:
                error, status = check(DIRECTIONS[direction][1], OURS, inputs, gate, provider)
                if status != OK:
                    return error, f"left out: {status}" if status.startswith("error") else status
                worst = max(worst, error)
        finally:
            self.use(direction, present)
        return worst, OK

    def make(self, direction, config):
        """The call that is timed; the config stays in the table."""
        self.use(direction, config)
        return make_call(DIRECTIONS[direction][1], OURS, self.inputs, self.gates[0][1].options)


def chip_at_hand():
    """(a GPUTarget's three fields, the bytes of shared memory that a block may use) of the GPU that kernels run on."""
    active = driver.active
    target, device = active.get_current_target(), active.get_current_device()
    shared_memory = active.utils.get_device_properties(device)["max_shared_mem"]
    return (target.backend, target.arch, target.warp_size), shared_memory


class Tuning:
    """One row of the table being tuned: its candidates, each with its row of the record, and the sieves over them.

    rows: {config: row}, those that an earlier run left included. save(): called whenever one of them has changed.
    lost(config): why it must not run again, or None. until: the end, of time.monotonic.
    """

    def __init__(self, trial, direction, rows, *, until, save, clock=None, quick=False, lost=lambda config: None):
        self.trial, self.direction, self.rows, self.save, self.clock = trial, direction, rows, save, clock
        self.quick, self.lost, self.until, self.began = quick, lost, until, time.monotonic()
        self.present = trial.present(direction)
        shape = {"family": family(active_arch()), "direction": direction, "dtype": trial.dtype, "D": trial.head_dim}
        unknown = dict.fromkeys((*MADE, *TIMES, "rounds", "error")) | {"chosen": False, "status": NOT_REACHED}
        for config in candidates(self.present, trial.itemsize, quick=quick):
            known = rows.pop(config, None)  # in the order of candidates
            rows[config] = known or {**shape, **asdict(config), **unknown}
            if rows[config]["status"] in (OK, NO_TIME):
                rows[config]["status"] = NOT_REACHED
            if lost(config) is not None:
                rows[config]["status"] = lost(config)

    def after(self, share):
        """When this share of the time will have passed."""
        return self.began + share * (self.until - self.began)

    def waiting(self, status=NOT_REACHED):
        return [config for config, row in self.rows.items() if row["status"] == status]

    def compile(self, processes):
        """Sieves 1 and 2; those that are left have the status OK."""
        target, shared_memory = chip_at_hand()
        for config in self.waiting():
            reason = modelled(self.direction, config, self.trial.head_dim, self.trial.itemsize, shared_memory)
            self.rows[config]["status"] = reason or NOT_REACHED
        todo = self.waiting()
        for config in todo:  # what an earlier run compiled lies on disk
            if self.rows[config]["shared_bytes"] is not None:
                self.rows[config]["status"] = OK
        todo = self.waiting()
        self.save()
        requests = [self.trial.request(self.direction, config, target, shared_memory) for config in todo]
        for i, made, status in processes.map(requests, self.after(COMPILE_SHARE)):
            row = self.rows[todo[i]]
            row["status"] = f"left out: {status}" if status.startswith("error") else status
            row |= made or {}
            self.save()
        leave_out_compiled(self.rows.values())
        self.save()

    def check(self):
        """Sieve 3, over those of status OK."""
        for config in self.waiting(OK):
            row = self.rows[config]
            if time.monotonic() > self.after(CHECK_SHARE):
                row["status"] = NOT_REACHED
                continue
            row["status"] = RUNNING
            self.save()
            try:
                row["error"], row["status"] = self.trial.check(self.direction, config, str(config))
            except KeyboardInterrupt:
                row["status"] = NOT_REACHED
                raise
        self.save()

    def time(self):
        """Sieve 4: the timings of those that were timed thoroughly, or, where no time was left, of all."""
        makes = {config: partial(self.trial.make, self.direction, config) for config in self.waiting(OK)}
        left, budget_ms, times = list(makes), FIRST_MS, {config: [] for config in makes}
        while left:
            for config in list(left):
                block = None
                if time.monotonic() < self.until:
                    block, status = attempt(self.clock.block, makes[config], budget_ms, provider=str(config))
                else:
                    status = OK if times[config] else NOT_REACHED
                row = self.rows[config]
                times[config] += block.times if block else []
                row |= summary(times[config]) | {"rounds": (row["rounds"] or 0) + bool(block), "status": status}
                if status != OK:
                    row["status"] = f"left out: {status}" if status.startswith("error") else status
                    left.remove(config)
            self.save()
            left.sort(key=lambda config: self.rows[config]["median_ms"])
            if len(left) <= FINALISTS or time.monotonic() > self.until:
                break
            left, budget_ms = left[: max(FINALISTS, len(left) // 2)], 2 * budget_ms
        finalists = {c: makes[c] for c in left[:FINALISTS]}
        if self.present in makes and self.rows[self.present]["status"] == OK:
            finalists[self.present] = makes[self.present]
        seconds = self.until - time.monotonic()
        if seconds > 0:
            options = {"quick": self.quick, "clock": self.clock, "limit_s": seconds, "graphs": False}
            for config, timing in measure(finalists, self.trial.device, **options).items():
                self.rows[config].update(timing)
        timed = finalists if seconds > 0 else makes
        return {config: self.rows[config] for config in timed}

    def run(self, processes):
        """The config that takes the row. The table is left as it was."""
        try:
            self.compile(processes)
            self.check()
            timings = self.time()
        finally:
            self.trial.use(self.direction, self.present)
        chosen = choose(self.present, timings)
        self.rows[chosen]["chosen"] = True
        return chosen


# The command


def some_minutes(text):
    number = float(text)
    if not 0 < number <= 60:
        raise ValueError
    return number


some_minutes.__name__ = "number of minutes, at most 60,"  # argparse's message names the type


def parser():
    result = Parser("bench/tune.py", __doc__, check=complete, name="tune_attention")
    result.add_argument("--op", choices=("attention",), default="attention", help="default: attention")
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    result.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128, 256), default=[64, 128, 256], metavar="D")
    result.add_argument("--seq-len", type=positive, default=2048, metavar="T", help="default: 2048")
    result.add_argument("--minutes", type=some_minutes, default=2.0, metavar="N", help="for each row; default: 2")
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


class Row(NamedTuple):
    """A row of the table that is to be tuned."""

    dtype: str
    head_dim: int
    direction: str

    def __str__(self):
        return f"{self.dtype}, D = {self.head_dim}, {self.direction}"


def rows_asked_for(args):
    return [
        Row(dtype, head_dim, direction)
        for dtype in dict.fromkeys(args.dtype)
        for head_dim in sorted(set(args.head_dims))
        for direction in DIRECTIONS
    ]


def row_of(entry):
    return Row(entry["dtype"], entry["D"], entry["direction"])


def config_of(entry):
    return AttentionConfig(*(entry[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")))


def tune_all(args, record, processes, clock, decide=lambda trial, direction, config: None):
    """Tunes what `record` does not have yet. decide(trial, direction, config): told what was chosen, at once."""
    chosen = {row_of(entry): config_of(entry) for entry in record.rows if entry["chosen"]}
    trial = None
    for row in record.missing(rows_asked_for(args), "rows"):
        until = time.monotonic() + MINUTE_S * args.minutes
        if trial is None or (trial.dtype, trial.head_dim) != row[:2]:
            trial = Trial(args.device, row.dtype, row.head_dim, args.seq_len)
            for direction in DIRECTIONS:
                if row._replace(direction=direction) in chosen:
                    trial.use(direction, chosen[row._replace(direction=direction)])
        rows = Rows(record, row)
        options = {"until": until, "save": rows.save, "clock": clock, "quick": args.quick}
        tuning = Tuning(trial, row.direction, rows.mine, lost=lambda config: record.lost(str(config)), **options)
        config = tuning.run(processes)
        trial.use(row.direction, config)
        rows.save()
        record.done.append(str(row))
        decide(trial, row.direction, config)
        record.save()


class Rows:
    """The record's entries for one row of the table, by config."""

    def __init__(self, record, row):
        self.record, self.row = record, row
        self.mine = {config_of(entry): entry for entry in record.rows if row_of(entry) == row}

    def save(self):
        others = [entry for entry in self.record.rows if row_of(entry) != self.row]
        self.record.rows = [*others, *self.mine.values()]
        self.record.save()


def decided(args, environment, trial, direction, config):
    """Rewrites the table's row, or prints it if --dry-run."""
    file = Path(configs.__file__)
    where = f"{environment['device']}, {trial.dtype}, T = {args.seq_len}, triton {environment['triton']}"
    name, key = family(active_arch()), trial.key(direction)
    source = rewritten(
        file.read_text(encoding="utf-8"),
        name,
        key,
        {trial.head_dim: config},
        f"{where}, {environment['date'][:10]}",
    )
    if args.dry_run:
        print("\n".join(with_notes(source, name, key)), flush=True)
    else:
        print(f"wrote {write_file(file, source)}", flush=True)
        environment["sources"] = sources()  # so that --resume goes on with the table as it is now


def main(argv=None):
    args = parser().parse_args(argv)
    with Processes("bench.tune:compiled") as processes, Record(args, columns=COLUMNS, charts=False) as record:
        tune_all(args, record, processes, Clock(args.device), partial(decided, args, record.environment))


if __name__ == "__main__":
    sys.exit(main())
