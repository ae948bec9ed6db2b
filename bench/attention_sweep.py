"""Attention forward and backward, backend against backend: a table, a JSON file, charts.

    python bench/attention_sweep.py            # over sequence lengths: what this machine can do
    python bench/attention_sweep.py --quick
    python bench/attention_sweep.py --scenario packed padding dropout decode head-dims

bench/lib/attention_cases.py says what each scenario measures and how FLOPs are counted. Inputs are as in GPT-2: q, k, v
[B, H, T, D] are views of one fused projection [B, T, 3HD], random normal; decode reads k and v from a cache. `forward`
has no graph; `backward` is the gradient by q, k and v alone, its forward pass done before.

On a GPU every backend is timed, SDPA once by torch's own choice (sdpa) and once by each kernel that it chooses from
(sdpa-flash, sdpa-cudnn, sdpa-efficient, sdpa-math); flex, compiled, and flash_attention_2 where its package is there.
On a CPU eager and SDPA are timed; the Triton kernel is checked in Triton's interpreter or, in bf16, on a simulated
A100, at short lengths of its own, and not timed.

Before a backend is timed it is held against float64 in two whole heads, the first and the last of the batch, by the
tolerance rule of the tests; `error` is the largest difference. With dropout the Triton kernel is held against the
definition with the very weights dropped that its seed drops; what another backend drops cannot be known, so that it is
checked without dropout: `checked` says which. `gb_per_s` is, for decode, the cache's bytes over the time.
`peak_memory_mb` is what the pass allocates above its inputs, for backward with its forward pass.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.attention_cases import SCENARIOS, SIZES, Case, cache_bytes, flops, modes_of, variants
from bench.lib.cli import Parser, UsageError, positive
from bench.lib.clock import TIMES, attempt, measure, peak_memory_mb
from bench.lib.gate import FORWARD_FACTOR, GRADIENT_FACTOR, OK, judge
from bench.lib.kernel_names import kind_of, launched
from bench.lib.lanes import DTYPES, rows_by_lane
from bench.lib.record import Record
from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention.dropout import attention_keep_mask
from kernels.simulator import simulate
from model.attention import attention, attention_backends, get_attention, split_heads
from model.attention.outside import add_import_option

MODES = ("forward", "backward")
SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# Ours: what flash_attention is asked for.
KERNELS = {
    "triton": {},
    "triton-portable": {"kernel": "portable"},
    "triton-hopper": {"kernel": "hopper"},
    "triton-one-pass": {"kernel": "hopper", "deterministic": False},
}
# How torch says that the one SDPA kernel which it may use cannot serve a request.
SDPA_REFUSALS = ("No available kernel", "No viable backend", "no kernel found", "cuDNN Frontend error", "mha_graph")

MAX_T = 2**17  # beyond it the float64 oracle alone takes minutes

# What the Triton kernel is checked with on a machine without a GPU.
LANE_SEQ_LENS = {False: (64, 128, 256), True: (64,)}  # of the scenario "lengths"; the others take the shortest
LANE_CACHE = 256

# The tables: what a shape is told by, in each scenario, and what came of it.
SHAPE = ("backend", "mode", "dtype", "B", "T")
SCENARIO_COLUMNS = {
    "padding": ("padding", "valid"),
    "dropout": ("dropout_p", "checked"),
    "decode": ("T_k", "gb_per_s"),
    "head-dims": ("H", "D"),
}
TIMED = ("median_ms", "p20_ms", "p80_ms", "host_us", "graph_ms", "tflops")
RESULT = (*TIMED, "peak_memory_mb", "error", "lane", "kernel", "status")  # kernel: which of its own SDPA took
MEASURED = (*TIMES, "tflops", "gb_per_s", "peak_memory_mb", "error", "kernel")


# Backends


def run(name, q, k, v, options):
    """o [B, H, T, D] by the registry's backend `name`, or by SDPA held to the one kernel that `name` stands for.

    options: keyword arguments of model.attention.attention. With a dropout_seed, which the registry does not take, the
    Triton kernel is called itself.
    """
    if "dropout_seed" in options:
        return flash_attention(q, k, v, **options)
    if name not in SDPA_KERNELS:
        return attention(q, k, v, backend=name, **options)[0]
    with sdpa_kernel(SDPA_KERNELS[name]):
        return attention(q, k, v, backend="sdpa", **options)[0]


def run_packed(name, qkv, num_heads, options):
    """y [B, T, C] of the fused projection qkv [B, T, 3C], with every copy that the backend needs on the way."""
    if name in KERNELS:
        return flash_attention_packed(qkv, num_heads, **KERNELS[name], **options)
    return run(name, *split_heads(qkv, num_heads), options).transpose(1, 2).flatten(2)


def make_call(mode, name, inputs, options, packed=False):
    """The call to check and to time: () -> (o,), or () -> (dq, dk, dv) of a forward pass that is done here.

    packed: from qkv [B, T, 3C] to [B, T, C], and back from its gradient to that of qkv; what it returns are views.
    """
    q, k, v, do = inputs
    if packed:
        return _packed_call(mode, name, inputs, options)
    if mode == "forward":
        return lambda: (run(name, q, k, v, options),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(name, *leaves, options)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def _packed_call(mode, name, inputs, options):
    H = inputs[0].shape[1]
    q, k, v, dy = (x.transpose(1, 2).flatten(2) for x in inputs)
    qkv = torch.cat((q, k, v), -1)
    if mode == "forward":
        return lambda: (run_packed(name, qkv, H, options).unflatten(2, (H, -1)).transpose(1, 2),)
    leaf = qkv.requires_grad_()
    y = run_packed(name, leaf, H, options)
    return lambda: split_heads(torch.autograd.grad(y, leaf, dy, retain_graph=True)[0], H)


def refusal(name, device, dtype, head_dim, **needs):
    """Why the backend cannot serve such tensors, in the registry's words, or None. needs: as Case.needs gives them."""
    request = {"device": device, "dtype": DTYPES[dtype], "head_dim": head_dim}
    backend = get_attention("sdpa" if name in SDPA_KERNELS else name)
    reason = backend.refusal(**request, **needs)
    on_gpu = torch.device(device).type == "cuda"
    if reason is None and name in ("triton-hopper", "triton-one-pass") and not backend.runs_on(torch.device(device)):
        return "this device (a GPU of compute capability 9.0 is required)"
    if (
        reason is None
        and name in ("triton", "triton-portable")
        and on_gpu
        and get_attention("auto", **request).name != "triton"
    ):
        return "this GPU (compute capability 8.0 or newer is required)"
    return reason


