"""LayerNorm, GELU and cross-entropy, provider against provider, over GPT-2's widths: a table, a JSON file, a chart.

    python bench/pointwise_sweep.py            # what this machine can do
    python bench/pointwise_sweep.py --quick

Providers: eager (PyTorch's own functions), compiled (torch.compile of those), liger (liger-kernel, where it is
installed and has the operation), triton (ours). On a CPU only eager is timed; ours is checked in Triton's interpreter,
or in bf16 on a simulated A100, at a few rows, and not timed.

`gb_per_s` is least_bytes(), what an operation must move, over its time; `of_copy` sets it against a large copy
on the same device in the same run, which a memory-bound operation can reach (and on a CPU pass, where its tensors fit
the caches). `backward` is the gradients of all inputs, the forward pass done before. Inputs are random normal;
cross-entropy's N is the vocabulary, and its gradient a new tensor. Before a provider is timed its results are held
against float64 by the tolerance rule of the tests; `error` is the largest difference. `peak_memory_mb` is what the pass
allocates above its inputs, for backward with its forward pass.
"""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels
from bench.ceilings import COPY_BYTES
from bench.lib.cli import Parser, UsageError
from bench.lib.clock import TIMES, attempt, measure, peak_memory_mb
from bench.lib.gate import FORWARD_FACTOR, GRADIENT_FACTOR, OK, judge
from bench.lib.lanes import DTYPES, rows_by_lane
from bench.lib.record import Record
from kernels import reference
from kernels.simulator import simulate

MODES = ("forward", "backward")
PROVIDERS = ("eager", "compiled", "liger", "triton")
WIDTHS = (768, 1024, 1280, 1600)
VOCABULARY = 50257

# By device, and whether --quick: rows of the norms and of GELU; rows of logits.
SIZES = {
    ("cuda", False): (16384, 8192),
    ("cuda", True): (4096, 1024),
    ("cpu", False): (4096, 256),
    ("cpu", True): (256, 16),
}
LANE_ROWS = 16  # with so many rows ours is checked on a machine without a GPU

COLUMNS = (
    "op",
    "provider",
    "mode",
    "dtype",
    "M",
    "N",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "host_us",
    "graph_ms",
    "gb_per_s",
    "of_copy",
    "peak_memory_mb",
    "error",
    "lane",
    "status",
)


def _eager_add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


# Each operation as PyTorch has it and as the specification of ours, which the gate takes in float64.
EAGER = {
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    "add_layer_norm": _eager_add_layer_norm,
    "bias_gelu": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
    "cross_entropy": lambda logits, target: F.cross_entropy(logits.float(), target),
}
OPERATIONS = tuple(EAGER)


@dataclass(frozen=True)
class Case:
    """One operation at one size, with the names that a row has for it."""

    op: str
    dtype: str
    M: int
    N: int

    def inputs(self, device):
        """The operation's inputs and its output gradients: two lists."""
        generator = torch.Generator(device).manual_seed(self.N)
        options = {"generator": generator, "device": device}

        def normal(*shape):
            return torch.randn(*shape, **options).to(DTYPES[self.dtype])

        M, N = self.M, self.N
        if self.op == "cross_entropy":
            return [normal(M, N), torch.randint(N, (M,), **options)], [torch.ones((), device=device)]
        tensors = {"layer_norm": 1, "add_layer_norm": 2, "bias_gelu": 1}[self.op]
        vectors = 1 if self.op == "bias_gelu" else 2
        gradients = 2 if self.op == "add_layer_norm" else 1
        inputs = [normal(M, N) for _ in range(tensors)] + [normal(N) for _ in range(vectors)]
        return inputs, [normal(M, N) for _ in range(gradients)]


def least_bytes(mode, case):
    """The least that must cross memory: every [M, N] tensor read or written once (vectors are nothing beside them).

    layer_norm: x, y; backward dy, x, dx. add_layer_norm: x, residual, sum, y; backward dy, dsum, sum, and one gradient
    for x and residual. bias_gelu: x, y; backward dy, x, dx. cross_entropy: logits; backward logits, dlogits.
    """
    tensors = {
        "layer_norm": (2, 3),
        "add_layer_norm": (4, 4),
        "bias_gelu": (2, 3),
        "cross_entropy": (1, 2),
    }[case.op][MODES.index(mode)]
    return tensors * case.M * case.N * DTYPES[case.dtype].itemsize


