"""GPT-2 here against GPT-2 in transformers with SDPA, on the same weights, in one run.

    python bench/transformers_sweep.py
    python bench/transformers_sweep.py --backend triton --size gpt2-large --dtype float16

import      `from model import GPT2` against `from transformers import GPT2LMHeadModel`, each in a new process.
prefill     a forward pass of 512 tokens that fills a new cache, logits of the last position.
decoding    one token for each row after T - 1 in the cache. With triton one row also goes each way of it: the
            kernels of the forward pass, those of kernels/decode, all in one launch, with int8 weights. Beside the time:
            the bytes that a step must read a second, their share of a copy, the kernels and copies of a step.
generate    each library's own generate(), greedy: a prompt of T tokens and 32 new ones.

Weights are random, from one seed. Before anything is timed, logits are held against float64 by the tolerance rule of
the tests, and in float32 both must generate the same tokens. Providers take turns, in short blocks; torch uses as many
threads as it does by default (OMP_NUM_THREADS sets it). Files: transformers_sweep.json, transformers_speedup.png.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser, UsageError
from bench.lib.clock import TIMES, measure, summary
from bench.lib.decoded import DECODED, decoded
from bench.lib.gate import OK
from bench.lib.lanes import DTYPES
from bench.lib.providers import NEW_TOKENS, PATHS, THEIRS, Provider, build, gate, refuse
from bench.lib.record import Record, progress
from model import attention_backends
from model.attention.outside import add_import_option
from model.config import PRESETS

BASELINE = "transformers-sdpa"
# (mode, B, T), and how the clock goes about it on a CPU: rounds and the milliseconds of a block.
CASES = (
    (("prefill", 1, 512), (8, 60.0)),
    (("decoding", 1, 128), (15, 200.0)),
    (("decoding", 1, 512), (15, 200.0)),
    (("decoding", 8, 128), (15, 200.0)),
    (("decoding", 8, 512), (15, 200.0)),
    (("generate", 1, 16), (6, 60.0)),
    (("generate", 8, 16), (6, 60.0)),
)
ON_A_GPU = (5, 40.0)  # is enough where nothing else runs
QUICK = tuple({(mode, B, 32): ((mode, B, 32), clock) for (mode, B, _), clock in CASES}.values())
IMPORTS = {"ours": "from model import GPT2", BASELINE: "from transformers import GPT2LMHeadModel"}
IMPORT_ROUNDS = {"cpu": 8, "cuda": 1}  # a GPU's minutes are for the GPU
COLUMNS = (
    "case",
    "backend",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "host_us",
    "tokens_per_s",
    "speedup",
    *DECODED,
    "error",
    "status",
)


def import_ms(statement):
    """How long the statement takes in a new process, the interpreter's own start not counted."""
    code = f"import time; start = time.perf_counter(); {statement}; print((time.perf_counter() - start) * 1e3)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def import_timings(rounds):
    """{name: median and percentiles}, after a first time that fills the caches of files."""
    times = {name: [] for name in IMPORTS}
    for _ in progress(range(1 + rounds), "imports"):
        for name, statement in IMPORTS.items():
            times[name].append(import_ms(statement))
    return {name: summary(values[1:]) for name, values in times.items()}


def same_tokens(providers, dtype, B, T):
    """OK, or that greedy decoding differs. Half precision may round a tie to either side, so there it may differ."""
    first, second = (provider.generate(B, T)() for provider in providers)
    return OK if dtype != "float32" or torch.equal(first, second) else "failed: other tokens than transformers"


def import_rows(args):
    rows = []
    for name, timing in import_timings(min(IMPORT_ROUNDS[args.device.type], 2 if args.quick else 8)).items():
        name = args.backend if name == "ours" else name
        rows.append(row(args, "import", name, None, None) | {"mode": "import", "error": None, "status": OK} | timing)
    return with_speedup(rows)


