"""Attention forward and backward, backend against backend, over sequence lengths: a table, a JSON file, two charts.

    python bench/attention_sweep.py            # what this machine can do
    python bench/attention_sweep.py --quick

On a GPU every backend is timed, SDPA once by torch's own choice (sdpa) and once by each kernel that it chooses from
(sdpa-flash, sdpa-cudnn, sdpa-efficient, sdpa-math). On a CPU eager and SDPA are timed; the Triton kernel is checked in
Triton's interpreter or, in bf16, on a simulated A100, at short lengths of its own, and not timed.

Inputs are as in GPT-2: q, k, v [B, H, T, D] are views of one fused projection [B, T, 3HD], random normal. `forward` has
no graph; `backward` is the gradient by q, k and v alone, its forward pass done before.

TFLOP/s follows the flash-attention papers, so that figures compare: forward 4 B H T^2 D (two products, two operations
for a multiply-add), half of it when causal (not the exact T (T + 1) / 2 pairs), backward 2.5 times that (five products
for two). What a backend computes beyond it, such as recomputed scores or masked halves, does not count.

Before a backend is timed it is held against float64 in two whole heads, the first and the last of the batch, by the
tolerance rule of the tests; `error` is the largest difference. `peak_memory_mb` is what the pass allocates above its
inputs, for backward with its forward pass.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness
from bench.harness import OK, UsageError
from kernels import reference
from kernels.simulator import simulate
from model.attention import attention, attention_backends, get_attention, split_heads

MODES = ("forward", "backward")
SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# How torch says that the one SDPA kernel which it may use cannot serve a request.
SDPA_REFUSALS = ("No available kernel", "No viable backend", "no kernel found", "cuDNN Frontend error", "mha_graph")

# By device, and whether --quick: sequence lengths; tokens in a batch.
SIZES = {
    ("cuda", False): ((128, 256, 512, 1024, 2048, 4096, 8192, 16384), 16384),
    ("cuda", True): ((128, 1024, 4096), 4096),
    ("cpu", False): ((128, 256, 512, 1024), 1024),
    ("cpu", True): ((64, 128, 256), 256),
}
MAX_T = 2**17  # beyond it the float64 oracle alone takes minutes

# Where the Triton kernel is checked on a machine without a GPU. The interpreter gets bf16 products wrong.
LANES = {"float32": "interpret", "float16": "interpret", "bfloat16": "simulate sm_80"}
LANE_SEQ_LENS = {False: (64, 128, 256), True: (64,)}

COLUMNS = ("backend", "mode", "dtype", "B", "T", "median_ms", "p20_ms", "p80_ms", "tflops", "peak_memory_mb", "error")
COLUMNS += ("lane", "status")


@dataclass(frozen=True)
class Case:
    """One shape, with the names that a row has for it."""

    dtype: str
    B: int
    H: int
    T: int
    D: int
    causal: bool

    def inputs(self, device):
        """q, k, v and do, each [B, H, T, D] in the memory order [B, T, ..., D] that the model gives them."""
        generator = torch.Generator(device).manual_seed(self.T)
        options = {"generator": generator, "device": device, "dtype": harness.DTYPES[self.dtype]}
        qkv = torch.randn(self.B, self.T, 3 * self.H * self.D, **options)
        do = torch.randn(self.B, self.T, self.H, self.D, **options).transpose(1, 2)
        return *split_heads(qkv, self.H), do


def flops(mode, case):
    """Floating-point operations of one pass; the module's docstring has the formula."""
    forward = 4 * case.B * case.H * case.T**2 * case.D * (0.5 if case.causal else 1.0)
    return forward * {"forward": 1.0, "backward": 2.5}[mode]


# Backends


def run(name, q, k, v, causal):
    """o [B, H, T, D] by the registry's backend `name`, or by SDPA held to the one kernel that `name` stands for."""
    if name not in SDPA_KERNELS:
        return attention(q, k, v, backend=name, causal=causal)[0]
    with sdpa_kernel(SDPA_KERNELS[name]):
        return attention(q, k, v, backend="sdpa", causal=causal)[0]