# The gate


def two_heads(x):
    """[2, 1, T, D] of [B, H, T, D]: the first head of the first row and the last of the last."""
    return x[[0, -1], [0, -1]][:, None]


def expected(inputs, dtype, causal, kv_start=None, kv_end=None, keep=None, dropout_p=0.0, chunk=1024):
    """o, dq, dk, dv of two heads by the plain definition in `dtype`, each [2, 1, T, D] or [2, 1, T_k, D].

    keep: the weights of those heads that dropout keeps, bool [2, 1, T, T_k], or None. It goes through the queries in
    chunks, since T x T_k scores may not fit; the chunks' dk and dv are summed in float64.
    """
    q, k, v, do = (two_heads(x).to(dtype) for x in inputs)
    bounds = {"kv_start": kv_start, "kv_end": kv_end}
    bounds = {name: None if bound is None else bound[[0, -1]] for name, bound in bounds.items()}
    T, T_k = q.shape[-2], k.shape[-2]
    o, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v))
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        seen = slice(0, T_k - T + min(start + chunk, T) if causal else None)
        leaves = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, seen], v[:, :, seen])]
        dropout = {} if keep is None else {"keep": keep[:, :, rows, seen], "dropout_p": dropout_p}
        o_rows, _ = reference.attention(*leaves, causal=causal, **bounds, **dropout)
        dq_rows, dk_seen, dv_seen = torch.autograd.grad(o_rows, leaves, do[:, :, rows])
        o[:, :, rows], dq[:, :, rows] = o_rows.detach().double(), dq_rows.double()
        dk[:, :, seen] += dk_seen
        dv[:, :, seen] += dv_seen
    return {"forward": {"o": o.to(dtype)}, "backward": {"dq": dq.to(dtype), "dk": dk.to(dtype), "dv": dv.to(dtype)}}