# Providers


def provider(name, op):
    """The function of provider `name` for an operation, or None if it has none."""
    if name == "eager":
        return EAGER[op]
    if name == "compiled":
        # Past dynamo's limit of compilations it raises with fullgraph; without, eager would be timed as compiled.
        return torch.compile(EAGER[op], dynamic=False, fullgraph=True)
    if name == "triton":
        return getattr(kernels, op)
    return _liger(op)


def _liger(op):
    if op == "layer_norm":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
    if op == "cross_entropy":
        from liger_kernel.transformers.functional import liger_cross_entropy

        return liger_cross_entropy
    return None


def refusal(name, op, mode, device):
    """Why a provider cannot be timed, or None."""
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if name == "liger" and _liger(op) is None:
        return f"liger-kernel has no {op}"
    if name == "liger" and (op, mode) == ("cross_entropy", "backward"):
        return "liger-kernel takes this gradient in its forward pass, over the logits"
    if name in ("liger", "compiled") and device.type != "cuda":
        return f"{name} is timed on a GPU only"
    return None


def make_call(mode, function, inputs, gradients):
    """The call to check and to time: () -> outputs, or () -> gradients of a forward pass that is done here."""
    if mode == "forward":
        return lambda: _tuple(function(*inputs))
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = _tuple(function(*leaves))
    wanted = [x for x in leaves if x.is_floating_point()]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


# The gate


def expected(mode, case, inputs, gradients, dtype):
    """The results of the plain definition computed in `dtype`."""
    function = getattr(reference, case.op)
    wide = [[x.to(dtype) if x.is_floating_point() else x for x in tensors] for tensors in (inputs, gradients)]
    if case.op == "cross_entropy" and dtype != torch.float64:
        wide[1] = gradients  # its loss is fp32 whatever the logits are
    return make_call(mode, function, *wide)()


def check(mode, function, case, inputs, gradients, provider=None):
    """(error, status) of one provider."""
    actual, status = attempt(lambda: make_call(mode, function, inputs, gradients)(), provider=provider)
    if status != OK:
        return None, status
    baseline = expected(mode, case, inputs, gradients, DTYPES[case.dtype])
    oracle = expected(mode, case, inputs, gradients, torch.float64)
    results = {f"result {i}": triple for i, triple in enumerate(zip(actual, baseline, oracle))}
    return judge(results, factor=FORWARD_FACTOR if mode == "forward" else GRADIENT_FACTOR)


# Rows


def row(name, mode, case, lane):
    """A row in which nothing is measured yet."""
    measured = (*TIMES, "gb_per_s", "of_copy", "peak_memory_mb", "error")
    shape = asdict(case)
    head = {"op": shape.pop("op"), "provider": name, "mode": mode}
    return {**head, **shape, **dict.fromkeys(measured), "lane": lane, "status": OK}