def rows_of(args, providers, judged, mode, B, T, rounds, budget_ms, lost=lambda name: None):
    """The rows of one case, ours before transformers'. lost(name): why a provider must not run here, or None."""
    providers = [p for p in providers if p.name not in PATHS or (mode, B) == ("decoding", 1)]
    statuses = {p.name: lost(p.name) or judged[p.name][1] for p in providers}
    if mode == "generate" and statuses[args.backend] == OK:
        statuses[args.backend] = same_tokens(providers, args.dtype, B, T)
    makes = {p.name: partial(getattr(p, mode), B, T) for p in providers if statuses[p.name] == OK}
    rounds, budget_ms = ON_A_GPU if args.device.type == "cuda" else (rounds, budget_ms)
    clock = {"rounds": rounds, "budget_ms": budget_ms, "quick": args.quick, "is_warm": mode == "generate"}
    # Gaps of the host are part of a model's time; what a graph could do, decoding does.
    timings = measure(makes, args.device, ahead=False, graphs=False, **clock)
    new = {"generate": NEW_TOKENS, "decoding": 1}.get(mode)
    rows = []
    for provider in providers:
        name, status = provider.name, statuses[provider.name]
        entry = row(args, f"{mode} B={B} T={T}", name, B, T) | {"mode": mode, "error": judged[name][0]}
        entry |= timings.get(name, {"status": status})
        if new and entry["median_ms"]:
            entry["tokens_per_s"] = 1e3 * B * new / entry["median_ms"]
        if mode == "decoding":
            entry |= decoded(provider, B, T, entry["median_ms"], args)
        rows.append(entry)
    return with_speedup(rows)


def with_speedup(rows):
    """The rows of a case, transformers' the last, with what each of ours gains over that."""
    *ours, theirs = rows
    for mine in ours:
        if mine["median_ms"] and theirs["median_ms"]:
            mine["speedup"] = theirs["median_ms"] / mine["median_ms"]
    return rows


def row(args, case, backend, B, T):
    shared = {"size": args.size, "dtype": args.dtype, "lane": args.device.type}
    unmeasured = dict.fromkeys((*TIMES, "tokens_per_s", "speedup", *DECODED))
    return {"case": case, "backend": backend, "B": B, "T": T, **unmeasured, **shared}


def ahead(argv):
    """What bench/compile_ahead.py is to make once, (label, call): each pass of ours, of one layer of the size."""
    args = parser().understand(argv)
    for mode, B, T in [shape for shape, _ in (QUICK if args.quick else CASES)]:
        for name in (args.backend, *(PATHS if (mode, B, args.backend) == ("decoding", 1, "triton") else ())):
            if name not in THEIRS:
                yield f"{mode}, {name}, {args.size}, {args.dtype}", partial(_from_nothing, args, name, mode, B, T)


def _from_nothing(args, name, mode, B, T):
    getattr(Provider(name, build(args.size, args.device, args.dtype, n_layer=1)), mode)(B, T)()


def parser():
    result = Parser("bench/transformers_sweep.py", __doc__, check=complete)
    known = ", ".join((*attention_backends(), "one that --import registers"))
    result.add_argument("--backend", metavar="NAME", help=f"ours: {known}; default: triton on a GPU, sdpa on a CPU")
    add_import_option(result)
    result.add_argument("--size", choices=PRESETS, default="gpt2", help="default: gpt2")
    result.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    on_gpu = args.device.type == "cuda"
    args.backend = args.backend or ("triton" if on_gpu else "sdpa")
    args.dtype = args.dtype or ("float16" if on_gpu else "float32")
    refuse("the baseline", BASELINE, args)
    if args.backend in THEIRS:
        raise UsageError(f"--backend {args.backend}: it is transformers'; one of ours is required")
    if args.backend in PATHS:
        raise UsageError(f"--backend {args.backend}: a way of decoding, timed with --backend triton")
    refuse("--backend", args.backend, args, unequal_lengths=True)


def main(argv=None):
    args = parser().parse_args(argv)
    with Record(args, columns=COLUMNS) as record:
        ours = build(args.size, args.device, args.dtype)
        paths = PATHS if args.backend == "triton" else ()
        providers = [Provider(name, ours) for name in (args.backend, *paths, BASELINE)]
        judged = gate(providers, ours)
        for case in record.missing(QUICK if args.quick else CASES, "against transformers"):
            (mode, B, T), clock = case
            record.add_from(case, rows_of, args, providers, judged, mode, B, T, *clock, record.lost)
        for case in record.missing(["import"], "imports"):  # last: they take longest and have nothing to do with a GPU
            record.add_from(case, import_rows, args)


if __name__ == "__main__":
    main()