class Gate:
    """What a backend is held against on one shape: `options` of its call, `baseline` and `oracle` of the outcome.

    checked: "as timed", or "without dropout" for those whose choice of weights to drop is not known from outside.
    """

    def __init__(self, case, inputs, *, drops=False):
        device = inputs[0].device
        self.packed = case.scenario == "packed"
        self.checked = "as timed" if drops or not case.dropout_p else "without dropout"
        self.options = asked = case.options(device)
        if drops:
            seed = torch.tensor([20190214], dtype=torch.int64, device=device)
            p = round(case.dropout_p * 65536) / 65536  # the probability that the kernel makes of it
            keep = attention_keep_mask(seed, case.B, case.H, case.T, case.T_k, p, asked["kv_start"])
            self.options = asked | {"dropout_p": p, "dropout_seed": seed}
            asked = asked | {"dropout_p": p, "keep": two_heads(keep)}
        self.baseline, self.oracle = (expected(inputs, dtype, **asked) for dtype in (DTYPES[case.dtype], torch.float64))


def gates(case, inputs, names):
    """{name: Gate}; they share what they can, since the oracle is slow."""
    drops = {name: name in KERNELS and case.dropout_p > 0 for name in names}
    made = {kind: Gate(case, inputs, drops=kind) for kind in set(drops.values())}
    return {name: made[drops[name]] for name in names}


def check(mode, name, inputs, gate, provider=None):
    """(error, status) of one backend on `inputs`. provider: to be named if the GPU is lost, if not `name`."""
    actual, status = attempt(
        lambda: [two_heads(x) for x in make_call(mode, name, inputs, gate.options, gate.packed)()],
        provider=provider or name,
    )
    if name in SDPA_KERNELS and any(words in status for words in SDPA_REFUSALS):
        status = "not supported: SDPA has no such kernel for this request"
    if status != OK:
        return None, status
    baseline, oracle = gate.baseline[mode], gate.oracle[mode]
    results = {key: (x, baseline[key], oracle[key]) for key, x in zip(oracle, actual)}
    return judge(results, factor=FORWARD_FACTOR if mode == "forward" else GRADIENT_FACTOR)


# Rows


def row(name, mode, case, lane):
    """A row in which nothing is measured yet."""
    unmeasured = {"checked": None, **dict.fromkeys(MEASURED)}
    return {"backend": name, "mode": mode, **asdict(case), **unmeasured, "lane": lane, "status": OK}


def timed_rows(case, names, modes, device, quick, lost=lambda name: None):
    """The rows of one shape: each backend checked, then those that passed timed against each other.

    lost(name): why a backend must not run here, or None.
    """
    inputs = case.inputs(device)
    gate_of = gates(case, inputs, names)
    options = case.options(device) | {"dropout_p": case.dropout_p}
    packed, rows = case.scenario == "packed", []
    for mode in modes:
        passed = {}
        for name in names:
            entry = row(name, mode, case, "gpu" if device.type == "cuda" else "cpu")
            rows.append(entry)
            reason = refusal(name, device, case.dtype, case.D, **case.needs())
            if reason is not None:
                entry["status"] = f"not supported: {reason}"
                continue
            if lost(name) is not None:
                entry["status"] = lost(name)
                continue
            entry["checked"] = gate_of[name].checked
            entry["error"], entry["status"] = check(mode, name, inputs, gate_of[name])
            if entry["status"] == OK:
                entry["peak_memory_mb"], entry["status"] = attempt(
                    peak_memory_mb, partial(_both, mode, name, inputs, options, packed), device, provider=name
                )
            if entry["status"] == OK:
                passed[name] = entry
            if entry["status"] == OK and name == "sdpa" and device.type == "cuda":
                call = make_call(mode, name, inputs, options, packed)
                entry["kernel"], _ = attempt(lambda call=call: kind_of(launched(call)), provider=name)
        makes = {name: partial(make_call, mode, name, inputs, options, packed) for name in passed}
        for name, timing in measure(makes, device, quick=quick).items():
            passed[name].update(timing)
            if timing["median_ms"] is not None:
                passed[name]["tflops"] = flops(mode, case) / timing["median_ms"] / 1e9
                if case.scenario == "decode":
                    passed[name]["gb_per_s"] = cache_bytes(case) / timing["median_ms"] / 1e6
    return rows