def make_call(mode, name, inputs, causal):
    """The call to check and to time: () -> (o,), or () -> (dq, dk, dv) of a forward pass that is done here."""
    q, k, v, do = inputs
    if mode == "forward":
        return lambda: (run(name, q, k, v, causal),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(name, *leaves, causal)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def refusal(name, device, dtype, head_dim):
    """Why the backend cannot serve such tensors, in the registry's words, or None."""
    request = {"device": device, "dtype": harness.DTYPES[dtype], "head_dim": head_dim}
    reason = get_attention("sdpa" if name in SDPA_KERNELS else name).refusal(**request)
    on_gpu = torch.device(device).type == "cuda"
    if reason is None and name == "triton" and on_gpu and get_attention("auto", **request).name != "triton":
        return "this GPU (compute capability 8.0 or newer is required)"
    return reason


# The gate


def two_heads(x):
    """[2, 1, T, D] of [B, H, T, D]: the first head of the first row and the last of the last."""
    return x[[0, -1], [0, -1]][:, None]


def expected(inputs, dtype, causal, chunk=1024):
    """o, dq, dk, dv of two heads by the plain definition in `dtype`, each [2, 1, T, D].

    It goes through the queries in chunks, since T x T scores may not fit; the chunks' dk and dv are summed in float64.
    """
    q, k, v, do = (two_heads(x).to(dtype) for x in inputs)
    o, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v))
    for start in range(0, q.shape[-2], chunk):
        rows = slice(start, start + chunk)
        seen = slice(0, start + chunk if causal else None)
        leaves = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, seen], v[:, :, seen])]
        o_rows, _ = reference.attention(*leaves, causal=causal)
        dq_rows, dk_seen, dv_seen = torch.autograd.grad(o_rows, leaves, do[:, :, rows])
        o[:, :, rows], dq[:, :, rows] = o_rows.detach().double(), dq_rows.double()
        dk[:, :, seen] += dk_seen
        dv[:, :, seen] += dv_seen
    return {"forward": {"o": o.to(dtype)}, "backward": {"dq": dq.to(dtype), "dk": dk.to(dtype), "dv": dv.to(dtype)}}


def check(mode, name, inputs, causal, baseline, oracle):
    """(error, status) of one backend on `inputs`; baseline and oracle as `expected` gives them."""
    try:
        actual, status = harness.attempt(lambda: [two_heads(x) for x in make_call(mode, name, inputs, causal)()])
    except RuntimeError as error:
        if name not in SDPA_KERNELS or not any(words in str(error) for words in SDPA_REFUSALS):
            raise
        return None, "not supported: SDPA has no such kernel for this request"
    if status != OK:
        return None, status
    results = {key: (x, baseline[mode][key], oracle[mode][key]) for key, x in zip(oracle[mode], actual)}
    return harness.judge(results, factor=harness.FORWARD_FACTOR if mode == "forward" else harness.GRADIENT_FACTOR)


def references(case, inputs):
    """(baseline, oracle): the plain definition in the case's dtype and in float64."""
    return tuple(expected(inputs, dtype, case.causal) for dtype in (harness.DTYPES[case.dtype], torch.float64))


# Rows


def row(name, mode, case, lane):
    """A row in which nothing is measured yet."""
    measured = ("median_ms", "p20_ms", "p80_ms", "tflops", "peak_memory_mb", "error")
    shape = asdict(case)
    return {"backend": name, "mode": mode, **shape, **dict.fromkeys(measured), "lane": lane, "status": OK}


def timed_rows(case, names, modes, device, quick):
    """The rows of one shape: each backend checked, then those that passed timed against each other."""
    inputs = case.inputs(device)
    baseline, oracle = references(case, inputs)
    rows = []
    for mode in modes:
        passed = {}
        for name in names:
            entry = row(name, mode, case, "gpu" if device.type == "cuda" else "cpu")
            rows.append(entry)
            reason = refusal(name, device, case.dtype, case.D)
            if reason is not None:
                entry["status"] = f"not supported: {reason}"
                continue
            entry["error"], entry["status"] = check(mode, name, inputs, case.causal, baseline, oracle)
            if entry["status"] == OK:
                entry["peak_memory_mb"], entry["status"] = harness.attempt(
                    harness.peak_memory_mb, partial(_both, mode, name, inputs, case.causal), device
                )
            if entry["status"] == OK:
                passed[name] = entry
        makes = {name: partial(make_call, mode, name, inputs, case.causal) for name in passed}
        for name, timing in harness.measure(makes, device, quick=quick).items():
            passed[name].update(timing)
            if timing["median_ms"] is not None:
                passed[name]["tflops"] = flops(mode, case) / timing["median_ms"] / 1e9
    return rows


def _both(mode, name, inputs, causal):
    """A pass with all that it needs: for backward, its forward too."""
    make_call(mode, name, inputs, causal)()


def lane_rows(cases, modes):
    """Rows of the Triton kernel where there is no GPU: its error from the dtype's lane, and no time."""
    rows = []
    for lane in dict.fromkeys(LANES[case.dtype] for case in cases):
        # A process of its own, since Triton chooses its interpreter when kernels are imported.
        interpreted = {"TRITON_INTERPRET": "1" if lane == "interpret" else "0"}
        with (
            mock.patch.dict(os.environ, interpreted),
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
        ):
            mine = [case for case in cases if LANES[case.dtype] == lane]
            rows += process.submit(rows_in_lane, lane, mine, modes).result()
    return rows


