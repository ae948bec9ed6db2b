"""A step of training: tokens/s, and the share of the chip's FLOP/s that it uses.

    python bench/training_sweep.py                                   # what this machine can do
    python bench/training_sweep.py --providers triton sdpa transformers-sdpa --size gpt2 --batch 16 32

Weights are fp32; --dtype is model.train's, one or several: bfloat16 and float16 by autocast, pure-bfloat16 with a bf16
copy of the weights, made in each step, whose memory counts; the loss of float16 is not scaled. A step is the loss, its
gradients, their norm, clipped, and AdamW.
`triton` is ours whole; `sdpa` and `eager` are our module on PyTorch's own operations, written out as nanoGPT does;
`sdpa-compiled` is that under torch.compile, with all logits, into whose product inductor may fuse the loss;
`transformers-sdpa` is transformers' model, where it is installed. What is compiled is so before the clock starts, anew
for each case; the gate sees the module as it was before, and on a CPU its memory is not counted.

FLOPs are 6 N + 12 L C T a token (model/training/optimizer.py); MFU is against the data sheet's 16-bit figure, and not
measured on what has none. File: training_sweep.json.
"""

import sys
from argparse import Namespace
from functools import partial
from itertools import product
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser, UsageError, positive
from bench.lib.clock import TIMES, attempt, measure
from bench.lib.gate import OK
from bench.lib.providers import COMPILED, THEIRS, Provider, build, gate, refuse, refuse_lengths
from bench.lib.record import Record
from bench.model_sweep import peak_with_weights_mb
from model import attention_backends
from model.config import PRESETS
from model.training.captured import refusal as cannot_capture
from model.training.loop import DTYPES
from model.training.optimizer import flops_per_token, peak_flops

SIZES = {"cuda": ((8, 16, 32), (1024,)), "cpu": ((1, 2), (128,))}  # batches, lengths
QUICK = {"cuda": ((4,), (256,)), "cpu": ((1,), (16,))}
CPU_LIMIT_S = 3.0
COLUMNS = (
    "backend",
    "size",
    "dtype",
    "B",
    "T",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "tokens_per_s",
    "mfu",
    "peak_memory_mb",
    "error",
    "status",
)


def rows_of(args, providers, judged, dtype, B, T, lost=lambda name: None):
    """The rows of one case. lost(name): why a provider must not run here, or None."""
    rows, makes = {}, {}
    for provider in providers:
        error, status = judged[provider.name]
        row = {"backend": provider.name, "mode": "step", "size": args.size, "dtype": dtype, "B": B, "T": T}
        row |= dict.fromkeys((*TIMES, "tokens_per_s", "mfu", "peak_memory_mb"))
        rows[provider.name] = row | {"error": error, "lane": args.device.type, "status": lost(provider.name) or status}
    for provider in providers:
        row = rows[provider.name]
        if row["status"] == OK:
            make = partial(provider.optimizer_step, B, T, dtype, args.capture)
            if (
                provider.name != COMPILED or args.device.type == "cuda"
            ):  # what counts on a CPU would not see it compiled
                peak = attempt(peak_with_weights_mb, provider, make, args.device, provider=provider.name)
                row["peak_memory_mb"], row["status"] = peak
            if row["status"] == OK:
                makes[provider.name] = make
    on_cpu = {"limit_s": CPU_LIMIT_S, "is_warm": True} if args.device.type == "cpu" else {}
    timings = measure(makes, args.device, quick=args.quick, ahead=False, graphs=False, **on_cpu)
    for name, timing in timings.items():
        rows[name].update(timing)
        if timing["median_ms"]:
            rate = rows[name]["tokens_per_s"] = B * T / timing["median_ms"] * 1e3
            peak = peak_flops(args.device)
            if peak is not None:
                rows[name]["mfu"] = rate * flops_per_token(providers[0].ours, T) / peak
    return list(rows.values())


def parser():
    result = Parser("bench/training_sweep.py", __doc__, check=complete)
    known = ", ".join((*attention_backends(), COMPILED, *THEIRS))
    result.add_argument("--providers", nargs="+", metavar="NAME", help=f"of {known}; default: triton and sdpa, or sdpa")
    result.add_argument("--size", choices=PRESETS, help="default: gpt2 on a GPU, else distilgpt2")
    result.add_argument(
        "--dtype", choices=DTYPES, nargs="+", help="default: bfloat16 and pure-bfloat16 on a GPU, else float32"
    )
    result.add_argument("--batch", type=positive, nargs="+", metavar="B", help="default: 8 16 32 on a GPU, else 1 2")
    result.add_argument("--seq-lens", type=positive, nargs="+", metavar="T", help="default: 1024 on a GPU, else 128")
    result.add_argument("--capture", action="store_true", help="ours with loss and gradients as one CUDA graph")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    on_gpu = args.device.type == "cuda"
    args.size = args.size or ("gpt2" if on_gpu else "distilgpt2")
    args.dtype = args.dtype or (["bfloat16", "pure-bfloat16"] if on_gpu else ["float32"])
    args.providers = args.providers or (["triton", "sdpa"] if on_gpu else ["sdpa"])
    for name, dtype in product(args.providers, args.dtype):
        products = dtype.removeprefix("pure-")
        refuse("--providers", name, Namespace(**{**vars(args), "dtype": products}), trains=True)
    if len(set(args.dtype)) < len(args.dtype):
        raise UsageError(f"--dtype {' '.join(args.dtype)}: one of them is named twice")
    if len(set(args.providers)) < len(args.providers):
        raise UsageError(f"--providers {' '.join(args.providers)}: one of them is named twice")
    refuse_lengths(args)
    reason = cannot_capture(args.device) if args.capture else None
    if reason is not None:
        raise UsageError(f"--capture: {reason}")


def main(argv=None):
    args = parser().parse_args(argv)
    sizes = (QUICK if args.quick else SIZES)[args.device.type]
    cases = list(product(args.dtype, args.batch or sizes[0], args.seq_lens or sizes[1]))
    with Record(args, columns=COLUMNS, charts=False) as record:
        ours = build(args.size, args.device, "float32")
        providers = [Provider(name, ours) for name in args.providers]
        judged = gate(providers, ours)
        for case in record.missing(cases, "training sweep"):
            record.add_from(case, rows_of, args, providers, judged, *case, record.lost)


if __name__ == "__main__":
    main()