def _both(mode, name, inputs, options, packed=False):
    """A pass with all that it needs: for backward, its forward too."""
    make_call(mode, name, inputs, options, packed)()


def lane_rows(cases, modes):
    """Rows of the Triton kernel where there is no GPU: its error from the dtype's lane, and no time."""
    return rows_by_lane(rows_in_lane, cases, modes)


def rows_in_lane(lane, cases, modes):
    """lane_rows of one lane; runs in that lane's process."""
    rows = []
    passes = [(case, mode) for case in cases for mode in modes_of(case.scenario, modes)]
    for case, mode in passes:
        entry = row("triton", mode, case, lane)
        rows.append(entry)
        reason = refusal("triton", "cpu", case.dtype, case.D, **case.needs())
        if reason is not None:
            entry["status"] = f"not supported: {reason}"
            continue
        inputs = case.inputs("cpu")
        with nullcontext() if lane == "interpret" else simulate(lane.split()[1]):
            gate = gates(case, inputs, ["triton"])["triton"]
            entry["checked"] = gate.checked
            entry["error"], entry["status"] = check(mode, "triton", inputs, gate)
        if entry["status"] == OK:
            entry["status"] = "not timed: no GPU"
    return rows


def ahead(argv):
    """What bench/compile_ahead.py is to make once, (label, call): each pass that something is compiled for."""
    args = parser().understand(argv)
    for case in args.cases:
        options = case.options(args.device) | {"dropout_p": case.dropout_p}
        for mode in modes_of(case.scenario, args.mode):
            for name in args.backends:
                is_compiled = name in (*KERNELS, "flex")
                if is_compiled and refusal(name, args.device, case.dtype, case.D, **case.needs()) is None:
                    kind = f"D = {case.D}, {case.padding} padding, dropout {case.dropout_p}, {case.T} queries"
                    kind = kind if case.scenario == "decode" else kind.rpartition(",")[0]
                    label = f"{case.scenario}, {mode}, {name}, {case.dtype}, {kind}"
                    yield label, partial(_from_nothing, mode, name, case, args.device, options)


def _from_nothing(mode, name, case, device, options):
    _both(mode, name, case.inputs(device), options, case.scenario == "packed")


# The command


def parser():
    result = Parser("bench/attention_sweep.py", __doc__, check=complete)
    result.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["lengths"], help="default: lengths")
    result.add_argument("--backends", nargs="+", metavar="NAME", help=f"of the registry, or {', '.join(SDPA_KERNELS)}")
    add_import_option(result)
    result.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    result.add_argument("--heads", type=positive, default=12, metavar="H", help="default: 12")
    result.add_argument("--head-dim", type=positive, default=64, metavar="D", help="default: 64")
    result.add_argument(
        "--seq-lens",
        type=positive,
        nargs="+",
        metavar="T",
        help="for decode, of the cache; default: 128 to 16384, on a CPU to 1024, other scenarios fewer",
    )
    batch = result.add_mutually_exclusive_group()
    batch.add_argument("--tokens", type=positive, metavar="N", help="B = N // T; default: 16384, on a CPU 1024")
    batch.add_argument("--batch", type=positive, metavar="B", help="the same B for each T, instead of --tokens")
    result.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    result.add_argument("--full", action="store_true", help="attention to all keys; default: causal")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    args.dtype = args.dtype or ["float16" if args.device.type == "cuda" else "float32"]
    args.scenario = list(dict.fromkeys(args.scenario))
    longest = max(args.seq_lens or [1])
    if longest > MAX_T:
        raise UsageError(f"--seq-lens {longest}: at most {MAX_T} is supported")
    for scenario in args.scenario:
        if not modes_of(scenario, args.mode):
            raise UsageError(f"--mode {' '.join(args.mode)}: {scenario} has no gradient; forward is required")
        lengths = args.seq_lens or SIZES[scenario][args.device.type, args.quick][0]
        if args.tokens is not None and args.tokens < max(lengths):
            raise UsageError(f"--tokens {args.tokens}: a batch has whole sequences, the longest has T = {max(lengths)}")
    args.cases = [case for scenario in args.scenario for case in cases(args, scenario)]
    _complete_backends(args)
    if args.device.type == "cpu" and {"eager", "sdpa-math"} & set(args.backends):
        _check_memory(args.cases)