def rows_in_lane(lane, cases, modes):
    """lane_rows of one lane; runs in that lane's process."""
    rows = []
    for case, mode in product(cases, modes):
        entry = row("triton", mode, case, lane)
        rows.append(entry)
        reason = refusal("triton", "cpu", case.dtype, case.D)
        if reason is not None:
            entry["status"] = f"not supported: {reason}"
            continue
        inputs = case.inputs("cpu")
        with nullcontext() if lane == "interpret" else simulate(lane.split()[1]):
            entry["error"], entry["status"] = check(mode, "triton", inputs, case.causal, *references(case, inputs))
        if entry["status"] == OK:
            entry["status"] = "not timed: no GPU"
    return rows


# The command


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "positive whole number"  # argparse's message names the type


def parser():
    result = harness.Parser("bench/attention_sweep.py", __doc__, check=complete)
    result.add_argument("--backends", nargs="+", metavar="NAME", help=f"of the registry, or {', '.join(SDPA_KERNELS)}")
    result.add_argument(
        "--dtype", nargs="+", choices=harness.DTYPES, help="default: float16 on a GPU, float32 on a CPU"
    )
    result.add_argument("--heads", type=positive, default=12, metavar="H", help="default: 12")
    result.add_argument("--head-dim", type=positive, default=64, metavar="D", help="default: 64")
    result.add_argument(
        "--seq-lens", type=positive, nargs="+", metavar="T", help="default: 128 to 16384, on a CPU to 1024"
    )
    batch = result.add_mutually_exclusive_group()
    batch.add_argument("--tokens", type=positive, metavar="N", help="B = N // T; default: 16384, on a CPU 1024")
    batch.add_argument("--batch", type=positive, metavar="B", help="the same B for each T, instead of --tokens")
    result.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    result.add_argument("--full", action="store_true", help="attention to all keys; default: causal")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    lengths, tokens = SIZES[args.device.type, args.quick]
    args.seq_lens = args.seq_lens or list(lengths)
    args.dtype = args.dtype or ["float16" if args.device.type == "cuda" else "float32"]
    longest = max(args.seq_lens)
    if longest > MAX_T:
        raise UsageError(f"--seq-lens {longest}: at most {MAX_T} is supported")
    if args.tokens is not None and args.tokens < longest:
        raise UsageError(f"--tokens {args.tokens}: a batch has whole sequences, the longest has T = {longest}")
    args.tokens = args.tokens or max(tokens, longest)
    _complete_backends(args)
    if args.device.type == "cpu" and {"eager", "sdpa-math"} & set(args.backends):
        _check_memory(args, longest)


def _complete_backends(args):
    known = (*attention_backends(), *SDPA_KERNELS)
    if args.backends is None:
        common = ("eager", "sdpa", *(SDPA_KERNELS if args.device.type == "cuda" else ()), "triton")
        args.backends = [name for name in common if name in known]
        return
    args.backends = list(dict.fromkeys(args.backends))
    for name in args.backends:
        if name not in known:
            raise UsageError(f"--backends {name}: unknown; choose from {', '.join(known)}")
        for dtype in args.dtype:
            reason = refusal(name, args.device, dtype, args.head_dim)
            if reason is not None:
                raise UsageError(f"--backends {name} does not support {reason}")


def _check_memory(args, longest):
    """A CPU's memory runs out by killing the process, so that is foreseen here instead."""
    B = args.batch or args.tokens // longest
    needed = 5 * B * args.heads * longest**2 * 4  # scores, probabilities and their gradients
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UsageError(
            f"--seq-lens {longest}: eager attention needs about {needed / 2**30:.0f} GB for B = {B}, H = {args.heads}; "
            f"this machine has {available / 2**30:.0f} GB"
        )


def main(argv=None):
    args = parser().parse_args(argv)
    environment = harness.environment(args.device, args.command)
    in_lane = args.device.type == "cpu" and "triton" in args.backends
    timed = [name for name in args.backends if not (in_lane and name == "triton")]

    def cases(lengths, batch):
        return [
            Case(dtype, batch or max(1, args.tokens // T), args.heads, T, args.head_dim, not args.full)
            for dtype in args.dtype
            for T in lengths
        ]

    rows = []
    for case in harness.progress(cases(args.seq_lens, args.batch) if timed else [], "attention"):
        rows += timed_rows(case, timed, args.mode, args.device, args.quick)
    if in_lane:
        rows += lane_rows(cases(LANE_SEQ_LENS[args.quick], 1), args.mode)
    rows.sort(key=lambda r: (args.mode.index(r["mode"]), args.dtype.index(r["dtype"]), r["T"]))

    print(f"{environment['device']}: H = {args.heads}, D = {args.head_dim}, {'full' if args.full else 'causal'}")
    harness.finish(args.out / "attention_sweep.json", environment, rows, columns=COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
