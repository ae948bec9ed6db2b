"""GPT-2 as a whole, backend against backend: the two tables and the diagram of GPT-2's model page.

    python bench/model_sweep.py                                  # what this machine can do
    python bench/model_sweep.py --pair sdpa triton --size gpt2-large --dtype float16
    python bench/model_sweep.py --pair transformers-sdpa sdpa    # where transformers is installed
    python bench/model_sweep.py --mode decoding --pair triton-plain triton-int8 --size gpt2     # two ways of decoding

training    forward and backward of the loss, no optimiser: time per batch.
decoding    one token after T - 1 in the cache: its latency. On a GPU ours replay a CUDA graph, as generate() does;
            what generate() adds around the model is not in it. triton takes the way that generate() takes,
            triton-plain, triton-fused, triton-persistent and triton-int8 the one of their name. With it: the bytes that
            a step must read a second, their share of what a copy moves here, and how many kernels and copies a step
            launches.
inference   a forward pass over T tokens, logits of the last position: the diagram, over batch sizes.

The shapes are the page's. A CPU leaves out the largest batches of training, which appear as not measured unless --batch
or --seq-lens asks for them; then all of it takes two and a half minutes on two cores. Slow cases are timed twice only.

Weights are random, from one seed, and the same for every provider. Before a provider is timed, its logits for 64 tokens
are held against float64 by the tolerance rule of the tests. Peak memory is the provider's weights and what the pass
allocates above them; on a CPU it is counted, not measured: live tensors, without what an operation uses inside itself
(bench/lib/live_bytes.py). Files: model_sweep.json, model_sweep.md, model_inference.png.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser, UsageError, positive
from bench.lib.clock import TIMES, attempt, measure, peak_memory_mb
from bench.lib.decoded import DECODED, decoded
from bench.lib.files import write_file
from bench.lib.gate import OK
from bench.lib.lanes import DTYPES
from bench.lib.live_bytes import LiveBytes
from bench.lib.providers import PATHS, THEIRS, Provider, build, gate, refuse, refuse_lengths
from bench.lib.record import NOT_MEASURED, Record, cell
from model import attention_backends
from model.attention.outside import add_import_option
from model.config import PRESETS

MODES = ("training", "decoding", "inference")

# {mode: (batch sizes, sequence lengths)}.
PAGE = {
    "training": ((1, 2, 4), (128, 256, 512, 1024)),
    "decoding": ((1, 2, 4), (128, 256, 512, 768)),
    "inference": ((1, 2, 4, 8), (512,)),
}
QUICK = {
    "cuda": {"training": ((1,), (128, 256)), "decoding": ((1,), (128,)), "inference": ((1, 2), (512,))},
    "cpu": {"training": ((1,), (32,)), "decoding": ((1, 2), (32,)), "inference": ((1, 2), (32,))},
}
# A CPU's step over these would take longer than all others together.
LEFT_OUT_ON_CPU = {("training", B, T) for B, T in ((2, 512), (2, 1024), (4, 256), (4, 512), (4, 1024))}
CPU_LIMIT_S = 3.0  # after so long on one case, no more than its second round
COLUMNS = (
    "backend",
    "mode",
    "dtype",
    "B",
    "T",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "host_us",
    "peak_memory_mb",
    *DECODED,
    "error",
    "status",
)


def cases(args):
    """[(mode, B, T, whether it is left out)]."""
    sizes = QUICK[args.device.type] if args.quick else PAGE
    asked = args.batch or args.seq_lens
    return [
        (mode, B, T, args.device.type == "cpu" and not asked and (mode, B, T) in LEFT_OUT_ON_CPU)
        for mode in args.mode
        for B, T in product(args.batch or sizes[mode][0], args.seq_lens or sizes[mode][1])
    ]


def rows_of(args, providers, judged, mode, B, T, is_left_out, lost=lambda name: None):
    """The rows of one case. lost(name): why a provider must not run here, or None."""
    rows, entries = [], {}
    for provider in providers:
        error, status = judged[provider.name]
        status = NOT_MEASURED if status == OK and is_left_out else lost(provider.name) or status
        entry = {"backend": provider.name, "mode": mode, "size": args.size, "dtype": args.dtype, "B": B, "T": T}
        entry |= dict.fromkeys((*TIMES, "peak_memory_mb", *DECODED))
        rows.append(entry | {"error": error, "lane": args.device.type, "status": status})
        if status == OK:
            entries[provider.name] = rows[-1]
    for provider in providers:
        if provider.name in entries:
            entry, name = entries[provider.name], provider.name
            make = partial(getattr(provider, mode), B, T)
            peak = attempt(peak_with_weights_mb, provider, make, args.device, provider=name)
            entry["peak_memory_mb"], entry["status"] = peak
            if entry["status"] != OK:
                del entries[name]
    makes = {p.name: partial(getattr(p, mode), B, T) for p in providers if p.name in entries}
    on_cpu = {"limit_s": CPU_LIMIT_S, "is_warm": True} if args.device.type == "cpu" else {}
    # Gaps of the host are part of a model's time; what a graph could do, decoding does.
    timings = measure(makes, args.device, quick=args.quick, ahead=False, graphs=False, **on_cpu)
    for provider in providers:
        if provider.name in timings:
            entries[provider.name].update(timings[provider.name])
            if mode == "decoding":
                entries[provider.name].update(decoded(provider, B, T, timings[provider.name]["median_ms"], args))
    return rows


def peak_with_weights_mb(provider, make, device):
    """The weights and what make()() allocates above them: measured on a GPU, counted on a CPU."""
    make()  # packs the weights, or drops what is packed
    provider.model.zero_grad(set_to_none=True)  # those of the case before
    if device.type == "cuda":
        peak = peak_memory_mb(lambda: make()(), device)
    else:
        with LiveBytes(held=provider.model.parameters()) as live:
            make()()
        peak = live.peak / 2**20
    return peak + provider.held_mb()


TITLES = {
    "training": ("Time per batch ({} - s)", 1e-3, "Training: forward and backward"),
    "decoding": ("Per token latency {} (ms)", 1.0, "Decoding: one token after seq len - 1"),
    "inference": ("Time {} (ms)", 1.0, "Inference: a forward pass"),
}


def markdown(rows, pair, environment):
    """The page's tables, in its own columns, of the first provider of the pair against the second."""
    a, b = pair
    parts = [
        f"{environment['device']}, {rows[0]['size']}, {rows[0]['dtype']}, torch {environment['torch']}; random weights"
    ]
    if rows[0]["lane"] == "cpu":
        parts.append(
            "Peak memory is counted, not measured: live tensors, without what an operation uses inside itself."
        )
    for mode, (time, scale, title) in TITLES.items():
        mine = {(row["backend"], row["B"], row["T"]): row for row in rows if row["mode"] == mode}
        if not mine:
            continue
        names = ("Batch size", "Seq len", time.format(a), time.format(b), "Speedup (%)")
        names += (f"{a} peak mem (MB)", f"{b} peak mem (MB)", "Mem saved (%)")
        lines = [f"\n## {title}\n", "| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
        for B, T in dict.fromkeys((row["B"], row["T"]) for row in mine.values()):
            first, second = mine[a, B, T], mine[b, B, T]
            cells = [B, T, *(_time(row, scale) for row in (first, second)), _percent(first, second, "median_ms")]
            cells += [*(cell(row["peak_memory_mb"]) for row in (first, second))]
            cells += [_percent(first, second, "peak_memory_mb")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _time(row, scale):
    return row["status"] if row["status"] != OK else cell(row["median_ms"] * scale)


def _percent(first, second, field):
    """By how much the first exceeds the second, in percent of the second, as the page has it."""
    if first[field] is None or second[field] is None:
        return NOT_MEASURED
    return f"{100 * (first[field] / second[field] - 1):.1f}"


def ahead(argv):
    """What bench/compile_ahead.py is to make once, (label, call): each pass of ours, of one layer of the size."""
    args = parser().understand(argv)
    for mode, B, T in [case[:3] for case in cases(args)]:
        for name in args.pair:
            if name not in THEIRS:
                yield f"{mode}, {name}, {args.size}, {args.dtype}", partial(_from_nothing, args, name, mode, B, T)


def _from_nothing(args, name, mode, B, T):
    getattr(Provider(name, build(args.size, args.device, args.dtype, n_layer=1)), mode)(B, T)()


def parser():
    result = Parser("bench/model_sweep.py", __doc__, check=complete)
    known = (*attention_backends(), "one that --import registers", *PATHS, *THEIRS)
    result.add_argument("--pair", nargs=2, metavar="NAME", help=f"two of {', '.join(known)}")
    add_import_option(result)
    result.add_argument("--size", choices=PRESETS, help="default: gpt2-large on a GPU, as on the page; else distilgpt2")
    result.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    result.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    result.add_argument("--batch", type=positive, nargs="+", metavar="B", help="default: the page's")
    result.add_argument("--seq-lens", type=positive, nargs="+", metavar="T", help="default: the page's")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    on_gpu = args.device.type == "cuda"
    args.size = args.size or ("gpt2-large" if on_gpu else "distilgpt2")
    args.dtype = args.dtype or ("float16" if on_gpu else "float32")
    args.pair = args.pair or (["sdpa", "triton"] if on_gpu else ["eager", "sdpa"])
    for name in args.pair:
        refuse("--pair", name, args, unequal_lengths="decoding" in args.mode)
        if name in PATHS and args.mode != ["decoding"]:
            raise UsageError(f"--pair {name}: a way of decoding; --mode decoding is required")
    if args.pair[0] == args.pair[1]:
        raise UsageError(f"--pair {args.pair[0]} {args.pair[1]}: two different providers are required")
    refuse_lengths(args)


def main(argv=None):
    args = parser().parse_args(argv)
    with Record(args, columns=COLUMNS, charts="inference" in args.mode) as record:
        ours = build(args.size, args.device, args.dtype)
        providers = [Provider(name, ours) for name in args.pair]
        judged = gate(providers, ours)
        for case in record.missing(cases(args), "model sweep"):
            record.add_from(case, rows_of, args, providers, judged, *case, record.lost)
            text = markdown(record.rows, args.pair, args.environment)
            write_file(args.path.with_suffix(".md"), text)
    print(f"wrote {args.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