def cases(args, scenario):
    """The shapes of one scenario, with the sizes that were asked for or those of SIZES."""
    lengths, tokens = SIZES[scenario][args.device.type, args.quick]
    lengths = args.seq_lens or lengths
    tokens = args.tokens or max(tokens, *lengths)
    return _cases(args, scenario, lengths, lambda T: args.batch or max(1, tokens // T))


def lane_cases(args, scenario):
    """The shapes at which the Triton kernel is checked where there is no GPU."""
    if scenario == "lengths":
        return _cases(args, scenario, LANE_SEQ_LENS[args.quick], lambda T: 1)
    length = LANE_CACHE if scenario == "decode" else LANE_SEQ_LENS[True][0]
    return _cases(args, scenario, [length], lambda T: 2 if scenario == "padding" else 1)


def _cases(args, scenario, lengths, batch):
    return [
        case
        for dtype in args.dtype
        for T in lengths
        for case in variants(Case(dtype, batch(T), args.heads, T, args.head_dim, not args.full, scenario=scenario))
    ]


def _complete_backends(args):
    known = (*attention_backends(), *SDPA_KERNELS)
    if args.backends is None:
        on_gpu = ("flex", "flash_attention_2", *SDPA_KERNELS) if args.device.type == "cuda" else ()
        args.backends = [name for name in ("eager", "sdpa", *on_gpu, "triton") if name in known]
        return
    args.backends = list(dict.fromkeys(args.backends))
    refused = {}
    for name in args.backends:
        if name not in known:
            raise UsageError(f"--backends {name}: unknown; choose from {', '.join(known)}")
        reasons = [refusal(name, args.device, case.dtype, case.D, **case.needs()) for case in args.cases]
        if all(reasons):
            refused[name] = reasons[0]
    if len(refused) == len(args.backends):  # beside others that run, its rows say so
        name, reason = next(iter(refused.items()))
        raise UsageError(f"--backends {name} does not support {reason}")


def _check_memory(cases):
    """A CPU's memory runs out by killing the process, so that is foreseen here instead."""

    def scores(case):  # and probabilities, and their gradients
        return 5 * case.B * case.H * case.T * case.T_k * 4

    largest = max(cases, key=scores)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if scores(largest) > available:
        raise UsageError(
            f"--seq-lens {largest.T_k}: eager attention needs about {scores(largest) / 2**30:.0f} GB for "
            f"B = {largest.B}, H = {largest.H}; this machine has {available / 2**30:.0f} GB"
        )


def main(argv=None):
    args = parser().parse_args(argv)
    in_lane = args.device.type == "cpu" and "triton" in args.backends
    timed = [name for name in args.backends if not (in_lane and name == "triton")]
    asked = {"scenario": args.scenario, "mode": args.mode, "dtype": args.dtype}
    shape = f"H = {args.heads}, D = {args.head_dim}, {'full' if args.full else 'causal'}"
    record = Record(
        args,
        title=f"{args.environment['device']}: {shape}",
        columns={name: SHAPE + SCENARIO_COLUMNS.get(name, ()) + RESULT for name in args.scenario},
        by="scenario",
        order=lambda r: [values.index(r[name]) for name, values in asked.items()] + [r["T_k"], r["T"], r["D"]],
    )
    with record:
        for case in record.missing(args.cases if timed else [], "attention"):
            modes = modes_of(case.scenario, args.mode)
            record.add_from(case, timed_rows, case, timed, modes, args.device, args.quick, record.lost)
        for scenario in record.missing([f"{name} in its lanes" for name in args.scenario if in_lane], "lanes"):
            record.add_from(scenario, lane_rows, lane_cases(args, scenario.split()[0]), args.mode)


if __name__ == "__main__":
    sys.exit(main())