def copy_gb_per_s(device, quick):
    """The device's copy bandwidth, bytes read and written over the median time, in 10^9 bytes a second."""
    x = torch.empty(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    timing = measure({"copy": lambda: lambda: y.copy_(x)}, device, quick=quick)["copy"]
    return 2 * x.numel() / timing["median_ms"] / 1e6


def timed_rows(case, names, modes, device, copy, quick, lost=lambda name: None):
    """The rows of one case: each provider checked, then those that passed timed against each other.

    lost(name): why a provider must not run here, or None.
    """
    if "compiled" in names:
        torch._dynamo.reset()  # each case begins at none of dynamo's 8 compilations
    inputs, gradients = case.inputs(device)
    rows = []
    for mode in modes:
        passed, functions = {}, {}
        for name in names:
            entry = row(name, mode, case, "gpu" if device.type == "cuda" else "cpu")
            rows.append(entry)
            reason = refusal(name, case.op, mode, device)
            if reason is not None:
                entry["status"] = f"not supported: {reason}"
                continue
            if lost(name) is not None:
                entry["status"] = lost(name)
                continue
            function = provider(name, case.op)
            entry["error"], entry["status"] = check(mode, function, case, inputs, gradients, name)
            if entry["status"] == OK:
                both = partial(_both, mode, function, inputs, gradients)
                entry["peak_memory_mb"], entry["status"] = attempt(peak_memory_mb, both, device, provider=name)
            if entry["status"] == OK:
                passed[name], functions[name] = entry, function
        makes = {name: partial(make_call, mode, functions[name], inputs, gradients) for name in passed}
        for name, timing in measure(makes, device, quick=quick).items():
            passed[name].update(timing)
            if timing["median_ms"] is not None:
                passed[name]["gb_per_s"] = least_bytes(mode, case) / timing["median_ms"] / 1e6
                passed[name]["of_copy"] = passed[name]["gb_per_s"] / copy
    return rows


def _both(mode, function, inputs, gradients):
    """A pass with all that it needs: for backward, its forward too."""
    make_call(mode, function, inputs, gradients)()


def lane_rows(cases, modes):
    """Rows of ours where there is no GPU: its error from the dtype's lane, and no time."""
    return rows_by_lane(rows_in_lane, cases, modes)


def rows_in_lane(lane, cases, modes):
    """lane_rows of one lane; runs in that lane's process."""
    rows = []
    for case, mode in product(cases, modes):
        entry = row("triton", mode, case, lane)
        rows.append(entry)
        inputs, gradients = case.inputs("cpu")
        with nullcontext() if lane == "interpret" else simulate(lane.split()[1]):
            entry["error"], entry["status"] = check(mode, provider("triton", case.op), case, inputs, gradients)
        if entry["status"] == OK:
            entry["status"] = "not timed: no GPU"
    return rows


def ahead(argv):
    """What bench/compile_ahead.py is to make once, (label, call): each pass that something is compiled for."""
    args = parser().understand(argv)
    for case in cases(args, args.rows):
        for mode in args.mode:
            for name in args.providers:
                if name != "eager" and refusal(name, case.op, mode, args.device) is None:
                    label = f"{case.op}, {mode}, {name}, {case.dtype}, N = {case.N}"
                    yield label, partial(_from_nothing, mode, name, case, args.device)


def _from_nothing(mode, name, case, device):
    _both(mode, provider(name, case.op), *case.inputs(device))


# The command


def parser():
    result = Parser("bench/pointwise_sweep.py", __doc__, check=complete)
    result.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")
    result.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all")
    result.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    result.add_argument("--rows", type=int, metavar="M", help="of every operation; default: 16384, on a CPU 4096")
    result.add_argument("--widths", type=int, nargs="+", default=None, metavar="N", help="default: GPT-2's")
    result.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    args.widths = args.widths or list(WIDTHS)
    args.dtype = args.dtype or ["bfloat16" if args.device.type == "cuda" else "float32"]
    if args.rows is not None and args.rows < 1:
        raise UsageError(f"--rows {args.rows}: at least 1 is required")
    for N in args.widths:
        if not 1 <= N <= 16384:
            raise UsageError(f"--widths {N}: from 1 to 16384 is supported")


def cases(args, rows=None):
    rows_of_norms, rows_of_logits = SIZES[args.device.type, args.quick]
    return [
        Case(op, dtype, rows or (rows_of_logits if op == "cross_entropy" else rows_of_norms), N)
        for op in args.ops
        for dtype in args.dtype
        for N in ((VOCABULARY,) if op == "cross_entropy" else args.widths)
    ]


def main(argv=None):
    args = parser().parse_args(argv)
    in_lane = args.device.type == "cpu" and "triton" in args.providers
    timed = [name for name in args.providers if not (in_lane and name == "triton")]
    copy = args.environment["copy_gb_per_s"] = copy_gb_per_s(args.device, args.quick)
    orders = {"op": OPERATIONS, "mode": args.mode, "dtype": args.dtype}
    record = Record(
        args,
        title=f"{args.environment['device']}: a copy moves {copy:.4g} GB/s",
        columns=COLUMNS,
        order=lambda r: [values.index(r[name]) for name, values in orders.items()] + [r["N"]],
    )
    with record:
        for case in record.missing(cases(args, args.rows) if timed else [], "pointwise"):
            record.add_from(case, timed_rows, case, timed, args.mode, args.device, copy, args.quick, record.lost)
        for lanes in record.missing(["in its lanes"] if in_lane else [], "lanes"):
            record.add_from(lanes, lane_rows, cases(args, LANE_ROWS), args.mode)


if __name__ == "__main__":
    sys.exit(main())
